"""Turn every row of a manifest into an adapter: read, check, fan out, commit, report.

Usage: ``python jobs/batch_personalize.py MANIFEST --store URL``, or the same behind ``ray job submit --``.
"""

import argparse
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

import fsspec
import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem

from jobs.fanout import Lost, Task, Workers, fan_out
from jobs.finetune import FineTuneSettings, RowOutcome
from jobs.ingest import Checked, Target, ingest
from jobs.ledger import REJECTS_FILE, RESULTS_FILE, Ledger
from jobs.plan import plan
from jobs.progress import Progress, Standing
from objdrive.base import BaseFiles, find_base
from objdrive.errors import ObjdriveError
from objdrive.manifest import Piece, Reject, pieces
from objdrive.recipe import PRESETS, Recipe, make_recipe
from objdrive.report import Failure, Picture, Report, ReportedObject, render
from objdrive.store import ArtifactStore

REPORT_FILE = "report.html"
_REPORTED_OBJECTS = 200
_REPORTED_FAILURES = 1000
_DEFAULT_STALL_SECONDS = 600.0
_EXIT_OK, _EXIT_UNUSABLE, _EXIT_ROWS_LOST = 0, 2, 3
_OBJECT_STORE_BYTES = 512 * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except ObjdriveError as error:
        print(f"objdrive: {error}", file=sys.stderr)
        return _EXIT_UNUSABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="batch_personalize.py",
        description="Turn every row of a manifest into an adapter.",
        epilog="Exit status: 0 every row is in the store, 3 rows were rejected or failed, 2 nothing could start.",
    )
    parser.add_argument(
        "manifest",
        help="Parquet, CSV or JSON Lines: a file, a folder or a quoted glob, at any fsspec address",
    )
    parser.add_argument(
        "--store", default="objdrive-store", help="where artifacts go, any fsspec address (%(default)s)"
    )
    parser.add_argument("--base", default="tiny64", help="embedded base, folder or hub id (%(default)s)")
    parser.add_argument("--clip", help="folder or hub id of the CLIP with the image tower, for bases without one")
    parser.add_argument("--recipe", default="objdrive", help=f"YAML file or preset: {', '.join(PRESETS)} (%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the recipe"
    )
    parser.add_argument(
        "--group-size", type=_positive, metavar="K", help="scenes per forward pass (default: what fits)"
    )
    parser.add_argument(
        "--workers", metavar="MIN[:MAX]", help="Ray Train workers (default: one per GPU, else per core)"
    )
    parser.add_argument("--gpus-per-worker", type=float, metavar="G", help="(default: 1 if the cluster has any)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows")
    parser.add_argument("--previews", type=int, default=_REPORTED_OBJECTS, metavar="N",
                        help="draw pictures for the first N objects (%(default)s)")  # fmt: skip
    parser.add_argument("--stall-seconds", type=float, default=_DEFAULT_STALL_SECONDS, metavar="S",
                        help="replace a worker that shows no progress for so long (%(default)s)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check every row, train and write nothing")
    parser.add_argument(
        "--allow-rejects", action="store_true", help="exit with 0 although rows were rejected or failed"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _run(arguments: argparse.Namespace) -> int:
    manifest_pieces = pieces(_absolute(arguments.manifest))
    base = find_base(_absolute_folder(arguments.base), clip=_absolute_folder(arguments.clip))
    recipe = make_recipe(arguments.recipe, tuning=base.tuning, overrides=arguments.set)
    store = ArtifactStore(_shared(_absolute(arguments.store)))
    target = Target(store.url, recipe.digest, base.fingerprint())
    _connect()
    workers = _workers(arguments)
    started = time.monotonic()
    with closing(Ledger()) as ledger:
        run = _BatchRun(arguments, manifest_pieces, base, recipe, target, workers, ledger)
        run.work_off()
        seconds = time.monotonic() - started
        if not arguments.dry_run:
            ledger.write(store, run.id)
            store.write_run_file(run.id, REPORT_FILE, _report(run, store, seconds).encode())
        _print_summary(run, store, seconds)
        lost = ledger.counts["rejected"] + ledger.counts["failed"]
    return _EXIT_ROWS_LOST if lost and not arguments.allow_rejects else _EXIT_OK


class _BatchRun:
    """One run of the job: rows become tasks, tasks become outcomes, and the ledger knows of all of them."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        manifest_pieces: list[Piece],
        base: BaseFiles,
        recipe: Recipe,
        target: Target,
        workers: Workers,
        ledger: Ledger,
    ) -> None:
        self.id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
        self.arguments = arguments
        self.base = base
        self.recipe = recipe
        self.ledger = ledger
        self._pieces = manifest_pieces
        self._target = target
        self._workers = workers
        self._known = 0
        self._read = False

    def work_off(self) -> None:
        """Work the manifest off; on a dry run, only plan it."""
        ledger = self.ledger
        tasks = plan(
            self._records(),
            previews=self.arguments.previews,
            on_reject=ledger.reject,
            on_committed=ledger.committed_before,
            on_repeat=ledger.repeated,
        )
        with Progress(self._standing):
            if self.arguments.dry_run:
                for task in tasks:
                    ledger.counts["to train"] += len(task.payload.rows)
            # Starting workers takes a while: not for a manifest that is committed already.
            elif (first := next(tasks, None)) is not None:
                self._fan_out(chain([first], tasks))

    def _records(self) -> Iterator[Checked | Reject]:
        for record in islice(ingest(self._pieces, self._target), self.arguments.limit):
            self._known += 1
            yield record
        self._read = True

    def _fan_out(self, tasks: Iterator[Task]) -> None:
        arguments, workers = self.arguments, self._workers
        settings = FineTuneSettings(
            base=_absolute_folder(arguments.base),
            clip=_absolute_folder(arguments.clip),
            recipe=self.recipe,
            target=self._target,
            group_size=arguments.group_size,
            threads=None if workers.gpus else 1,
        )
        filesystem, root = fsspec.url_to_fs(self._target.store_url)
        folder = f"{root}/runs/{self.id}/train"
        try:
            fan_out(
                tasks,
                settings,
                workers=workers,
                on_outcome=self._on_outcome,
                storage=(PyFileSystem(FSSpecHandler(filesystem)), folder),
                stall_seconds=arguments.stall_seconds,
                window=max(256, 64 * workers.most),
            )
        finally:
            if filesystem.exists(folder):
                filesystem.rm(folder, recursive=True)

    def _on_outcome(self, task: Task, outcome: Any) -> None:
        rows = task.payload.rows
        if isinstance(outcome, Lost):
            outcome = [RowOutcome("failed", code="worker_lost", message=outcome.message)] * len(rows)
        for record, one in zip(rows, outcome, strict=True):
            self.ledger.outcome(record, one)

    def _standing(self) -> Standing:
        counts = self.ledger.counts
        failed = counts["rejected"] + counts["failed"]
        return Standing(
            done=counts.total() - failed,
            failed=failed,
            known=self._known,
            total=self._known if self._read else None,
            trained=counts["committed"],
        )


def _connect() -> None:
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level="ERROR")
        return
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=_OBJECT_STORE_BYTES,
    )


def _workers(arguments: argparse.Namespace) -> Workers:
    resources = ray.cluster_resources()
    gpus = arguments.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if resources.get("GPU") else 0.0
    if gpus > resources.get("GPU", 0.0):
        raise ObjdriveError(f"--gpus-per-worker {gpus:g}: the cluster has {resources.get('GPU', 0.0):g} GPU(s)")
    room = resources["GPU"] / gpus if gpus else resources["CPU"]
    if arguments.workers is None:
        count = max(1, math.floor(room))
        return Workers(count, count, gpus)
    least, colon, most = arguments.workers.partition(":")
    try:
        workers = Workers(int(least), int(most) if colon else int(least), gpus)
    except ValueError:
        raise ObjdriveError(f"--workers {arguments.workers}: give a number, or MIN:MAX") from None
    if not 1 <= workers.least <= workers.most:
        raise ObjdriveError(f"--workers {arguments.workers}: MIN must be at least 1 and at most MAX")
    return workers


def _absolute(address: str) -> str:
    # Workers run in folders of their own.
    return address if "://" in address else str(Path(address).absolute())


def _absolute_folder(name: str | None) -> Any:
    return str(Path(name).absolute()) if name and os.sep in name and Path(name).is_dir() else name


def _shared(address: str) -> str:
    if address.startswith("memory:"):
        raise ObjdriveError(f"--store {address}: memory is not shared between processes; name a folder or a bucket")
    return address


def _report(run: _BatchRun, store: ArtifactStore, seconds: float) -> str:
    ledger = run.ledger
    objects = []
    for line in ledger.results(_REPORTED_OBJECTS):
        artifact = store.metadata(line["object_id"], line["digest"]) if line["digest"] else None
        pictures = (
            [Picture(p.caption, store.read_file(artifact, p.file)) for p in artifact.previews] if artifact else []
        )
        objects.append(
            ReportedObject(
                line["object_id"],
                line["class_name"],
                line["status"],
                line["digest"],
                line["warning"],
                pictures,
            )
        )
    facts = [
        ("manifest", run.arguments.manifest),
        ("store", store.url),
        ("base", f"{run.base.name}"),
        ("recipe", f"{run.recipe.preset}, {run.recipe.steps} steps"),
        ("run", f"{run.id}, {seconds:.0f} s"),
    ]
    failures = [Failure(**line) for line in ledger.rejects(_REPORTED_FAILURES)]
    return render(Report("objdrive: what came out", facts, _counts(ledger), objects, failures))


def _counts(ledger: Ledger) -> dict[str, int]:
    names = ("to train", "committed", "already", "repeated", "rejected", "failed")
    return {name: ledger.counts[name] for name in names if ledger.counts[name]} or {"rows": 0}


def _print_summary(run: _BatchRun, store: ArtifactStore, seconds: float) -> None:
    ledger = run.ledger
    counts = ", ".join(f"{count} {name}" for name, count in _counts(ledger).items())
    print(f"\n{ledger.counts.total()} rows in {seconds:.0f} s: {counts}")
    if ledger.counts["committed"]:
        print(f"throughput  {ledger.counts['committed'] / seconds * 60:.1f} objects a minute")
    if ledger.warned:
        print(f"warnings    {ledger.warned} rows, see the column warning in {RESULTS_FILE}")
    for code, count in ledger.reasons.most_common():
        print(f"  {count} x {code}")
    for line in ledger.rejects(5):
        print(f"  {line['where']} ({line['object_id']}): {line['message']}")
    if run.arguments.dry_run:
        print("dry run: nothing was trained or written")
        return
    for name, file in (("results", RESULTS_FILE), ("rejects", REJECTS_FILE), ("report", REPORT_FILE)):
        print(f"{name:11} {store.run_path(run.id, file)}")
    print(f"store       {store.url}")


if __name__ == "__main__":
    sys.exit(main())
