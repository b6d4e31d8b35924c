"""One run over a manifest: rows become tasks, tasks become outcomes, and the ledger knows of all of them."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice
from typing import Any

import fsspec
from pyarrow.fs import FSSpecHandler, PyFileSystem
from tqdm import tqdm

from jobs.fanout import Leased, Work, fan_out
from jobs.ingest import Checked, Target, ingest
from jobs.leases import Lost, Task
from jobs.ledger import Ledger
from jobs.metrics import RunMetrics
from jobs.outcomes import fail_row
from jobs.plan import plan
from jobs.progress import Progress, Standing
from jobs.room import WorkersRequest, describe, find_cores, find_workers
from objdrive.adapters.store import ArtifactStore
from objdrive.catalog.manifest import Piece
from objdrive.catalog.rows import Reject
from objdrive.errors import StoreError

_WINDOW_PER_WORKER = 128
"""Tasks: three of the largest groups in a worker's hands, and one before it."""
_LEAST_WINDOW = 256


def window_for(workers: int) -> int:
    """How many tasks are read ahead of the outcomes of so many workers."""
    return max(_LEAST_WINDOW, _WINDOW_PER_WORKER * workers)


def new_run_id() -> str:
    """An id that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


class BatchRun:
    """One run.

    Args:
        pieces: the manifest.
        target: what its rows are turned into.
        make_work: makes what a worker of so many GPUs does with a lease of `jobs.plan.Unit` (see
            `jobs.finetune.FineTune`).
        request: the workers that are wanted. They are looked for when there is work for them.
        ledger: told of every row.
        metrics: told of what is in work; they know the run's id.
        prompt_fault: see `jobs.plan.plan`.
        limit: only so many rows; None: all.
        previews: for how many of the first objects pictures are drawn.
        stall_seconds: see `jobs.fanout.fan_out`.
    """

    def __init__(
        self,
        pieces: list[Piece],
        target: Target,
        make_work: Callable[[float], Work],
        request: WorkersRequest,
        ledger: Ledger,
        metrics: RunMetrics,
        *,
        prompt_fault: Callable[[Sequence[str]], str],
        limit: int | None,
        previews: int,
        stall_seconds: float,
    ) -> None:
        self.id = metrics.run_id
        self.ledger = ledger
        self._pieces = pieces
        self._target = target
        self._store = ArtifactStore(target.store_url)
        self._make_work = make_work
        self._request = request
        self._prompt_fault = prompt_fault
        self._limit = limit
        self._metrics = metrics
        self._previews = previews
        self._stall_seconds = stall_seconds
        self._known = 0
        self._read = False
        self._ended = False
        self._in_work: list[tuple[int, int, int]] = []
        self._last_outcome = 0.0
        self._waiting = ""

    def plan_only(self) -> None:
        """Check every row; count those that `work_off` would train."""
        with Progress(self.standing):
            for task in self._tasks(self.ledger.committed_before):
                self.ledger.counts["to train"] += len(task.payload.rows)

    def work_off(self) -> None:
        """Have every row in the store, or in the ledger with the reason why not."""
        with Progress(self.standing):
            tasks = self._tasks(self._have_current)
            # Starting workers takes a while: not for a manifest that is committed already.
            first = next(tasks, None)
            if first is not None:
                try:
                    self._fan_out(chain([first], tasks))
                finally:
                    self._ended = True

    def _tasks(self, on_committed: Callable[[Checked], None]) -> Iterator[Task]:
        return plan(
            self._records(),
            previews=self._previews,
            prompt_fault=self._prompt_fault,
            on_reject=self.ledger.reject,
            on_committed=on_committed,
            on_repeat=self.ledger.repeated,
        )

    def _have_current(self, record: Checked) -> None:
        """What the row asks for is committed; see that it is also what is served."""
        row = record.row
        try:
            if record.outdated:
                self._store.point(row.object_id, record.digest)
        except StoreError as error:
            self.ledger.reject(Reject(row.object_id, row.where, "store_failed", f"{row.where}: {error}"))
        else:
            self.ledger.committed_before(record)

    def _records(self) -> Iterator[Checked | Reject]:
        records = ingest(self._pieces, self._target, cores=find_cores(self._on_wait))
        for record in islice(records, self._limit):
            # A reader that outlives its run must not write into a ledger that is being read.
            if self._ended:
                return
            self._known += 1
            self._metrics.read_row()
            yield record
        self._read = True

    def _fan_out(self, tasks: Iterator[Task]) -> None:
        workers = find_workers(self._request, self._on_wait)
        tqdm.write(f"workers     {describe(workers)}")
        filesystem, root = fsspec.url_to_fs(self._target.store_url)
        folder = f"{root}/runs/{self.id}/train"
        self._last_outcome = time.time()
        try:
            fan_out(
                tasks,
                partial(self._make_work, workers.gpus),
                workers=workers,
                on_outcome=self._on_outcome,
                on_progress=self._on_progress,
                on_events=self._metrics.happened,
                # pyarrow's stubs call every handler abstract.
                storage=(PyFileSystem(FSSpecHandler(filesystem)), folder),  # type: ignore[abstract]
                stall_seconds=self._stall_seconds,
                window=window_for(workers.most),
            )
        finally:
            if filesystem.exists(folder):
                filesystem.rm(folder, recursive=True)

    def _on_wait(self, what: str) -> None:
        self._waiting = what

    def _on_progress(self, leased: Sequence[Leased]) -> None:
        self._in_work = [(sum(len(task.payload.rows) for task in one.tasks), one.done, one.of) for one in leased]
        self._metrics.working(len(leased), sum(rows for rows, _, _ in self._in_work), self._last_outcome)

    def _on_outcome(self, task: Task, outcome: Any) -> None:
        rows = task.payload.rows
        if isinstance(outcome, Lost):
            outcome = [fail_row(record, "worker_lost", outcome.message) for record in rows]
        for record, one in zip(rows, outcome, strict=True):
            self.ledger.outcome(record, one)
            if "seconds" in one.metrics:
                self._metrics.object_seconds(one.metrics["seconds"])
        self._last_outcome = time.time()

    def standing(self) -> Standing:
        """How far the run is."""
        counts = self.ledger.counts
        failed = counts["rejected"] + counts["failed"]
        working = sum(rows for rows, _, _ in self._in_work)
        steps = max((of for _, _, of in self._in_work), default=0)
        shares = sum(rows * done / of for rows, done, of in self._in_work if of)
        return Standing(
            done=counts.total() - failed,
            failed=failed,
            known=self._known,
            total=self._known if self._read else None,
            trained=counts["committed"],
            working=working,
            step=steps * shares / working if working else 0.0,
            steps=steps,
            waiting=self._waiting,
        )
