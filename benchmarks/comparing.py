"""What benchmarks of quality share: fine-tune objects in several ways, draw the same prompts of each, score them."""

import argparse
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from jobs.cluster import connect
from jobs.evaluation.compose import GALLERY_FILE, write_half
from jobs.evaluation.pages import SCORES_FILE
from jobs.evaluation.scoring import read_scores
from jobs.pretrain.sprites import Sprites
from objdrive.adapters.store import ArtifactStore
from objdrive.evaluation.prompts import EvaluationPrompt
from objdrive.evaluation.summary import Figure

JOBS = Path(__file__).resolve().parents[1] / "jobs"
SMOKE_PROMPTS = Path(__file__).resolve().parent / "smoke_prompts.yaml"
DEVELOPMENT, TEST = "development", "test"
SCENES = 5
_ROWS_LOST = 3


@dataclass(frozen=True)
class Contender:
    """One way to fine-tune the objects of a manifest: a preset and its overrides, under a name."""

    name: str
    manifest: Path
    preset: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """What is drawn of each object, and what judges it.

    Attributes:
        prompts: YAML list of them.
        seeds: pictures of each object and prompt.
        sample_steps: of drawing; None: what suits the base.
        encoders: by name.
        options: further ones of ``jobs/evaluate.py``.
    """

    prompts: str
    seeds: int
    sample_steps: int | None
    encoders: tuple[str, ...]
    options: tuple[str, ...] = ()


def measure(
    folder: Path,
    contenders: Sequence[Contender],
    gallery: Path,
    base: str,
    drawn: Drawn,
    *,
    objects: int | None = None,
    share_gpu: int = 1,
) -> list[dict[str, Any]]:
    """Scores of what contenders make of the first `objects` of their manifests; what is in `folder` is not done again.

    A contender that no object survived has none. With `share_gpu` so many processes work side by side on one GPU.
    """
    with ThreadPoolExecutor(share_gpu) as pool:
        tune = partial(fine_tune, folder, base=base, objects=objects, share_gpu=share_gpu)
        stores = dict(zip((one.name for one in contenders), pool.map(tune, contenders), strict=True))
    evaluate = ["--out", str(folder), "--base", base, "--gallery", str(gallery), *drawn.options]
    evaluate += ["--prompts", drawn.prompts, "--seeds", str(drawn.seeds)]
    evaluate += ["--steps", str(drawn.sample_steps)] if drawn.sample_steps else []
    evaluate += _sharing(share_gpu, workers=share_gpu)
    evaluate += [word for name in drawn.encoders for word in ("--encoder", name)]
    for name, store in stores.items():
        evaluate += ["--store", f"{name}={store}"] if any(ArtifactStore(store).object_ids()) else []
    job("evaluate.py", *evaluate)
    return read_scores(folder / SCORES_FILE)


def fine_tune(folder: Path, contender: Contender, base: str, *, objects: int | None = None, share_gpu: int = 1) -> str:
    """Fine-tune a contender's objects, the first `objects` if that is given; the store in `folder` that has them."""
    print(f"{folder.name}: {contender.name}", flush=True)
    # By how many there are: every object of a store is drawn.
    store = str(folder / f"stores-{objects or 'all'}" / re.sub(r"[^A-Za-z0-9.]+", "-", contender.name))
    options = [word for override in contender.overrides for word in ("--set", override)]
    options += ["--limit", str(objects)] if objects else []
    options += _sharing(share_gpu, workers=1)
    what = [str(contender.manifest), "--store", store, "--base", base, "--recipe", contender.preset]
    # A rate that is too high may lose rows.
    job("batch_personalize.py", *what, *options, "--previews", "0", may_lose_rows=True)
    return store


def _sharing(processes: int, *, workers: int) -> list[str]:
    """Options of a job whose workers have a part of the GPU each."""
    if processes == 1:
        return []
    # Rounded down, or the last one would wait for what is missing.
    return ["--workers", str(workers), "--gpus-per-worker", str(math.floor(1e4 / processes) / 1e4)]


def have_gallery(
    folder: Path, sprites: Sprites, class_names: Sequence[str], prompts: Sequence[EvaluationPrompt], resolution: int
) -> Path:
    """The gallery of some classes, as large as the base's pictures; composed unless it is there."""
    gallery = folder / GALLERY_FILE
    if not gallery.is_file():
        write_half(sprites, class_names, prompts, folder, resolution=resolution, scenes=SCENES)
    return gallery


def job(script: str, *options: str, may_lose_rows: bool = False) -> None:
    """Run one of the jobs on this benchmark's cluster; its output goes where this process's goes."""
    path = os.pathsep.join(filter(None, (str(JOBS.parent), os.environ.get("PYTHONPATH"))))
    finished = subprocess.run(
        [sys.executable, str(JOBS / script), *options], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    if finished.returncode and not (may_lose_rows and finished.returncode == _ROWS_LOST):
        sys.exit(f"{script} failed with status {finished.returncode}; run this again to go on from here")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--out", type=Path, required=True, help="folder for everything; a rerun goes on in it")
    options.add_argument("--data", type=Path, default=Path("icons"), help="folder with the icons; fetched if none")
    options.add_argument("--base", default="tiny64")
    return options


def add_choices(options: argparse.ArgumentParser, recipes: Sequence[str]) -> None:
    """The options that tell which objects a benchmark takes, and how it fine-tunes them."""
    options.add_argument("--half", choices=(DEVELOPMENT, TEST), default=TEST,
                         help="of the classes; choices are made on development, figures of test (test)")  # fmt: skip
    options.add_argument("--recipe", action="append", metavar="NAME",
                        help=f"preset or YAML file; again for each ({', '.join(recipes)})")  # fmt: skip


def have_cluster() -> None:
    """One cluster for this process and its jobs: the one that ``RAY_ADDRESS`` names, else a local one."""
    connect()
    ray.data.DataContext.get_current().enable_progress_bars = False
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def cell(one: Figure | None) -> str:
    """A figure with its interval, as tables show it."""
    return str(one) if one else "no object was left"
