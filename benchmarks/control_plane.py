"""The control plane alone: everything that the job does around a fine-tune that does nothing.

Usage: ``python benchmarks/control_plane.py``. For each number of rows, a run in a process of its own: reading,
checking and decoding, planning, leasing, committing (a real, small artifact), tables. Prints milliseconds per row and
the driver's peak memory. ``--dry-run`` plans only; ``--no-commit`` leaves the storage out, for memory alone.

``--simulate WORKERS`` (``--smoke`` tries it out) is for more workers than the machine has cores: they are threads that
lease, say that they live and finish as the real ones do, and whose fine-tunes sleep for ``--seconds``. Planning, the
driver's pump, the queue actor and the ledger are the real ones; rows are made up, not read.
"""

import argparse
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from matplotlib import pyplot
from PIL import Image
from ray import cloudpickle

from jobs.cluster import connect
from jobs.fanout import _Pump
from jobs.ingest import Checked, Target, source_record
from jobs.leases import Task
from jobs.ledger import Ledger
from jobs.metrics import RunMetrics
from jobs.outcomes import RowOutcome
from jobs.plan import Unit, plan
from jobs.queue_actor import QueueActor
from jobs.room import WorkersRequest
from jobs.run import BatchRun, new_run_id, window_for
from objdrive.adapters.adapter import Adapter, adapter_files
from objdrive.adapters.artifact import ArtifactMetadata, BaseRef, SceneMember, Sources
from objdrive.adapters.store import ArtifactStore
from objdrive.base.family import STABLE_DIFFUSION
from objdrive.catalog.manifest import pieces
from objdrive.catalog.rows import Row
from objdrive.catalog.sources import SourceMark

_DIGEST = "0" * 32
_ROWS_PER_ROW_GROUP = 50_000
_CREWS = 4
# As `jobs.fanout` has them.
_POLL_SECONDS = 0.2
_BEAT_SECONDS = 1.0


@dataclass
class NoOp:
    """Commits a small artifact for every row, without any training."""

    store: ArtifactStore | None
    group_size: int = 16

    def begin(self, payloads: list[Unit], alive: Callable[[], None]) -> "NoOpJob":
        return NoOpJob(self, payloads)

    def commit(self, unit: Unit) -> RowOutcome:
        if self.store is None:
            return RowOutcome("committed", _DIGEST)
        (record,) = unit.rows
        row, token = record.row, f"<{record.row.object_id}>"
        metadata = ArtifactMetadata(
            object_id=row.object_id,
            class_name=row.class_name,
            token=token,
            phrase=token,
            digest=_DIGEST,
            members=[SceneMember(object_id=row.object_id, class_name=row.class_name, token=token)],
            base=BaseRef(id="none", fingerprint=_DIGEST),
            recipe={},
            recipe_digest=_DIGEST,
            method_version=0,
            metrics={},
            sources=Sources(image=source_record(record.image)),
            versions={},
            created="",
        )
        adapter = Adapter({}, {STABLE_DIFFUSION.text_encoders[0]: torch.zeros(128)})
        self.store.commit(adapter_files(adapter, token=token, family=STABLE_DIFFUSION), metadata)
        return RowOutcome("committed", _DIGEST)


@dataclass(frozen=True)
class NoOpJob:
    """A lease whose only work is its commit."""

    work: NoOp
    payloads: list[Unit]

    def prepare(self) -> None:
        pass

    def train(self) -> None:
        pass

    def commit(self) -> list[list[RowOutcome]]:
        return [[self.work.commit(unit)] for unit in self.payloads]


@dataclass(frozen=True)
class MakeNoOp:
    """Makes `NoOp` in a worker."""

    store_url: str

    def __call__(self, gpus: float) -> NoOp:
        return NoOp(ArtifactStore(self.store_url) if self.store_url else None)


def write_manifest(folder: Path, rows: int) -> Path:
    """A Parquet manifest of so many rows that share one small picture."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[16:48, 16:48] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (folder / "picture.png").write_bytes(buffer.getvalue())
    path = folder / "manifest.parquet"
    names = ("object_id", "image", "mask", "class_name", "price")
    schema = pa.schema([(name, pa.string()) for name in names[:4]] + [("price", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, _ROWS_PER_ROW_GROUP):
            numbers = range(first, min(rows, first + _ROWS_PER_ROW_GROUP))
            count = len(numbers)
            ids = [f"object-{number:07}" for number in numbers]
            columns = [ids, ["picture.png"] * count, [""] * count, ["teapot"] * count, list(numbers)]
            writer.write_table(pa.table(columns, schema=schema))
    return path


def measure(rows: int, *, commit: bool, dry: bool) -> None:
    """One run, in this process."""
    connect()
    metrics = RunMetrics(new_run_id())
    with tempfile.TemporaryDirectory() as name, closing(Ledger(metrics.row)) as ledger:
        folder = Path(name)
        manifest = write_manifest(folder, rows)
        store = ArtifactStore(f"{folder}/store")
        make = MakeNoOp(store.url if commit else "")
        run = BatchRun(
            pieces(str(manifest)),
            Target(store.url, _DIGEST, _DIGEST),
            make,
            WorkersRequest(2, 2),
            ledger,
            metrics,
            prompt_fault=lambda class_names: "",
            limit=None,
            previews=0,
            stall_seconds=600,
        )
        started = time.perf_counter()
        if dry:
            run.plan_only()
        else:
            run.work_off()
            ledger.write(store, run.id)
        seconds = time.perf_counter() - started
        if ledger.counts["committed"] + ledger.counts["to train"] != rows:
            raise RuntimeError(f"rows are missing: {ledger.counts}, {ledger.rejects(3)}")
    ray.shutdown()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{rows:9,}   {seconds:7.1f}   {seconds / rows * 1000:20.2f}   {peak:17.0f}", flush=True)


def made_up_rows(rows: int) -> Iterator[Checked]:
    for number in range(rows):
        name = f"object-{number:07}"
        row = Row(name, f"{name}.png", "", "teapot", "", {"price": number}, f"manifest.parquet, row {number}")
        yield Checked(row, SourceMark(row.image, 1000, "mark"), None)


@ray.remote(num_cpus=0)
class Crew:
    """Some of the simulated workers."""

    def work(self, queue: Any, ranks: Sequence[int], size: int, seconds: float) -> int:
        """Work until all is done; returns how many leases that took."""
        process = ray.get_runtime_context().current_actor
        with ThreadPoolExecutor(len(ranks)) as threads:
            return sum(threads.map(lambda rank: self._work(queue, rank, size, seconds, process), ranks))

    def _work(self, queue: Any, rank: int, size: int, seconds: float, process: Any) -> int:
        leases = 0
        outcome = cloudpickle.dumps([RowOutcome("committed", _DIGEST)])
        while (lease := ray.get(queue.lease.remote(rank, size, process))) != "done":
            if lease == "wait":
                time.sleep(_POLL_SECONDS)
                continue
            leases += 1
            keys = [task.key for task in lease.tasks]
            ends = time.monotonic() + seconds
            while (left := ends - time.monotonic()) > 0:
                time.sleep(min(left, _BEAT_SECONDS))
                queue.beat.remote(lease.id, rank, keys, process, done=1, of=2)
            ray.get(queue.finish.remote(lease.id, dict.fromkeys(keys, outcome)))
        return leases


@dataclass
class Watch:
    """What is seen of a simulated run."""

    rows: int
    ledger: Ledger
    started: float = field(default_factory=time.monotonic)
    first: float = 0.0
    memory: list[tuple[int, float]] = field(default_factory=list)
    seen: int = 0

    def __call__(self, task: Task, outcome: list[RowOutcome]) -> None:
        self.first = self.first or time.monotonic() - self.started
        self.ledger.outcome(task.payload.rows[0], outcome[0])
        self.seen += 1
        if self.seen % max(1, self.rows // 20) == 0:
            self.memory.append((self.seen, psutil.Process().memory_info().rss / 2**20))


def simulate(rows: int, workers: int, size: int, seconds: float, plot: Path | None) -> None:
    """One run with simulated workers, in this process."""
    connect()
    make_queue: Any = QueueActor
    queue = make_queue.remote(workers=workers, stall_seconds=600)
    queue_process = psutil.Process(ray.get(queue.__ray_call__.remote(lambda self: os.getpid())))
    crews = [Crew.remote() for _ in range(min(_CREWS, workers))]
    with closing(Ledger()) as ledger:
        watch = Watch(rows, ledger)
        tasks = plan(
            made_up_rows(rows),
            previews=0,
            prompt_fault=lambda class_names: "",
            on_reject=ledger.reject,
            on_committed=ledger.committed_before,
            on_repeat=ledger.repeated,
        )
        pump = _Pump(queue, tasks, watch, lambda leased: None, lambda events: None, window=window_for(workers))
        began = sum(queue_process.cpu_times()[:2])
        pump.start()
        by_crew = ray.get(
            [
                crew.work.remote(queue, range(number, workers, len(crews)), size, seconds)
                for number, crew in enumerate(crews)
            ]
        )
        took = time.monotonic() - watch.started
        busy = (sum(queue_process.cpu_times()[:2]) - began) / took
        pump.stop()
        ray.kill(queue)
        if pump.failure or ledger.counts["committed"] != rows:
            raise RuntimeError(f"rows are missing: {ledger.counts}, {pump.failure}")
    leases = sum(by_crew) / took
    print("     rows   workers   leases/s   objects/s   first s   last s   queue's core   driver's MiB: at 5%   100%")
    print(
        f"{rows:9,}   {workers:7}   {leases:8.1f}   {rows / took:9.0f}   {watch.first:7.2f}   {took:6.1f}   "
        f"{busy:12.0%}   {watch.memory[0][1]:19.0f}   {watch.memory[-1][1]:4.0f}",
        flush=True,
    )
    if plot:
        figure, axes = pyplot.subplots(figsize=(4.5, 3), layout="constrained")
        axes.plot(*zip(*watch.memory, strict=True), marker=".")
        axes.set(xlabel="rows done", ylabel="driver's memory, MiB", ylim=(0, None))
        axes.grid(alpha=0.3)
        figure.savefig(plot, dpi=110)
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--no-commit", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--simulate", type=int, metavar="WORKERS", help="simulated workers")
    parser.add_argument("--group", type=int, default=16, help="objects in a simulated lease (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a simulated lease takes (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="WEBP", help="the driver's memory in a simulated run")
    parser.add_argument("--smoke", action="store_true", help="a small simulated run: tries it all out")
    arguments = parser.parse_args()
    if arguments.smoke:
        simulate(200, 4, 8, 0.1, arguments.plot)
        return
    if arguments.simulate:
        simulate(arguments.rows[0], arguments.simulate, arguments.group, arguments.seconds, arguments.plot)
        return
    if len(arguments.rows) == 1:
        measure(arguments.rows[0], commit=not arguments.no_commit, dry=arguments.dry_run)
        return
    print("     rows   seconds   milliseconds per row   driver's peak MiB", flush=True)
    options = [option for option in sys.argv[1:] if option in ("--no-commit", "--dry-run")]
    for rows in arguments.rows:
        # Peak memory is a process's own.
        subprocess.run([sys.executable, __file__, *options, "--rows", str(rows)], check=True)


if __name__ == "__main__":
    main()
