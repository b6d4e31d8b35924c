"""The job that draws a catalog: whole runs over random adapters, ended and broken in all ways."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import fsspec
import psutil
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, ray_processes

from objdrive.adapters.artifact import LORA_FILE
from objdrive.adapters.store import ArtifactStore

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

IDS = [f"mug-{number}" for number in range(4)]
PROMPTS = "- a photo of {} on grass\n- a photo of {} on sand\n- {id: night, text: 'a photo of {} at night'}\n"
SEEDS = 6
WHOLE = len(IDS) * 3 * SEEDS
PATIENCE = 800


@dataclass
class Run:
    """A run of the job in a process of its own; `out` is where its pictures go."""

    process: subprocess.Popen
    out: str
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    def finish(self) -> str:
        """Wait for its end; what it said."""
        self.process.wait(PATIENCE)
        return self.output()

    def files(self) -> dict[str, tuple[int, int, str]]:
        """The pictures: which file, when it was written and what is in it."""
        found = {}
        for path in Path(self.out).glob("pictures/*/*.webp"):
            seen = path.stat()
            found[str(path)] = seen.st_ino, seen.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def wait_for_files(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while len(list(Path(self.out).glob("pictures/*/*.webp"))) < count:
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)


@pytest.fixture
def store(tmp_path, tiny64, put_adapter):
    store = ArtifactStore(str(tmp_path / "store"))
    for seed, object_id in enumerate(IDS):
        put_adapter(store, tiny64, object_id, seed)
    return store


@pytest.fixture
def generate(cluster, tmp_path, store):
    """Call it with options: the job on the cluster, two steps a picture."""
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(PROMPTS)
    started = []

    def generate(*options, out=f"{tmp_path}/out"):
        log = tmp_path / f"generate-{len(started)}.log"
        command = [sys.executable, str(ROOT / "jobs" / "batch_generate.py"), store.url, "--prompts", str(prompts)]
        command += ["--out", out, "--n", str(SEEDS), "--seed", "7", "--steps", "2", "--workers", "1", *options]
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, env={**os.environ, "RAY_ADDRESS": cluster}, stdout=stream, stderr=subprocess.STDOUT
            )
        started.append(process)
        return Run(process, out, log)

    yield generate
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def index_of(out):
    filesystem, root = fsspec.url_to_fs(out)
    rows = []
    for path in filesystem.glob(f"{root}/index/*.parquet"):
        with filesystem.open(path) as file:
            rows += pq.read_table(file).to_pylist()
    return rows


def assert_whole(run, count=WHOLE):
    """Each picture is in the index once, and is what the index says."""
    rows = index_of(run.out)
    files = run.files()
    assert sorted(row["address"] for row in rows) == sorted(files)
    assert len(rows) == count
    assert {(row["address"], row["sha256"]) for row in rows} == {(path, seen[2]) for path, seen in files.items()}
    assert all(row["size"] == Path(row["address"]).stat().st_size for row in rows)


def await_end_of_workers():
    """Until those that a killed driver left behind have ended."""
    deadline = time.monotonic() + PATIENCE
    while left := ray_processes("ray::MapWorker"):
        assert time.monotonic() < deadline, left
        psutil.wait_procs(left, timeout=1)


def test_a_killed_run_goes_on_where_it_stopped_and_draws_nothing_twice(generate):
    first = generate()
    first.wait_for_files(20)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    await_end_of_workers()
    left = first.files()
    assert 20 <= len(left) < WHOLE, "it was killed too late to see anything"

    second = generate()
    output = second.finish()
    assert second.process.returncode == 0, output
    assert_whole(second)
    assert {path: second.files()[path] for path in left} == left
    assert f"{WHOLE - len(left)} drawn" in output


def test_a_worker_that_is_killed_costs_no_picture(generate):
    run = generate("--workers", "2")
    run.wait_for_files(1)
    ray_processes("ray::MapWorker")[0].kill()
    output = run.finish()
    assert run.process.returncode == 0, output
    assert_whole(run)


def test_an_interrupted_run_says_how_far_it_came_and_one_with_more_seeds_goes_on(generate):
    run = generate()
    run.wait_for_files(1)
    run.process.send_signal(signal.SIGTERM)
    output = run.finish()
    assert run.process.returncode == 143, output
    assert re.search(r"interrupted: \d+ pictures left; run the same command to go on", output)
    assert "report " in output
    left = run.files()
    indexed = len(index_of(run.out))
    more = WHOLE // SEEDS * (SEEDS + 1)
    again = generate("--n", str(SEEDS + 1))
    output = again.finish()
    assert again.process.returncode == 0, output
    assert_whole(again, more)
    assert f"{more - len(left)} drawn" in output
    assert (f"{indexed} already" in output) == bool(indexed)


def test_what_cannot_be_drawn_is_a_line_with_a_reason_and_the_rest_goes_to_a_bucket(generate, store, tmp_path):
    filesystem, _ = fsspec.url_to_fs("s3://pictures")
    filesystem.mkdir("s3://pictures")
    lora = Path(store.folder("mug-1", store.current("mug-1").digest)) / LORA_FILE
    lora.write_bytes(lora.read_bytes()[:-100])
    (tmp_path / "prompts.yaml").write_text(f"{PROMPTS}- {{id: long, text: 'a photo of {{}} {'very ' * 90}late'}}\n")
    run = generate("--objects", "mug-0,mug-1,gone", "--n", "1", "--format", "png", out="s3://pictures/out")
    output = run.finish()
    assert run.process.returncode == 3, output
    rows = index_of(run.out)
    assert sorted((row["object_id"], row["prompt_id"]) for row in rows) == [
        ("mug-0", "a-photo-of-on-grass"),
        ("mug-0", "a-photo-of-on-sand"),
        ("mug-0", "night"),
    ]
    for row in rows:
        assert hashlib.sha256(filesystem.cat_file(row["address"])).hexdigest() == row["sha256"]
        assert row["address"].startswith("s3://pictures/out/pictures/mug-0/")
    (folder,) = filesystem.ls("s3://pictures/out/runs")
    with filesystem.open(f"{folder}/rejects.parquet") as file:
        rejects = pq.read_table(file).to_pylist()
    reasons = {(one["object_id"], one["prompt_id"]): one["code"] for one in rejects}
    assert reasons == {
        ("gone", None): "unknown_object",
        ("mug-0", "long"): "invalid_prompt",
        **{("mug-1", prompt): "corrupt_artifact" for prompt in ("a-photo-of-on-grass", "a-photo-of-on-sand", "night")},
        ("mug-1", "long"): "corrupt_artifact",
    }
    assert "tokens, the base reads" in next(one["message"] for one in rejects if one["code"] == "invalid_prompt")
    page = filesystem.cat_file(f"{folder}/by-object-00001.html").decode()
    links = re.findall(r'src="\.\./\.\./([^"]+)"', page)
    assert sorted(f"s3://pictures/out/{link}" for link in links) == sorted(row["address"] for row in rows)
