"""A catalog's pictures without drawing: what the job does around a picture, and the memory that it takes.

Usage: ``python benchmarks/pictures.py --pictures 1000000``. The plan, the waves of Ray Data's blocks, the index and the
contact sheet are the real ones. Objects are made up, and workers say that pictures are drawn without drawing any.
``--smoke`` tries it out.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray
from made_up import metadata_of

from jobs.cluster import connect
from jobs.drawing import PlannedBase, Pool
from jobs.generation.draw import OUTCOME
from jobs.generation.index import indexed_keys
from jobs.generation.objects import Selection
from jobs.generation.plan import Plan
from jobs.generation.prompts import Prompt
from jobs.generation.run import GenerationRun
from jobs.generation.settings import GenerationSettings
from jobs.generation.sheet import write_rejects, write_sheet
from jobs.room import WorkersRequest
from objdrive.adapters.artifact import ArtifactMetadata
from objdrive.adapters.storage import open_files
from objdrive.adapters.store import ArtifactStore

_PROMPTS = 12
_SEEDS = 4
_SHOWN = 20_000
_LOOKS = 20


class SayDrawn:
    """A worker that draws nothing."""

    def __init__(self, settings: GenerationSettings, pool: Pool) -> None:
        pass

    def __call__(self, block: pa.Table) -> pa.Table:
        said = {"status": "drawn", "size": 1000, "width": 64, "height": 64}
        rows = [row | said | {"sha256": hashlib.sha256(row["key"].encode()).hexdigest()} for row in block.to_pylist()]
        return pa.Table.from_pylist(rows, OUTCOME)


class Watched(GenerationRun):
    """A run that notes the driver's memory, in MiB, again and again."""

    def __init__(self, *arguments: Any, every: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.memory: list[float] = []
        self._every = max(1, every)

    def _note(self, outcome: Any) -> None:
        super()._note(outcome)
        if self.plan.counts["drawn"] % self._every == 0:
            self.memory.append(psutil.Process().memory_info().rss / 2**20)


class MadeUp(Selection):
    """Objects that nobody fine-tuned."""

    def __init__(self, count: int) -> None:
        super().__init__("", (), "")
        self._count = count

    def artifacts(self, store: ArtifactStore) -> Iterator[tuple[str, ArtifactMetadata]]:
        for number in range(self._count):
            name = f"object-{number:07}"
            digest = hashlib.sha256(name.encode()).hexdigest()[:32]
            yield name, metadata_of(name, digest, token=f"<{name}>")


def measure(pictures: int) -> None:
    objects = max(1, pictures // (_PROMPTS * _SEEDS))
    prompts = [Prompt(id=f"context-{number:02}", text=f"a photo of {{}}, {number}") for number in range(_PROMPTS)]
    connect()
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as folder:
        settings = GenerationSettings(PlannedBase("none", None, ""), f"{folder}/store", f"{folder}/out", "webp")
        files = open_files(settings.out, 1)
        with closing(Plan(settings, prompts, range(_SEEDS), steps=1, guidance_scale=None)) as plan:
            started = time.monotonic()
            run = Watched(plan, files, "run-1", make_worker=SayDrawn, every=objects * _PROMPTS * _SEEDS // _LOOKS)
            run.find(MadeUp(objects), ArtifactStore(settings.store))
            planned = time.monotonic()
            total = plan.counts["to draw"]
            run.work_off(WorkersRequest(2, 2))
            drawn = time.monotonic()
            write_rejects(files, run.id, plan)
            write_sheet(files, run.id, plan, [], _SHOWN)
            ended = time.monotonic()
            if plan.counts["drawn"] != total or plan.counts["to draw"]:
                raise RuntimeError(f"pictures are missing: {plan.counts}")
        keys = [key for part in indexed_keys(files) for key in part]
        if len(set(keys)) != len(keys) or len(keys) != total:
            raise RuntimeError(f"{total} pictures have {len(keys)} lines in the index, of {len(set(keys))} pictures")
        parts = sum(1 for _ in Path(folder, "out", "index").iterdir())
    ray.shutdown()
    print(" pictures   planned s   worked off s   pictures/s   sheet s   parts   driver's MiB: at 5%   100%   highest")
    print(
        f"{total:9,}   {planned - started:9.1f}   {drawn - planned:12.1f}   {total / (drawn - planned):10.0f}   "
        f"{ended - drawn:7.1f}   {parts:5}   {run.memory[0]:19.0f}   {run.memory[-1]:4.0f}   {max(run.memory):7.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--smoke", action="store_true", help="a small run: tries it all out")
    arguments = parser.parse_args()
    measure(960 if arguments.smoke else arguments.pictures)


if __name__ == "__main__":
    main()
