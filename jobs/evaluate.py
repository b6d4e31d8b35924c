"""Measure stores of personalized objects: draw a list of prompts, score the pictures, show the trade.

Usage: ``python jobs/evaluate.py --store paper=URL --store objdrive=URL --base-alone --gallery FILE --out FOLDER``,
or the same behind ``ray job submit --``.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from transformers.utils.logging import disable_progress_bar

from jobs.cluster import choose_workers, connect
from jobs.command import absolute, add_base_options, exit_status
from jobs.evaluation.compose import PROMPTS
from jobs.evaluation.pages import PICTURES_FILE, REPORT_FILE, SCORES_FILE, write_pages
from jobs.evaluation.pictures import (
    BASE_ALONE,
    CONTROLS,
    Drawing,
    Pool,
    control_pictures,
    draw,
    find_artifacts,
    plan_drawing,
    read_reference,
)
from jobs.evaluation.scoring import Scorer, score
from objdrive.base import Base
from objdrive.errors import ObjdriveError
from objdrive.evaluate import EvaluationPrompt, Reference, read_prompts
from objdrive.recipe import make_recipe

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
    base = Base.load(options.base, clip=options.clip, device="cpu")
    artifacts = find_artifacts(stores, base.fingerprint)
    objects = {one: artifact for of_method in artifacts.values() for one, artifact in of_method.items()}
    references = [read_reference(artifact, base.resolution) for _, artifact in sorted(objects.items())]
    recipe = make_recipe(tuning=base.files.tuning)
    drawing = Drawing(
        options.base,
        options.clip,
        base.fingerprint,
        options.steps or recipe.sample_steps,
        options.guidance_scale or recipe.guidance_scale,
    )
    connect()
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    workers = choose_workers(str(options.workers) if options.workers else None, None)
    pool = Pool(workers.most, workers.gpus)
    rows = plan_drawing(stores, artifacts, prompts, seeds=options.seeds, base_alone=options.base_alone)
    controls = control_pictures(references, prompts, options.gallery) if options.controls else []
    options.out.mkdir(parents=True, exist_ok=True)
    pictures, scores = options.out / PICTURES_FILE, options.out / SCORES_FILE
    draw(rows, controls, drawing, pool, pictures)
    scorers = [Scorer(name, options.base, options.clip, base.fingerprint) for name in options.encoder or ENCODERS]
    score(pictures, scorers, references, prompts, options.gallery, pool, scores)
    facts = _facts(stores, drawing, references, prompts, options.seeds)
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


def _stores(named: Sequence[str]) -> dict[str, str]:
    stores: dict[str, str] = {}
    for one in named:
        name, equals, url = one.partition("=")
        if not equals or not name or name in stores or name in (BASE_ALONE, *CONTROLS):
            taken = ", ".join((BASE_ALONE, *CONTROLS, *stores))
            raise ObjdriveError(f"--store {one}: give NAME=URL, with a name of its own that is none of {taken}")
        stores[name] = absolute(url)
    return stores


def _facts(
    stores: Mapping[str, str],
    drawing: Drawing,
    references: Sequence[Reference],
    prompts: Sequence[EvaluationPrompt],
    seeds: int,
) -> list[tuple[str, str]]:
    return [
        *((f"method {name}", url) for name, url in stores.items()),
        ("base", f"{drawing.base}, {drawing.fingerprint}"),
        ("drawn", f"{len(references)} objects, {len(prompts)} prompts, {seeds} seeds, {drawing.steps} steps, "
                  f"guidance {drawing.guidance_scale:g}"),
        ("intervals", "95%, bootstrap over objects"),
    ]  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="append", required=True, metavar="NAME=URL",
                        help="a method's name and the store with its artifacts; again for each method")  # fmt: skip
    parser.add_argument("--base-alone", action="store_true", help="also draw by the base with the class word")
    parser.add_argument("--controls", action="store_true",
                        help="also score input photos and composed scenes, which calibrate the ruler")  # fmt: skip
    add_base_options(parser)
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="YAML list of prompts (the shipped one)")
    parser.add_argument("--gallery", type=Path, help="Parquet table of designs to tell objects from")
    parser.add_argument("--encoder", action="append", metavar="NAME",
                        help="clip, clip:ID, dino:ID or imagenet; again for each (imagenet and clip)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each object and prompt (2)")
    parser.add_argument("--steps", type=int, help="of DDIM (what suits the base)")
    parser.add_argument("--guidance-scale", type=float, help="(what suits the base)")
    parser.add_argument("--grids", type=int, default=12, help="objects whose pictures the page shows (12)")
    parser.add_argument("--workers", type=int, help="processes that draw and score (one per GPU, or per core)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for tables, plots and page, which all nodes see"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
