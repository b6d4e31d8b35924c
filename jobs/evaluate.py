"""Measure stores of personalized objects: draw a list of prompts, score the pictures, show the trade.

Usage: ``python jobs/evaluate.py --store paper=URL --store objdrive=URL --base-alone --gallery FILE --out FOLDER``,
or the same behind ``ray job submit --``.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import ray
from transformers.utils.logging import disable_progress_bar

from jobs.cluster import connect
from jobs.command import absolute, absolute_model, add_base_options, exit_status, number, positive
from jobs.drawing import PlannedBase, Pool
from jobs.evaluation.compose import PROMPTS
from jobs.evaluation.pages import PICTURES_FILE, REPORT_FILE, SCORES_FILE, write_pages
from jobs.evaluation.pictures import (
    BASE_METHOD,
    CONTROLS,
    DrawingSettings,
    control_pictures,
    draw,
    find_artifacts,
    measured_by,
    plan_drawing,
    read_reference,
)
from jobs.evaluation.scoring import Scorer, by_chance, check_gallery, score
from jobs.progress import WaitLines
from jobs.room import WorkersRequest, find_workers
from objdrive.base.stable_diffusion import Base
from objdrive.errors import ObjdriveError
from objdrive.evaluation.encoders import load_encoder
from objdrive.evaluation.prompts import EvaluationPrompt, read_prompts
from objdrive.evaluation.reference import Reference
from objdrive.training.recipe import make_recipe

ENCODERS = ("imagenet", "clip")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; the exit status."""
    options = _parser().parse_args(arguments)
    disable_progress_bar()
    try:
        return exit_status(lambda: _evaluate(options))
    finally:
        ray.shutdown()


def _evaluate(options: argparse.Namespace) -> None:
    stores = _stores(options.store)
    prompts = read_prompts(options.prompts)
    base = Base.load(options.base, clip=options.clip, vae=options.vae, device="cpu")
    artifacts = find_artifacts(stores, base.fingerprint)
    references = [read_reference(artifact, base.resolution) for artifact in measured_by(artifacts)]
    recipe = make_recipe(tuning=base.files.tuning)
    names = options.encoder or ENCODERS
    _look_ahead(names, references, prompts, options)
    drawing = DrawingSettings(
        PlannedBase(options.base, options.clip, base.fingerprint, options.vae),
        options.steps or recipe.sample_steps,
        options.guidance_scale or recipe.guidance_scale,
    )
    request = WorkersRequest.of(str(options.workers) if options.workers else None, options.gpus_per_worker)
    connect()
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    workers = find_workers(request, WaitLines())
    pool = Pool(workers.most, workers.gpus)
    rows = plan_drawing(stores, artifacts, prompts, seeds=options.seeds, base_alone=options.base_alone)
    controls = control_pictures(references, prompts, options.gallery) if options.controls else []
    options.out.mkdir(parents=True, exist_ok=True)
    pictures, scores = options.out / PICTURES_FILE, options.out / SCORES_FILE
    draw(rows, controls, drawing, pool, pictures)
    scorers = [Scorer(name, options.base, options.clip, base.fingerprint) for name in names]
    score(pictures, scorers, references, prompts, options.gallery, pool, scores)
    facts = _facts(stores, drawing, references, prompts, options)
    write_pages(
        options.out,
        pictures,
        scores,
        prompts,
        title="objdrive: fidelity and generalization",
        facts=facts,
        shown=options.grids,
    )
    print(f"{len(rows) + len(controls)} pictures of {len(references)} objects: {options.out / REPORT_FILE}")


def _look_ahead(
    names: Sequence[str],
    references: Sequence[Reference],
    prompts: Sequence[EvaluationPrompt],
    options: argparse.Namespace,
) -> None:
    """Find out what cannot be measured before anything is drawn."""
    for name in names:
        load_encoder(name, base=options.base, clip=options.clip)
    if options.gallery:
        check_gallery(options.gallery, [one.object_id for one in references], [prompt.id for prompt in prompts])


def _stores(named: Sequence[str]) -> dict[str, str]:
    stores: dict[str, str] = {}
    for one in named:
        name, equals, url = one.partition("=")
        if not equals or not name or name in stores or name in (BASE_METHOD, *CONTROLS):
            taken = ", ".join((BASE_METHOD, *CONTROLS, *stores))
            raise ObjdriveError(f"--store {one}: give NAME=URL, with a name of its own that is none of {taken}")
        stores[name] = absolute(url)
    return stores


def _encoder(name: str) -> str:
    """An encoder's name, its folder as workers find it."""
    kind, colon, source = name.partition(":")
    return f"{kind}:{absolute_model(source)}" if colon else name


def _facts(
    stores: Mapping[str, str],
    drawing: DrawingSettings,
    references: Sequence[Reference],
    prompts: Sequence[EvaluationPrompt],
    options: argparse.Namespace,
) -> list[tuple[str, str]]:
    ids = [one.object_id for one in references]
    chance = [("identity in its class by chance", f"{by_chance(options.gallery, ids):.3f}")] if options.gallery else []
    return [
        *((f"method {name}", url) for name, url in stores.items()),
        ("base", f"{drawing.base.name}, {drawing.base.fingerprint}"),
        ("drawn", f"{len(references)} objects, {len(prompts)} prompts, {options.seeds} seeds, {drawing.steps} steps, "
                  f"guidance {drawing.guidance_scale:g}"),
        *chance,
        ("intervals", "95%, bootstrap over objects"),
    ]  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="append", required=True, metavar="NAME=URL",
                        help="a method's name and the store with its artifacts; again for each method; an object's "
                        "reference is its photo in the first that has it")  # fmt: skip
    parser.add_argument("--base-alone", action="store_true", help="also draw by the base with the class word")
    parser.add_argument("--controls", action="store_true",
                        help="also score input photos and composed scenes, which calibrate the ruler")  # fmt: skip
    add_base_options(parser)
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="YAML list of prompts (the shipped one)")
    parser.add_argument("--gallery", type=Path, help="Parquet table of designs to tell objects from")
    parser.add_argument("--encoder", action="append", type=_encoder, metavar="NAME",
                        help="clip, clip:ID, dino:ID or imagenet; again for each (imagenet and clip)")  # fmt: skip
    parser.add_argument("--seeds", type=positive, default=2, help="pictures of each object and prompt (2)")
    parser.add_argument("--steps", type=positive, help="DDIM steps per picture (default: the base's)")
    parser.add_argument(
        "--guidance-scale", type=partial(number, least=1.0), help="of classifier-free guidance (default: the base's)"
    )
    parser.add_argument("--grids", type=positive, default=12, help="objects whose pictures the page shows (12)")
    parser.add_argument("--workers", type=positive, help="processes that draw and score (one per GPU, or per core)")
    parser.add_argument(
        "--gpus-per-worker",
        type=number,
        metavar="G",
        help="wait for a cluster that has them (default: 1 if the cluster has any)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, plots and page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
