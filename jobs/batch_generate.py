"""Draw a catalog's pictures: every object of a store by every prompt of a list, as files with an index.

Usage: ``python jobs/batch_generate.py STORE --prompts FILE --out URL``, or the same behind ``ray job submit --``.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from transformers.utils.logging import disable_progress_bar

from jobs.cluster import connect
from jobs.command import absolute, add_base_options, number, positive
from jobs.drawing import PlannedBase
from jobs.generation.objects import Selection
from jobs.generation.plan import Plan
from jobs.generation.prompts import read_prompts
from jobs.generation.run import GenerationRun
from jobs.generation.settings import FORMATS, INDEX, GenerationSettings
from jobs.generation.sheet import FRONT_FILE, REJECTS_FILE, run_file, write_rejects, write_sheet
from jobs.interrupts import Interrupted, interruptible
from jobs.room import WorkersRequest
from jobs.run import new_run_id
from objdrive.adapters.storage import open_files
from objdrive.adapters.store import ArtifactStore
from objdrive.base.files import find_base
from objdrive.base.sizes import parse_size
from objdrive.catalog.addresses import unsigned
from objdrive.errors import ObjdriveError
from objdrive.sampling.exact import Place

_ATTEMPTS = 4
_SHEET_PICTURES = 20_000
_EXIT_OK, _EXIT_UNUSABLE, _EXIT_PICTURES_LOST = 0, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    arguments = _parser().parse_args(argv)
    disable_progress_bar()
    try:
        return _run(arguments)
    except ObjdriveError as error:
        print(f"objdrive: {error}", file=sys.stderr)
        return _EXIT_UNUSABLE
    finally:
        ray.shutdown()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="batch_generate.py",
        description="Draw every object of a store by every prompt of a list.",
        epilog="Exit status: 0 every picture is there, 3 some could not be drawn, "
        "2 the run could not start or broke off, 130 or 143 it was interrupted.",
    )
    parser.add_argument("store", help="where the objects' artifacts are, any fsspec address")
    parser.add_argument(
        "--prompts", type=absolute, required=True, help="YAML list of prompts; {} stands for the object"
    )
    parser.add_argument(
        "--out", type=absolute, required=True, help="where pictures, index and report go, any fsspec address"
    )
    parser.add_argument(
        "--objects",
        default="",
        metavar="WHICH",
        help="ids with commas between, or a manifest (default: all of the store)",
    )
    parser.add_argument(
        "--classes", type=_words, default=(), metavar="WORD,...", help="only objects of these class words"
    )
    parser.add_argument("--n", type=positive, default=1, help="pictures of each object and prompt (%(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="the first picture's seed; the next ones count up")
    parser.add_argument("--size", type=partial(_parsed, parse_size), metavar="WxH",
                        help="of the pictures, in pixels (default: the base's own square)")  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default="webp", help="of the pictures' files (%(default)s)")
    parser.add_argument("--negative-prompt", default="", help="what to lead away from")
    parser.add_argument("--steps", type=positive, help="DDIM steps (default: each object's recipe's)")
    parser.add_argument("--guidance-scale", type=partial(number, least=1.0), help="(default: each object's recipe's)")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="objects keep the pixels of their photos, and the rest is drawn around them",
    )
    parser.add_argument(
        "--place", type=partial(_parsed, Place.parse), metavar="SIZE[@ACROSS,DOWN]",
        help="with --exact: how large the object is and where its middle stands, in parts of the picture "
        "(default: 0.6@0.5,0.6)",
    )  # fmt: skip
    parser.add_argument("--scores", action="store_true", help="measure pictures by the base's CLIP, for the index")
    add_base_options(parser)
    parser.add_argument("--workers", metavar="N", help="processes that draw (default: one per GPU, else per core)")
    parser.add_argument("--gpus-per-worker", type=number, metavar="G",
                        help="wait for a cluster that has them (default: 1 if the cluster has any)")  # fmt: skip
    parser.add_argument("--sheet", type=int, default=_SHEET_PICTURES, metavar="N",
                        help="show the first N pictures on the contact sheet (%(default)s)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="count what there is to draw; draw and write nothing")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ObjdriveError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at most 18 digits, got {text!r}")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.place and not arguments.exact:
        raise ObjdriveError("--place: only an object that keeps its own pixels is placed: give --exact too")
    prompts = read_prompts(arguments.prompts)
    store = ArtifactStore(_shared("STORE", absolute(arguments.store)), must_exist=True)
    files = open_files(_shared("--out", arguments.out), _ATTEMPTS)
    base = find_base(arguments.base, clip=arguments.clip, vae=arguments.vae)
    planned = PlannedBase(arguments.base, arguments.clip, base.fingerprint(), arguments.vae)
    selection = Selection(_address(arguments.objects), arguments.classes, planned.fingerprint)
    # A worker that only draws keeps nothing for a backward pass.
    request = replace(WorkersRequest.of(arguments.workers, arguments.gpus_per_worker), memory=base.worker_bytes // 2)
    place = (arguments.place or Place()) if arguments.exact else None
    settings = GenerationSettings(
        planned,
        store.url,
        files.url,
        arguments.format,
        arguments.negative_prompt,
        # The base's own square is one size, whether it is named or not.
        None if arguments.size == (base.resolution, base.resolution) else arguments.size,
        place,
        arguments.scores,
    )
    seeds = range(arguments.seed, arguments.seed + arguments.n)
    started = time.monotonic()
    interrupted: Interrupted | None = None
    with closing(
        Plan(settings, prompts, seeds, steps=arguments.steps, guidance_scale=arguments.guidance_scale)
    ) as plan:
        run = GenerationRun(plan, files, new_run_id())
        run.find(selection, store)
        _print_plan(plan, store)
        if arguments.dry_run:
            print("dry run: nothing was drawn or written")
            return _status(plan)
        if plan.counts["to draw"]:
            connect()
            ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            with interruptible():
                run.work_off(request)
        except Interrupted as interrupt:
            interrupted = interrupt
            print(f"\n{_interruption(plan)}", flush=True)
        finally:
            # However a run ends, what became of its pictures until then is told.
            seconds = time.monotonic() - started
            facts = [("store", unsigned(store.url)), ("prompts", unsigned(arguments.prompts)), ("base", base.name)]
            facts.append(("run", f"{run.id}, {seconds:.0f} s"))
            write_rejects(files, run.id, plan)
            write_sheet(files, run.id, plan, facts, arguments.sheet)
            _print_summary(plan, files.url, run.id, seconds)
        return interrupted.exit_status if interrupted else _status(plan)


def _address(objects: str) -> str:
    return absolute(objects) if Selection.is_manifest(objects) else objects


def _shared(what: str, address: str) -> str:
    if address.startswith("memory:"):
        raise ObjdriveError(f"{what} {address}: memory is not shared between processes; name a folder or a bucket")
    return address


def _status(plan: Plan) -> int:
    return _EXIT_PICTURES_LOST if plan.counts["failed"] else _EXIT_OK


def _print_plan(plan: Plan, store: ArtifactStore) -> None:
    if not plan.objects and not plan.counts["failed"]:
        raise ObjdriveError(
            f"{store.url} has no such objects: 'objdrive store ls' lists them, and jobs/batch_personalize.py makes them"
        )
    for prompt in plan.idle_prompts():
        print(f"note        the prompt {prompt.id} is for no object here: {', '.join(prompt.classes) or 'all'}")
    counts = plan.counts
    only_score = f" ({plan.to_score:,} of them only to score)" if plan.to_score else ""
    print(
        f"plan        {plan.objects:,} objects, {len(plan.prompts)} prompts: {counts['to draw']:,} pictures to draw"
        f"{only_score}, {counts['already']:,} there already",
        flush=True,
    )


def _interruption(plan: Plan) -> str:
    return f"interrupted: {plan.counts['to draw']:,} pictures left; run the same command to go on"


def _print_summary(plan: Plan, out: str, run_id: str, seconds: float) -> None:
    counts = plan.counts
    names = ("drawn", "found", "scored", "already", "failed")
    told = ", ".join(f"{counts[name]:,} {name}" for name in names if counts[name])
    print(f"\n{told or 'no pictures'} in {seconds:.0f} s")
    if counts["drawn"]:
        print(f"throughput  {counts['drawn'] / seconds * 60:.1f} pictures a minute")
    for code, count in plan.reasons.most_common():
        print(f"  {count} x {code}")
    for one in plan.faults(5):
        print(f"  {one['object_id']} {one['prompt_id'] or ''}: {one['message']}")
    for name, path in (
        ("index", f"{INDEX}/"),
        ("rejects", run_file(run_id, REJECTS_FILE)),
        ("report", run_file(run_id, FRONT_FILE)),
    ):
        print(f"{name:11} {out}/{path}")


if __name__ == "__main__":
    sys.exit(main())
