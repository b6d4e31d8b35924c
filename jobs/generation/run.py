"""One run: a plan of pictures, drawn wave by wave, each picture in the index or in the faults."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError
from tqdm import tqdm

from jobs.drawing import Pool
from jobs.generation.draw import DrawBlock, blocks
from jobs.generation.index import SCHEMA, IndexWriter, drop_repeated, indexed_keys
from jobs.generation.objects import Selection
from jobs.generation.plan import Plan
from jobs.generation.scores import SCORES
from jobs.progress import Progress, Standing
from jobs.room import WorkersRequest, describe, find_workers
from objdrive.adapters.storage import Files
from objdrive.adapters.store import ArtifactStore
from objdrive.catalog.addresses import unsigned
from objdrive.errors import ObjdriveError

_ROWS_PER_BLOCK = 64
_LEAST_BLOCKS_PER_WORKER = 4
_WAVE_ROWS = 16_384
_WAVE_ROWS_PER_WORKER = 2_048


class GenerationRun:
    """One run.

    Args:
        plan: told of every picture.
        files: where pictures and index go.
        run_id: names the run's parts of the index.
        make_worker: the class of Ray Data's workers: see `jobs.generation.draw.DrawBlock`.
    """

    def __init__(self, plan: Plan, files: Files, run_id: str, *, make_worker: Callable[..., Any] = DrawBlock) -> None:
        self.plan = plan
        self.id = run_id
        self._files = files
        self._index = IndexWriter(files, run_id)
        self._make_worker = make_worker
        self._planned = False
        self._waiting = ""

    def find(self, selection: Selection, store: ArtifactStore) -> None:
        """Plan all pictures of the objects; those in the index already need not be drawn.

        Raises:
            ObjdriveError: the store can't be listed, or the index can't be read.
        """
        with Progress(self.standing):
            for keys in indexed_keys(self._files):
                self.plan.know(keys)
            for object_id, artifact in selection.artifacts(store):
                self.plan.add(object_id, artifact)
            self._planned = True

    def work_off(self, request: WorkersRequest) -> None:
        """Have every planned picture at its address and in the index, or among the faults.

        Raises:
            ObjdriveError: workers can't start, or broke off; or the index can't be written.
        """
        try:
            if self.plan.counts["to draw"]:
                self._draw(request)
        finally:
            # Where this fails nothing is dropped: older rows are all that there is.
            self._index.flush()
            if self.plan.has_repeated():
                drop_repeated(self._files, self.plan.stays)

    def _draw(self, request: WorkersRequest) -> None:
        with Progress(self.standing):
            workers = find_workers(request, self._on_wait)
            tqdm.write(f"workers     {describe(workers)}")
            pool = Pool(workers.most, workers.gpus)
            try:
                for block in self._waves(pool):
                    for outcome in self._drawn(block, pool):
                        self._note(outcome)
            except RayError as error:
                raise ObjdriveError(f"the workers broke off: {_cause(error)}") from error

    def standing(self) -> Standing:
        """How far the run is."""
        counts = self.plan.counts
        made = counts["drawn"] + counts["found"]
        known = counts["already"] + counts["to draw"] + made + counts["failed"]
        return Standing(
            done=counts["already"] + made,
            failed=counts["failed"],
            known=known,
            total=known if self._planned else None,
            trained=made,
            waiting=self._waiting,
            things="pictures",
            source="store",
        )

    def _waves(self, pool: Pool) -> Iterator[list[pa.Table | bytes]]:
        """Blocks to draw at once. Ray Data takes its input as a whole, so that not all of it may be input."""
        most = max(_WAVE_ROWS, _WAVE_ROWS_PER_WORKER * pool.workers)
        least = self.plan.counts["to draw"] // (_LEAST_BLOCKS_PER_WORKER * pool.workers)
        after = 0
        while rows := self.plan.to_draw(after, most):
            after = rows[-1]["id"]
            yield list(blocks(rows, max(1, min(least, _ROWS_PER_BLOCK))))

    def _drawn(self, wave: list[pa.Table | bytes], pool: Pool) -> Iterator[Mapping[str, Any]]:
        drawn = ray.data.from_arrow(wave).map_batches(
            self._make_worker, fn_constructor_args=(self.plan.settings, pool), **pool.options(len(wave))
        )
        tables: Iterator[Any] = iter(drawn.iter_batches(batch_size=None, batch_format="pyarrow"))
        return itertools.chain.from_iterable(table.to_pylist() for table in tables)

    def _note(self, outcome: Mapping[str, Any]) -> None:
        row = dict(outcome)
        if row["status"] == "failed":
            self.plan.failed(row)
            return
        scored = row[SCORES[0]] is not None
        # A picture that is found, and has no scores again, is in the index as it is.
        if scored or row["status"] == "drawn" or not self.plan.knows(row["key"]):
            address = unsigned(f"{self._files.url}/{row['path']}")
            self._index.add({name: row[name] for name in SCHEMA.names if name != "address"} | {"address": address})
            self.plan.know([(row["key"], scored)])
        if scored:
            self.plan.scored()
        self.plan.drawn([(row["id"], row["status"])])

    def _on_wait(self, what: str) -> None:
        self._waiting = what


def _cause(error: BaseException) -> str:
    """What a worker's failure says of itself, without the traceback that Ray wraps around it."""
    inner = getattr(error, "cause", None) or error.__cause__
    return _cause(inner) if isinstance(inner, BaseException) else f"{error}".strip().splitlines()[-1]
