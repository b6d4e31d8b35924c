"""What smaller objects and careless masks cost: identity of the object, and how much of its backdrop comes along.

Usage: ``python benchmarks/robustness.py --out FOLDER`` (``--smoke`` tries it out in minutes, on plain shapes).

Objects are photographed again: smaller and smaller, and before a plain magenta ground with masks that are too small,
too large or jagged.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from comparing import (
    SMOKE_PROMPTS,
    Contender,
    Drawn,
    add_choices,
    cell,
    have_cluster,
    have_gallery,
    measure,
    parser,
)
from magenta import MAGENTA, magenta_by_object
from PIL import Image, ImageFilter

from jobs.evaluation.compose import (
    MANIFEST_FILE,
    PROMPTS,
    Subject,
    choose_subjects,
    compose_photo,
    read_halves,
)
from jobs.evaluation.pages import PICTURES_FILE, by_method
from jobs.pretrain.folders import Folders
from jobs.pretrain.sprites import Sprites, draw_sprites, have_sprites
from objdrive.base.stable_diffusion import Base
from objdrive.evaluation.prompts import read_prompts
from objdrive.evaluation.scores import Array
from objdrive.evaluation.summary import difference, figure, per_object

RECIPES = ("paper", "objdrive")
SIZES = (0.6, 0.3, 0.15, 0.1)
_MASKED_EDGE = 0.6
_JAGS = 16


@dataclass(frozen=True)
class Variant:
    """How an object is photographed: its edge in the photo, the ground, and what is done to its mask."""

    name: str
    edge: float
    ground: tuple[int, int, int] | None = None
    spoil: Callable[[Image.Image], Image.Image] = lambda mask: mask


def grown(mask: Image.Image, pixels: int) -> Image.Image:
    """The mask, larger by so many pixels of 64 on every side; smaller if they are negative."""
    reach = 2 * abs(pixels) * mask.width // 64 + 1
    return mask.filter(ImageFilter.MaxFilter(reach) if pixels > 0 else ImageFilter.MinFilter(reach))


def jagged(mask: Image.Image, pixels: int) -> Image.Image:
    """The mask, in some squares too large and in some too small by so many pixels of 64."""
    chosen = np.random.default_rng(0).integers(0, 2, (_JAGS, _JAGS), np.uint8) * 255
    squares = Image.fromarray(chosen).resize(mask.size, Image.Resampling.NEAREST)
    return Image.composite(grown(mask, pixels), grown(mask, -pixels), squares)


SIZED = tuple(Variant(f"{round(100 * edge)}% of the frame", edge) for edge in SIZES)
MASKED = (
    Variant("exact mask", _MASKED_EDGE, MAGENTA),
    Variant("mask 3 px too small", _MASKED_EDGE, MAGENTA, lambda mask: grown(mask, -3)),
    Variant("mask 3 px too large", _MASKED_EDGE, MAGENTA, lambda mask: grown(mask, 3)),
    Variant("mask jagged by 3 px", _MASKED_EDGE, MAGENTA, lambda mask: jagged(mask, 3)),
)


@dataclass(frozen=True)
class Effort:
    """How much is done: objects of the half, the first ones; recipes with their overrides; what is drawn."""

    objects: int
    recipes: tuple[str, ...]
    drawn: Drawn
    overrides: tuple[str, ...] = ()


def run(out: Path, sprites: Sprites, class_names: Sequence[str], base: str, effort: Effort) -> None:
    """Do what is not done yet, and write ``results.md``."""
    drawn = effort.drawn
    resolution = Base.load(base, device="cpu").resolution
    gallery = have_gallery(out / "set", sprites, class_names, read_prompts(Path(drawn.prompts)), resolution)
    subjects = choose_subjects(sprites, class_names)
    manifests = {one.name: photograph(one, sprites, subjects, out / "photos") for one in (*SIZED, *MASKED)}
    contenders = [
        Contender(f"{recipe}, {name}", manifest, recipe, effort.overrides)
        for recipe in effort.recipes
        for name, manifest in manifests.items()
    ]
    rows = measure(out / "drawn", contenders, gallery, base, drawn, objects=effort.objects)
    identity = (drawn.encoders[0], "identity_class")
    identities = {method: per_object(own, [identity]) for method, own in by_method(rows).items()}
    halos = magenta_by_object(out / "drawn" / PICTURES_FILE)
    lines = ["# Smaller objects, careless masks", "", _describe(base, drawn, min(effort.objects, len(subjects)))]
    for recipe in effort.recipes:
        lines += ["", f"## {recipe}", "", *_sizes(recipe, identities), "", *_masks(recipe, identities, halos)]
    (out / "results.md").write_text("\n".join(lines) + "\n")
    print(f"results {out / 'results.md'}")


def photograph(variant: Variant, sprites: Sprites, subjects: Sequence[Subject], out: Path) -> Path:
    """The manifest of a variant; its photos and masks are written unless they are there."""
    folder = out / variant.name.replace(" ", "-")
    manifest = folder / MANIFEST_FILE
    if manifest.is_file():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("object_id", "image", "mask", "class_name")]
    for one in subjects:
        sprite = Image.fromarray(sprites.pictures[one.row])
        image, mask = compose_photo(sprite, one.object_id, edge=variant.edge, ground=variant.ground)
        rows.append((one.object_id, f"{one.object_id}.png", f"{one.object_id}-mask.png", one.class_name))
        image.save(folder / rows[-1][1])
        variant.spoil(mask).save(folder / rows[-1][2])
    # Last: with it the variant is whole.
    with manifest.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return manifest


def _sizes(recipe: str, identities: Mapping[str, Mapping[str, Array]]) -> list[str]:
    lines = ["| object's edge | identity in its class | of that at the largest |", "|---|---|---|"]
    largest = figure(identities.get(f"{recipe}, {SIZED[0].name}", {}))
    for variant in SIZED:
        found = figure(identities.get(f"{recipe}, {variant.name}", {}))
        share = f"{found.value / largest.value:.0%}" if found and largest and largest.value else ""
        lines.append(f"| {variant.name} | {cell(found)} | {share} |")
    return lines


def _masks(
    recipe: str, identities: Mapping[str, Mapping[str, Array]], halos: Mapping[str, Mapping[str, Array]]
) -> list[str]:
    lines = ["| mask | identity in its class | less than exact | magenta more than exact |", "|---" * 4 + "|"]
    exact = f"{recipe}, {MASKED[0].name}"
    for variant in MASKED:
        name = f"{recipe}, {variant.name}"
        lost, more = "", ""
        if identities.get(name) and identities.get(exact):
            lost = cell(difference(identities[exact], identities[name]))
            more = cell(difference(halos[name], halos[exact]))
        lines.append(f"| {variant.name} | {cell(figure(identities.get(name, {})))} | {lost} | {more} |")
    return lines


def _describe(base: str, drawn: Drawn, objects: int) -> str:
    return (
        f"Base `{base}`, {objects} objects, pictures of {drawn.seeds} seed(s), judged by {drawn.encoders[0]}. "
        "Intervals: 95%, bootstrap over objects; differences are paired."
    )


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    add_choices(options, RECIPES)
    options.add_argument("--seeds", type=int, default=1, help="pictures of each object and prompt (1)")
    options.add_argument("--objects", type=int, default=22, metavar="N", help="of the half, the first ones (22)")
    options.add_argument("--smoke", action="store_true", help="a plain shape, two steps: tries it all out")
    arguments = options.parse_args()
    have_cluster()
    out, recipes = arguments.out.absolute() / arguments.half, tuple(arguments.recipe or RECIPES)
    if arguments.smoke:
        drawn = Drawn(str(SMOKE_PROMPTS), 1, 2, ("clip",))
        run(out / "smoke", draw_sprites(0), ("kite",), arguments.base, Effort(1, recipes, drawn, ("steps=2",)))
    else:
        drawn = Drawn(str(PROMPTS), arguments.seeds, None, ("imagenet",))
        sprites = have_sprites(Folders(arguments.data))
        run(
            out,
            sprites,
            read_halves()[arguments.half],
            arguments.base,
            Effort(arguments.objects, recipes, drawn),
        )


if __name__ == "__main__":
    main()
