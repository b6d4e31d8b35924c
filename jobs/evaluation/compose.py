"""The evaluation set of the embedded base: drawings that it has never seen, as photos and as prompts ask for them."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from jobs.pretrain.contexts import CONTEXTS, Rng
from jobs.pretrain.packs import PACKS
from jobs.pretrain.scenes import STYLES, Thing, put, render
from jobs.pretrain.sprites import Sprites
from objdrive.errors import ObjdriveError
from objdrive.evaluation.prompts import EvaluationPrompt, Shown
from objdrive.evaluation.reference import MEASURED
from objdrive.pictures import encode_picture
from objdrive.seeds import seed_of

HALVES = Path(__file__).parent / "halves.yaml"
PROMPTS = Path(__file__).parent / "prompts.yaml"
GALLERY_FILE = "gallery.parquet"
MANIFEST_FILE = "manifest.csv"

PHOTO_CONTEXTS = ("on concrete", "on pebbles", "on marble", "on a tiled floor", "on a striped cloth", "in the rain")
"""Where photos are taken: in no context that a prompt asks for, so that copying the input is never right."""

_PHOTO_EDGE = 256
_PHOTO_FILL = (0.55, 0.7)
_EDGES = {"": (0.55, 0.8), "small": (0.3, 0.42), "large": (0.86, 0.94)}
_SIDE_BY_SIDE = {2: ((0.26, 0.74), (0.4, 0.48)), 3: ((0.19, 0.5, 0.81), (0.27, 0.31))}
_ORDERS: dict[str, tuple[int, int] | None] = {"": None, "left": (0, 1), "right": (1, 0)}
_TURN = 6
_FAMILIES = {pack.name: pack.family for pack in PACKS}


@dataclass(frozen=True)
class Subject:
    """An object of the set: its drawing, by row of the sprites, and the drawings that it is to be told from."""

    object_id: str
    class_name: str
    row: int
    rivals: tuple[int, ...]


def read_halves(path: Path = HALVES) -> dict[str, tuple[str, ...]]:
    """Class words by half.

    Raises:
        ObjdriveError: a class is in both halves.
    """
    halves = {name: tuple(words) for name, words in yaml.safe_load(path.read_text()).items()}
    words = [word for half in halves.values() for word in half]
    if repeated := sorted({word for word in words if words.count(word) > 1}):
        raise ObjdriveError(f"{path}: {', '.join(repeated)} may be in one half only")
    return halves


def choose_subjects(sprites: Sprites, class_names: Sequence[str]) -> list[Subject]:
    """The first held-out drawing of each class.

    The same drawing in another rendering (its family of packs, and what is too like it to be trained on) is no rival.

    Raises:
        ObjdriveError: a class has no held-out drawing, or no rival.
    """
    chosen = []
    for word in class_names:
        rows = [row for row, label in enumerate(sprites.labels) if sprites.classes[label] == word]
        held = [row for row in rows if sprites.use[row] == "held"]
        rivals = [row for row in rows if sprites.use[row] == "train"]
        if not held or not rivals:
            raise ObjdriveError(
                f"the class {word!r} has {len(held)} held-out drawings and {len(rivals)} others: drop it"
            )
        family = _family(sprites, held[0])
        others = tuple(row for row in (*rivals, *held[1:]) if _family(sprites, row) != family)
        chosen.append(Subject(f"{word.replace(' ', '-')}-held", word, held[0], others))
    return chosen


def _family(sprites: Sprites, row: int) -> str:
    source = sprites.sources[row]
    pack = source.partition("/")[0]
    # Shapes that stand in for icons have no packs.
    return _FAMILIES.get(pack, source)


def write_half(
    sprites: Sprites,
    class_names: Sequence[str],
    prompts: Sequence[EvaluationPrompt],
    out: Path,
    *,
    resolution: int,
    scenes: int,
) -> int:
    """Write the photos and masks of one half, its manifest and its gallery; the number of objects.

    Args:
        sprites: all drawings.
        class_names: of the half.
        prompts: that pictures will be asked for by; each must say what it shows.
        out: folder to write to.
        resolution: edge of the gallery's pictures.
        scenes: pictures of each drawing for each prompt.

    Raises:
        ObjdriveError: see `choose_subjects`; too few scenes; or a prompt shows what cannot be composed.
    """
    if scenes <= MEASURED:
        raise ObjdriveError(
            f"scenes={scenes} must be above {MEASURED}: so many are drawn to be measured, the others to measure by"
        )
    subjects = choose_subjects(sprites, class_names)
    for prompt in prompts:
        _check(prompt, sprites)
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    with (out / MANIFEST_FILE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("object_id", "image", "mask", "class_name", "design"))
        for subject in subjects:
            image, mask = compose_photo(_sprite(sprites, subject.row), subject.object_id)
            names = f"images/{subject.object_id}.png", f"masks/{subject.object_id}.png"
            image.save(out / names[0])
            mask.save(out / names[1])
            table.writerow((subject.object_id, *names, subject.class_name, sprites.sources[subject.row]))
    pictures = _gallery(sprites, subjects, prompts, resolution, scenes)
    # Under another name until it is whole: a gallery that is there is taken as complete.
    partial = out / f"{GALLERY_FILE}.partial"
    pq.write_table(pa.Table.from_pylist(list(pictures)), partial)
    partial.replace(out / GALLERY_FILE)
    return len(subjects)


def compose_photo(
    sprite: Image.Image,
    object_id: str,
    *,
    edge: float | None = None,
    ground: tuple[int, int, int] | None = None,
) -> tuple[Image.Image, Image.Image]:
    """(image, mask): what a shop's photo of a drawing looks like.

    Args:
        sprite: the drawing.
        object_id: decides on what is not given.
        edge: of the drawing, in parts of the photo's.
        ground: colour of a plain backdrop, in place of a context.
    """
    rng = np.random.default_rng(seed_of(f"photo:{object_id}"))
    context = PHOTO_CONTEXTS[int(rng.integers(len(PHOTO_CONTEXTS)))]
    usual = rng.uniform(*_PHOTO_FILL)
    centre = (0.5 + 0.1 * rng.uniform(-1, 1), 0.5 + 0.1 * rng.uniform(-1, 1))
    canvas = _canvas(context, rng, _PHOTO_EDGE) if ground is None else np.full((_PHOTO_EDGE, _PHOTO_EDGE, 3), ground)
    image, (mask,) = _photo(canvas, [Thing(sprite, edge or usual, centre, rng.uniform(-_TURN, _TURN))])
    return image, mask


def compose_group(
    sprites: Sequence[Image.Image], key: str, *, context: str | None = None, resolution: int = _PHOTO_EDGE
) -> tuple[Image.Image, list[Image.Image]]:
    """(image, masks): two or three drawings side by side.

    Args:
        sprites: the drawings.
        key: decides on what is not given.
        context: where they are; default: where photos are taken.
        resolution: edge of the picture.
    """
    rng = np.random.default_rng(seed_of(f"group:{key}"))
    context = context or PHOTO_CONTEXTS[int(rng.integers(len(PHOTO_CONTEXTS)))]
    return _photo(_canvas(context, rng, resolution), _side_by_side(sprites, rng))


def _photo(canvas: np.ndarray, things: Sequence[Thing]) -> tuple[Image.Image, list[Image.Image]]:
    masks = []
    for thing in things:
        canvas, cover = put(canvas, thing)
        masks.append(Image.fromarray((cover[..., 0] * 255).round().astype(np.uint8)))
    return Image.fromarray(render(canvas, 0)), masks


def compose_prompt(
    sprite: Image.Image, shown: Shown, rng: Rng, resolution: int, beside: Sequence[Image.Image] = ()
) -> np.ndarray:
    """(resolution, resolution, 3) uint8: a drawing as a prompt asks for it.

    Args:
        sprite: the drawing.
        shown: what the prompt asks for.
        rng: decides on everything else.
        resolution: edge of the picture.
        beside: drawings of the second thing, of which one is taken.
    """
    canvas = _canvas(shown.context, rng, resolution)
    if shown.beside:
        other = beside[int(rng.integers(len(beside)))]
        things = _side_by_side((sprite, other), rng, _ORDERS[shown.side])
    else:
        edge = rng.uniform(*_EDGES[shown.size])
        reach = 0.2 * (1 - edge)
        centre = (0.5 + reach * rng.uniform(-1, 1), 0.5 + reach * rng.uniform(-1, 1))
        things = [Thing(_flipped(sprite, rng), edge, centre, rng.uniform(-_TURN, _TURN))]
    for thing in things:
        canvas, _ = put(canvas, thing)
    return render(canvas, STYLES.index(shown.style) if shown.style else 0)


def _side_by_side(sprites: Sequence[Image.Image], rng: Rng, order: Sequence[int] | None = None) -> list[Thing]:
    """Two or three drawings next to each other, in a certain order (the places from the left) or in any."""
    places, edges = _SIDE_BY_SIDE[len(sprites)]
    taken = rng.permutation(places) if order is None else [places[one] for one in order]
    return [_beside(sprite, place, edges, rng) for sprite, place in zip(sprites, taken, strict=True)]


def _beside(sprite: Image.Image, across: float, edges: tuple[float, float], rng: Rng) -> Thing:
    centre = (0.5 + rng.uniform(-0.13, 0.13), across + rng.uniform(-0.03, 0.03))
    return Thing(_flipped(sprite, rng), rng.uniform(*edges), centre, rng.uniform(-_TURN, _TURN))


def _flipped(sprite: Image.Image, rng: Rng) -> Image.Image:
    return sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else sprite


def _canvas(context: str, rng: Rng, edge: int) -> np.ndarray:
    return CONTEXTS[context](rng, edge).clip(0, 255)


def _sprite(sprites: Sprites, row: int) -> Image.Image:
    return Image.fromarray(sprites.pictures[row])


def _gallery(
    sprites: Sprites, subjects: Sequence[Subject], prompts: Sequence[EvaluationPrompt], resolution: int, scenes: int
) -> Iterator[Mapping[str, object]]:
    """Rows of the gallery: every drawing of every class of the half, `scenes` times for every prompt."""
    beside = {p.shows.beside: _drawings(sprites, p.shows.beside) for p in prompts if p.shows and p.shows.beside}
    for subject in subjects:
        for row in (subject.row, *subject.rivals):
            design = sprites.sources[row]
            for prompt in prompts:
                assert prompt.shows  # `_check` has seen to it.
                for number in range(scenes):
                    rng = np.random.default_rng(seed_of(f"gallery:{design}:{prompt.id}:{number}"))
                    pixels = compose_prompt(
                        _sprite(sprites, row), prompt.shows, rng, resolution, beside.get(prompt.shows.beside, ())
                    )
                    yield {
                        "design": design,
                        "class_name": subject.class_name,
                        "object_id": subject.object_id if row == subject.row else "",
                        "prompt_id": prompt.id,
                        "number": number,
                        "picture": encode_picture(Image.fromarray(pixels), "PNG"),
                    }


def _drawings(sprites: Sprites, word: str) -> list[Image.Image]:
    """Drawings of a class that the base has seen."""
    known = sprites.only("train")
    return [_sprite(known, row) for row, label in enumerate(known.labels) if known.classes[label] == word]


def _check(prompt: EvaluationPrompt, sprites: Sprites) -> None:
    shown = prompt.shows
    fault = ""
    if shown is None:
        fault = "says nothing of what it shows"
    elif shown.context not in CONTEXTS:
        fault = f"shows the context {shown.context!r}, of which there is no backdrop"
    elif shown.style and shown.style not in STYLES:
        fault = f"shows the style {shown.style!r}; there are {', '.join(STYLES)}"
    elif shown.beside and shown.beside not in sprites.classes:
        fault = f"shows {shown.beside!r}, of which there is no drawing"
    if fault:
        raise ObjdriveError(f"the prompt {prompt.id!r} can't be composed: it {fault}")
