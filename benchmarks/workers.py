"""Two workers against one: the real fine-tune, one thread a worker, on one local Ray cluster.

Usage: ``python benchmarks/workers.py``. Prints objects per second from the first lease's start to the last one's end,
so that starting Ray, which takes the same time for both, is left out; the ratio is the median over rounds in turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.fs import LocalFileSystem

from jobs.cluster import connect
from jobs.fanout import fan_out
from jobs.ingest import Checked, Target, ingest
from jobs.leases import Task
from jobs.plan import Unit
from jobs.room import Workers
from jobs.settings import FineTuneSettings
from jobs.stages import Job
from jobs.worker import make_fine_tune
from objdrive.base.files import find_base
from objdrive.catalog.manifest import pieces
from objdrive.training.recipe import make_recipe

CATALOG = Path(__file__).parents[1] / "examples" / "catalog" / "manifest.csv"


@dataclass
class Timed:
    """Work that answers with when it began and ended."""

    work: Any
    group_size: int

    def begin(self, payloads: list[Any], alive: Callable[[], None]) -> "TimedJob":
        return TimedJob(self.work.begin(payloads, alive))


class TimedJob:
    """A lease's work, timed."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._began = time.time()

    def prepare(self) -> None:
        self._job.prepare()

    def train(self) -> None:
        self._job.train()

    def commit(self) -> list[tuple[float, float]]:
        outcomes = self._job.commit()
        for outcome in outcomes:
            if outcome[0].status != "committed":
                raise RuntimeError(f"not committed: {outcome}")
        return [(self._began, time.time())] * len(outcomes)


@dataclass(frozen=True)
class MakeTimed:
    """Makes `Timed` in a worker."""

    settings: FineTuneSettings

    def __call__(self) -> Timed:
        work = make_fine_tune(self.settings, 0.0)
        return Timed(work, work.group_size)


def objects_per_second(records: list[Checked], settings: FineTuneSettings, workers: int, folder: str) -> float:
    """Fine-tune all records on so many workers."""
    times: list[tuple[float, float]] = []
    fan_out(
        (Task(record.row.object_id, Unit((record,), previews=False)) for record in records),
        MakeTimed(settings),
        workers=Workers(workers, workers),
        on_outcome=lambda task, outcome: times.append(outcome),
        storage=(LocalFileSystem(), folder),
        stall_seconds=600,
        window=256,
    )
    return len(times) / (max(end for _, end in times) - min(began for began, _ in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    base = find_base("tiny64")
    recipe = make_recipe(tuning=base.tuning, overrides=[f"steps={arguments.steps}", "ccr_weight=0"])
    connect()
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for workers, found in speeds.items():
            with tempfile.TemporaryDirectory() as folder:
                target = Target(f"{folder}/store", recipe.digest, base.fingerprint())
                settings = FineTuneSettings("tiny64", None, recipe, target, group_size=8, cpu_threads=1)
                records = [r for r in ingest(pieces(str(CATALOG)), target, cores=2) if isinstance(r, Checked)]
                single = [record for record in records if not record.row.scene][:16]
                found.append(objects_per_second(single, settings, workers, f"{folder}/train"))
                print(f"{workers} worker(s): {found[-1]:.3f} objects per second", flush=True)
    ratios = sorted(two / one for one, two in zip(*speeds.values(), strict=True))
    print(f"two workers against one: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
