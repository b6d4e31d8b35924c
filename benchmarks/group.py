"""Grouped fine-tuning against the same recipe one object at a time: same process, same threads, in turns.

Usage: ``python benchmarks/group.py``. Prints seconds per object, and the ratio to one object at a time: the median over
rounds in which the sizes take turns.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from objdrive.base.stable_diffusion import Base
from objdrive.catalog.photos import decode_photo
from objdrive.training.class_pictures import ClassPictures
from objdrive.training.personalize import personalize
from objdrive.training.recipe import Recipe, make_recipe
from objdrive.training.views import Scene, SceneObject

CATALOG = Path(__file__).parents[1] / "examples" / "catalog"


def catalog_scenes() -> list[Scene]:
    """The catalog's pictures of one object."""
    with (CATALOG / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if not row["scene"]]
    scenes = []
    for row in rows:
        mask = (CATALOG / row["mask"]).read_bytes() if row["mask"] else None
        photo = decode_photo((CATALOG / row["image"]).read_bytes(), mask, name=row["object_id"])
        one = SceneObject(row["object_id"], row["class_name"], photo.mask)
        scenes.append(Scene(row["object_id"], photo.image, (one,)))
    return scenes


def seconds_per_object(base: Base, scenes: list[Scene], recipe: Recipe, pictures: ClassPictures, size: int) -> float:
    """Fine-tune all scenes in groups of `size`."""
    started = time.perf_counter()
    for first in range(0, len(scenes), size):
        personalize(base, scenes[first : first + size], recipe, class_pictures=pictures)
    return (time.perf_counter() - started) / len(scenes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    base = Base.load("tiny64")
    recipe = make_recipe(tuning=base.files.tuning, overrides=[f"steps={arguments.steps}", "sample_steps=4"])
    pictures = ClassPictures(base, recipe)
    scenes = catalog_scenes()[:16]
    pictures.draw({scene.objects[0].class_name for scene in scenes})
    sizes = sorted({1, *arguments.sizes})
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(arguments.rounds):
        for size in sizes:
            times[size].append(seconds_per_object(base, scenes, recipe, pictures, size))
    alone = times[1]
    print(f"{arguments.threads} threads, {arguments.steps} steps, {len(scenes)} objects, {arguments.rounds} rounds")
    print("group size   seconds per object   objects per second against one at a time")
    for size in sizes:
        ratios = sorted(one / grouped for one, grouped in zip(alone, times[size], strict=True))
        middle = statistics.median(ratios)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"{size:10}   {statistics.median(times[size]):18.3f}   {middle:.2f} ({spread})")


if __name__ == "__main__":
    main()
