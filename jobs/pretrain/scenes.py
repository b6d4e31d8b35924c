"""Scenes: one or two sprites on a backdrop, with a caption that says what is to be seen."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from jobs.pretrain.augment import stretched
from jobs.pretrain.contexts import COLOURS, CONTEXTS, Rng
from jobs.pretrain.sprites import Sprites

STYLES = ("a photo of", "pixel art of", "a black and white photo of", "a pencil sketch of")
"""How a scene is rendered, as captions say it; the first changes nothing."""
PHOTO_WORDS = ("a photo of", "a picture of", "an image of", "")
_PHOTO_ODDS = (0.62, 0.12, 0.06, 0.2)
_PLURAL = {"headphones", "sunglasses", "gloves", "jeans"}
_TINTS = tuple(COLOURS)


@dataclass(frozen=True)
class Mix:
    """The odds of what a scene may show; `stretched` is per drawing."""

    pair: float = 0.14
    style: float = 0.12
    small: float = 0.1
    large: float = 0.1
    tint: float = 0.12
    word_alone: float = 0.06
    no_context: float = 0.05
    stretched: float = 0.0


@dataclass(frozen=True)
class ComposedScene:
    """A picture and what it shows.

    Attributes:
        pixels: (n, n, 3) uint8.
        mask: (n, n) uint8, how much of each place its objects cover.
        caption: what a prompt for it would say.
        label: class of its first object.
        context: index into `CONTEXTS`.
        plain: one object, in its own colours, rendered as a photo.
    """

    pixels: np.ndarray
    mask: np.ndarray
    caption: str
    label: int
    context: int
    plain: bool


@dataclass(frozen=True)
class Thing:
    """A sprite in its place: edge and centre (down, across) in parts of the picture's edge, turn in degrees."""

    sprite: Image.Image
    edge: float
    centre: tuple[float, float]
    turn: float


class Composer:
    """Composes scenes of given sprites at one resolution."""

    def __init__(self, sprites: Sprites, resolution: int, mix: Mix | None = None) -> None:
        """`mix` defaults to what the base is trained on."""
        self._sprites = sprites
        self._resolution = resolution
        self._mix = mix or Mix()
        self._rows = [np.flatnonzero(sprites.labels == label) for label in range(len(sprites.classes))]
        self._labels = [label for label, rows in enumerate(self._rows) if len(rows)]

    def compose(self, rng: Rng, *, label: int | None = None, context: int | None = None) -> ComposedScene:
        """One scene, of a class and in a context if those are given, else of any."""
        mix = self._mix
        label = int(rng.choice(self._labels)) if label is None else label
        context = int(rng.integers(len(CONTEXTS))) if context is None else context
        where, backdrop = list(CONTEXTS.items())[context]
        pair = rng.random() < mix.pair
        style = int(rng.integers(1, len(STYLES))) if rng.random() < mix.style else 0
        if pair:
            what, things = self._pair(rng, label)
            tinted = False
        else:
            what, things, tinted = self._single(rng, label)
        canvas = backdrop(rng, self._resolution).clip(0, 255)
        if rng.random() < 0.5:
            canvas = canvas[:, ::-1]
        covered = np.zeros((self._resolution, self._resolution, 1), np.float32)
        for thing in things:
            canvas, cover = put(canvas, thing)
            covered = np.maximum(covered, cover)
        pixels, mask = render(canvas, style), (255 * covered[..., 0]).round().astype(np.uint8)
        caption = _caption(rng, mix, self._sprites.classes[label], what, where, style, plain=not (pair or tinted))
        return ComposedScene(pixels, mask, caption, label, context, plain=not (pair or tinted or style))

    def _single(self, rng: Rng, label: int) -> tuple[str, list[Thing], bool]:
        mix = self._mix
        word = self._sprites.classes[label]
        draw = rng.random()
        edge = rng.uniform(0.55, 0.8)
        if draw < mix.small:
            edge, word = rng.uniform(0.3, 0.42), f"small {word}"
        elif draw > 1 - mix.large:
            edge, word = rng.uniform(0.86, 0.94), f"large {word}"
        sprite = self._sprite(rng, label)
        tinted = rng.random() < mix.tint
        if tinted:
            tint = str(rng.choice(_TINTS))
            size, _, name = word.rpartition(self._sprites.classes[label])
            word = f"{size}{tint} {self._sprites.classes[label]}{name}"
            sprite = _tint(sprite, COLOURS[tint])
        reach = 0.2 * (1 - edge)
        centre = (0.5 + reach * rng.uniform(-1, 1), 0.5 + reach * rng.uniform(-1, 1))
        return with_article(word), [Thing(sprite, edge, centre, rng.uniform(-6, 6))], tinted

    def _pair(self, rng: Rng, label: int) -> tuple[str, list[Thing]]:
        other = int(rng.choice([each for each in self._labels if each != label] or self._labels))
        stacked = rng.random() < 0.3
        first, second = (self._sprites.classes[each] for each in (label, other))
        things = []
        for place, each in ((0.26, label), (0.74, other)):
            along, across = place + rng.uniform(-0.03, 0.03), 0.5 + rng.uniform(-0.13, 0.13)
            centre = (along, across) if stacked else (across, along)
            edge = rng.uniform(0.4, 0.48)
            things.append(Thing(self._sprite(rng, each), edge, centre, rng.uniform(-6, 6)))
        a, b = with_article(first), with_article(second)
        if stacked:
            return (f"{a} above {b}", f"{b} below {a}")[int(rng.integers(2))], things
        ways = (
            f"{a} and {b}",
            f"{a} and {b}",
            f"{a} to the left of {b}",
            f"{b} to the right of {a}",
            f"{a} next to {b}",
        )
        return ways[int(rng.integers(len(ways)))], things

    def _sprite(self, rng: Rng, label: int) -> Image.Image:
        picture = Image.fromarray(self._sprites.pictures[int(rng.choice(self._rows[label]))])
        # No draw for what never happens: scene number n stays the scene that it was.
        if self._mix.stretched and rng.random() < self._mix.stretched:
            picture = stretched(picture, rng)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


def put(canvas: np.ndarray, thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """Put a thing, with the shadow below it, onto a canvas (n, n, 3) in [0, 255].

    Returns:
        The canvas, and how much of each of its places the thing covers: (n, n, 1) in [0, 1].
    """
    n = len(canvas)
    size = max(4, round(thing.edge * n))
    shown = thing.sprite.resize((size, size), Image.Resampling.LANCZOS)
    shown = shown.rotate(thing.turn, Image.Resampling.BICUBIC, expand=True)
    layer = Image.new("RGBA", (n, n))
    top, left = (round(c * n - shown.width / 2) for c in thing.centre)
    layer.paste(shown, (left, top))
    alpha = layer.getchannel("A")
    shadow = Image.new("L", (n, n))
    shadow.paste(alpha, (0, max(1, n // 32)))
    shadow = shadow.filter(ImageFilter.BoxBlur(3 * n / 64))
    dark = np.asarray(shadow).astype(np.float32)[..., None] / 255
    cover = np.asarray(alpha).astype(np.float32)[..., None] / 255
    colour = np.asarray(layer.convert("RGB")).astype(np.float32)
    return canvas * (1 - 0.35 * dark) * (1 - cover) + colour * cover, cover


def _tint(sprite: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The same shape in shades of one colour."""
    pixels = np.asarray(sprite).astype(np.float32)
    light = pixels[..., :3].mean(axis=2, keepdims=True) / 255
    solid = pixels[..., 3:] > 128
    middle = light[solid].mean() if solid.any() else 0.5
    ratio = light / max(middle, 0.15)
    # Darker than the middle towards black, lighter towards white, so that the middle is the colour itself.
    shade = np.array(colour, np.float32) * np.minimum(ratio, 1) ** 0.8
    shade += (255 - shade) * np.clip((ratio - 1) * 0.35, 0, 0.6)
    return Image.fromarray(np.concatenate([shade.clip(0, 255), pixels[..., 3:]], axis=2).astype(np.uint8))


def render(canvas: np.ndarray, style: int) -> np.ndarray:
    """(n, n, 3) uint8: a canvas in one of the `STYLES`."""
    picture = Image.fromarray(canvas.clip(0, 255).round().astype(np.uint8))
    n = picture.width
    if style == 1:
        picture = picture.resize((n // 4, n // 4), Image.Resampling.BOX).resize((n, n), Image.Resampling.NEAREST)
    elif style == 2:
        picture = picture.convert("L").convert("RGB")
    elif style == 3:
        picture = _sketch(picture.convert("L"))
    return np.asarray(picture)


def _sketch(grey: Image.Image) -> Image.Image:
    high = np.asarray(grey.filter(ImageFilter.MaxFilter(3))).astype(np.float32)
    low = np.asarray(grey.filter(ImageFilter.MinFilter(3))).astype(np.float32)
    paper = 0.9 * (255 - 2.2 * (high - low)).clip(0, 255) + 0.1 * np.asarray(grey)
    return Image.fromarray(paper.round().astype(np.uint8)).convert("RGB")


def _caption(rng: Rng, mix: Mix, word: str, what: str, where: str, style: int, *, plain: bool) -> str:
    if plain and not style and rng.random() < mix.word_alone:
        return word
    opening = STYLES[style] if style else str(rng.choice(PHOTO_WORDS, p=_PHOTO_ODDS))
    parts = [opening, what] + ([] if rng.random() < mix.no_context else [where])
    return " ".join(part for part in parts if part)


def with_article(words: str) -> str:
    """The words as a caption names one of them."""
    if words.split()[-1] in _PLURAL:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
