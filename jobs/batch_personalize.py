"""Turn every row of a manifest into an adapter: read, check, fan out, commit, report.

Usage: ``python jobs/batch_personalize.py MANIFEST --store URL``, or the same behind ``ray job submit --``.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from jobs.cluster import connect
from jobs.command import absolute, add_base_options, number, positive
from jobs.ingest import Target
from jobs.interrupts import Interrupted, interruptible
from jobs.ledger import REJECTS_FILE, Ledger
from jobs.metrics import RunMetrics
from jobs.progress import Standing
from jobs.prompt_lengths import PromptLengths
from jobs.room import WorkersRequest
from jobs.run import BatchRun, new_run_id
from jobs.settings import FineTuneSettings
from jobs.worker import make_fine_tune
from objdrive.adapters.index import compact
from objdrive.adapters.store import RESULTS_FILE, ArtifactStore
from objdrive.base.files import find_base
from objdrive.catalog.addresses import unsigned
from objdrive.catalog.manifest import pieces
from objdrive.errors import ObjdriveError
from objdrive.evaluation.report import CaptionedPicture, Failure, Report, ReportedObject, render
from objdrive.training.recipe import PRESETS, Recipe, make_recipe

REPORT_FILE = "report.html"
_REPORTED_OBJECTS = 200
_REPORTED_FAILURES = 1000
_DEFAULT_STALL_SECONDS = 600.0
_EXIT_OK, _EXIT_UNUSABLE, _EXIT_ROWS_LOST = 0, 2, 3


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
        epilog="Exit status: 0 every row is in the store, 3 rows were rejected or failed, "
        "2 the run could not start or broke off, 130 or 143 it was interrupted.",
    )
    parser.add_argument(
        "manifest",
        help="Parquet, CSV or JSON Lines: a file, a folder or a quoted glob, at any fsspec address",
    )
    parser.add_argument(
        "--store", default="objdrive-store", help="where artifacts go, any fsspec address (%(default)s)"
    )
    add_base_options(parser)
    parser.add_argument("--recipe", default="objdrive", help=f"YAML file or preset: {', '.join(PRESETS)} (%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the recipe"
    )
    parser.add_argument("--group-size", type=positive, metavar="K", help="scenes per forward pass (default: what fits)")
    parser.add_argument(
        "--workers", metavar="MIN[:MAX]", help="Ray Train workers (default: one per GPU, else per core)"
    )
    parser.add_argument("--gpus-per-worker", type=number, metavar="G",
                        help="wait for a cluster that has them (default: 1 if the cluster has any)")  # fmt: skip
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N rows")
    parser.add_argument("--previews", type=int, default=_REPORTED_OBJECTS, metavar="N",
                        help="draw pictures for the first N objects (%(default)s)")  # fmt: skip
    parser.add_argument(
        "--stall-seconds", type=partial(number, least=2.0), default=_DEFAULT_STALL_SECONDS, metavar="S",
        help="replace a worker that shows no progress for so long (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-hosts", type=_hosts, default=(), metavar="HOST,...",
        help="the only hosts that pictures are fetched from by HTTP, such as *.shop.example "
        "(default: all but link-local and metadata addresses)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check every row, train and write nothing")
    parser.add_argument(
        "--allow-rejects", action="store_true", help="exit with 0 although rows were rejected or failed"
    )
    return parser


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(host.strip() for host in text.split(","))
    if not all(hosts) or any(set("/@?# ") & set(host) for host in hosts):
        raise argparse.ArgumentTypeError(f"must be hosts, with commas between, without http:// or paths, got {text!r}")
    return hosts


def _run(arguments: argparse.Namespace) -> int:
    manifest_pieces = pieces(absolute(arguments.manifest))
    for note in (note for piece in manifest_pieces for note in piece.notes):
        print(f"note        {note}")
    request = WorkersRequest.of(arguments.workers, arguments.gpus_per_worker)
    base = find_base(arguments.base, clip=arguments.clip, vae=arguments.vae)
    request = replace(request, memory=base.worker_bytes)
    recipe = make_recipe(arguments.recipe, tuning=base.tuning, overrides=arguments.set)
    store = ArtifactStore(_shared(absolute(arguments.store)))
    target = Target(store.url, recipe.digest, base.fingerprint(), arguments.allow_hosts)
    connect()
    started = time.monotonic()
    interrupted: Interrupted | None = None
    metrics = RunMetrics(new_run_id())
    with closing(Ledger(metrics.row)) as ledger:
        run = BatchRun(
            manifest_pieces,
            target,
            partial(make_fine_tune, _settings(arguments, recipe, target)),
            request,
            ledger,
            metrics,
            prompt_fault=PromptLengths(base, recipe).fault,
            limit=arguments.limit,
            previews=arguments.previews,
            stall_seconds=arguments.stall_seconds,
        )
        if arguments.dry_run:
            run.plan_only()
            _print_summary(run, store, time.monotonic() - started, dry=True)
        else:
            try:
                with interruptible():
                    run.work_off()
            except Interrupted as interrupt:
                interrupted = interrupt
                print(f"\n{_interruption(run.standing(), ledger)}", flush=True)
            finally:
                # However a run ends, what became of its rows until then is told.
                seconds = time.monotonic() - started
                ledger.write(store, run.id)
                facts = [("manifest", unsigned(arguments.manifest)), ("base", base.name), ("recipe", _describe(recipe))]
                store.write_run_file(run.id, REPORT_FILE, _report(run, store, facts, seconds).encode())
                _print_summary(run, store, seconds, dry=False)
                _keep_index(store)
        lost = ledger.counts["rejected"] + ledger.counts["failed"]
    if interrupted is not None:
        return interrupted.exit_status
    return _EXIT_ROWS_LOST if lost and not arguments.allow_rejects else _EXIT_OK


def _keep_index(store: ArtifactStore) -> None:
    """Bring the index that servers read up to date; the run is complete without it."""
    try:
        compact(store)
    # Whatever it is, such as SQLite's own errors on a full disk.
    except Exception as error:
        print(f"the catalog's index stays as it was, and the next run brings it up to date: {error}", flush=True)


def _interruption(standing: Standing, ledger: Ledger) -> str:
    left = f"{standing.left} left" + ("" if standing.total is not None else " of those read so far")
    return f"interrupted: {ledger.counts['committed']} committed, {left}; run the same command to go on"


def _shared(address: str) -> str:
    if address.startswith("memory:"):
        raise ObjdriveError(f"--store {address}: memory is not shared between processes; name a folder or a bucket")
    return address


def _settings(arguments: argparse.Namespace, recipe: Recipe, target: Target) -> FineTuneSettings:
    return FineTuneSettings(
        base=arguments.base,
        clip=arguments.clip,
        recipe=recipe,
        target=target,
        group_size=arguments.group_size,
        cpu_threads=1,
        vae=arguments.vae,
    )


def _describe(recipe: Recipe) -> str:
    return f"{recipe.preset}, {recipe.steps} steps, digest {recipe.digest}"


def _report(run: BatchRun, store: ArtifactStore, facts: list[tuple[str, str]], seconds: float) -> str:
    ledger = run.ledger
    objects = []
    for line in ledger.results(_REPORTED_OBJECTS):
        warning, pictures = line["warning"], []
        try:
            pictures = _previews(store, line["object_id"], line["digest"])
        except ObjdriveError as error:
            warning = f"{warning} its previews can't be shown: {error}".strip()
        objects.append(
            ReportedObject(line["object_id"], line["class_name"], line["status"], line["digest"], warning, pictures)
        )
    facts = [*facts, ("store", store.url), ("run", f"{run.id}, {seconds:.0f} s")]
    failures = [Failure(**line) for line in ledger.rejects(_REPORTED_FAILURES)]
    return render(Report("objdrive: what came out", facts, _counts(ledger), objects, failures))


def _previews(store: ArtifactStore, object_id: str, digest: str) -> list[CaptionedPicture]:
    artifact = store.metadata(object_id, digest) if digest else None
    if artifact is None:
        return []
    return [CaptionedPicture(preview.caption, store.read_file(artifact, preview.file)) for preview in artifact.previews]


def _counts(ledger: Ledger) -> dict[str, int]:
    names = ("to train", "committed", "already", "repeated", "rejected", "failed")
    return {name: ledger.counts[name] for name in names if ledger.counts[name]} or {"rows": 0}


def _print_summary(run: BatchRun, store: ArtifactStore, seconds: float, *, dry: bool) -> None:
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
    if dry:
        print("dry run: nothing was trained or written")
        return
    for name, file in (("results", RESULTS_FILE), ("rejects", REJECTS_FILE), ("report", REPORT_FILE)):
        print(f"{name:11} {store.run_path(run.id, file)}")
    print(f"store       {store.url}")


if __name__ == "__main__":
    sys.exit(main())
