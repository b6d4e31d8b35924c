"""One Ray cluster for all tests of this folder, and the means to run the job against it as a user would."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from moto.server import ThreadedMotoServer

from objdrive.adapters.store import ArtifactStore
from objdrive.errors import ObjdriveError

ROOT = Path(__file__).parents[2]
CATALOG = ROOT / "examples" / "catalog"
LIGHT = ("steps=10", "mend_masks=false")
"""For `light_job.py`: ten steps of a tenth of a second, and no work around them."""
FAST = ("steps=3", "prototype_steps=2", "class_pool=1", "sample_steps=2")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "flaky"), str(Path(__file__).parent), str(ROOT)]),
}


class Storage:
    """An S3-compatible server that can go away and come back with all that it held."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(port=0)
        self._server.start()
        self.host, self.port = self._server.get_host_and_port()

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server = ThreadedMotoServer(self.host, self.port)
        self._server.start()


@pytest.fixture(scope="session")
def storage() -> Iterator[Storage]:
    """The storage that `cluster` sees as S3."""
    storage = Storage()
    yield storage
    storage.stop()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, storage: Storage) -> Iterator[str]:
    """A Ray cluster that this test run started, and an S3-compatible server that it sees; the cluster's address."""
    before = dict(os.environ)
    os.environ.update(
        ENVIRONMENT,
        HOME=str(tmp_path_factory.mktemp("home")),
        AWS_ENDPOINT_URL=f"http://{storage.host}:{storage.port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    context = ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


@dataclass
class Finished:
    """A run of the job that has ended."""

    status: int
    output: str
    results: list[dict]
    rejects: list[dict]
    report: str


@dataclass
class Job:
    """A run of the job under way, in a process of its own."""

    process: subprocess.Popen
    store: Path
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    def finish(self, timeout: float = 480) -> Finished:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(self.output())
        output = self.output()
        run = next((line.split()[1] for line in output.splitlines() if line.startswith("report ")), None)
        folder = self.store / "runs" / Path(run).parent.name if run else None
        return Finished(
            self.process.returncode,
            output,
            pq.read_table(folder / "results.parquet").to_pylist() if folder else [],
            pq.read_table(folder / "rejects.parquet").to_pylist() if folder else [],
            (folder / "report.html").read_text() if folder else "",
        )


@pytest.fixture
def start_job(cluster: str, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start the job on a manifest: ``start_job(manifest, *options)``; the store is ``tmp_path / "store"``."""
    with started_jobs(cluster, tmp_path, ROOT / "jobs" / "batch_personalize.py") as start:
        yield start


@pytest.fixture
def start_light_job(cluster: str, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """As `start_job`, but that a fine-tune sleeps a tenth of a second for each of its steps (`light_job.py`)."""
    with started_jobs(cluster, tmp_path, Path(__file__).with_name("light_job.py")) as start:
        yield lambda manifest, *options, **where: start(manifest, "--previews", "0", *options, fast=LIGHT, **where)


@contextmanager
def started_jobs(cluster: str, tmp_path: Path, script: Path) -> Iterator[Callable[..., Job]]:
    """Starts jobs on the cluster at that address; ends those that still run."""
    started = []

    def start(manifest: Path | str, *options: str, fast: tuple[str, ...] = FAST, store: str = "") -> Job:
        command = [sys.executable, str(script), str(manifest)]
        command += ["--store", store or str(tmp_path / "store"), *options]
        command += [word for setting in fast for word in ("--set", setting)]
        log = tmp_path / f"job-{len(started)}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                command,
                env={**os.environ, "RAY_ADDRESS": cluster},
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
            )
        job = Job(process, tmp_path / "store", log)
        started.append(job)
        return job

    yield start
    for job in started:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGKILL)
            job.process.wait()


def wait_for_commits(job: Job, count: int, timeout: float = 360) -> None:
    """Wait until the run has committed some objects."""
    deadline = time.monotonic() + timeout
    while len(commits(job.store)) < count:
        assert job.process.poll() is None, job.output()
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.1)


def write_manifest(folder: Path, ids: list[str], *, header: str = "object_id,image,mask,class_name") -> Path:
    """A manifest of one-object rows with the catalog's pictures."""
    with (CATALOG / "manifest.csv").open() as file:
        pictures = [row for row in csv.DictReader(file) if not row["scene"] and row["mask"]]
    lines = [header]
    for number, object_id in enumerate(ids):
        row = pictures[number % len(pictures)]
        lines.append(f"{object_id},{CATALOG / row['image']},{CATALOG / row['mask']},{row['class_name']}")
    path = folder / "manifest.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def ray_processes(cluster_word: str) -> list[psutil.Process]:
    """Processes of this test run's cluster whose title contains a word."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if cluster_word in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def assert_nothing_left_running() -> None:
    """Ray Train ends its workers, and the queue's process goes with them, within a while."""
    deadline = time.monotonic() + 60
    while left := [
        one for what in ("TrainController", "RayTrainWorker", "QueueActor") for one in ray_processes(f"ray::{what}")
    ]:
        assert time.monotonic() < deadline, left
        psutil.wait_procs(left, timeout=1)


class StoreWatch:
    """Reads every artifact of a store again and again, and notes whatever is not whole."""

    def __init__(self, url: Path | str) -> None:
        self.faults: list[str] = []
        self.looks = 0
        self._store = ArtifactStore(str(url))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "StoreWatch":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            for object_id in self._store.object_ids():
                if self._store.current(object_id) is None:
                    continue
                try:
                    self._store.read(object_id)
                    self.looks += 1
                except ObjdriveError as error:
                    self.faults.append(str(error))


def commits(store: Path) -> dict[str, list[str]]:
    """The digests of each object that has any committed artifact."""
    found: dict[str, list[str]] = {}
    for path in store.glob("objects/*/*/artifact.json"):
        found.setdefault(path.parents[1].name, []).append(json.loads(path.read_text())["digest"])
    return found


def assert_whole(store: Path, ids: list[str]) -> None:
    """Every object is committed exactly once and verifies; nothing else is there."""
    assert {object_id: len(digests) for object_id, digests in commits(store).items()} == dict.fromkeys(ids, 1)
    assert [problem for object_id in ids for problem in ArtifactStore(str(store)).verify(object_id)] == []
