"""Contexts: procedural backdrops, each with the words that name it in a caption."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_FINE = 3
Rng = np.random.Generator
Pixels = NDArray[np.floating]
Backdrop = Callable[[Rng, int], Pixels]
"""(n, n, 3) float32 in [0, 255], not yet clipped, drawn for an edge of n pixels."""

COLOURS = {
    "red": (220, 50, 47),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 80),
    "green": (80, 180, 90),
    "blue": (60, 120, 220),
    "purple": (140, 80, 190),
    "pink": (245, 160, 190),
    "black": (25, 25, 28),
    "white": (245, 245, 243),
    "gray": (140, 142, 145),
}
"""Colour words, for plain backgrounds and for tinted objects."""


def _colour(*rgb: float) -> Pixels:
    return np.array(rgb, np.float32)


def _grid(n: int) -> tuple[Pixels, Pixels]:
    """(n, n, 1) heights and widths in [0, 1)."""
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / n
    return y[..., None], x[..., None]


def _noise(rng: Rng, n: int, cells: float) -> Pixels:
    """(n, n, 1) smooth noise of unit deviation at its knots, about `cells` bumps along an edge."""
    knots = rng.standard_normal((round(cells) + 2, round(cells) + 2)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(knots).resize((n, n), Image.Resampling.BICUBIC), np.float32)
    return smooth[..., None]


def _waves(phase: Pixels) -> Pixels:
    waves: Pixels = np.sin(2 * np.pi * phase)
    return waves


def _plain(colour: tuple[float, float, float]) -> Backdrop:
    def draw(rng: Rng, n: int) -> Pixels:
        y, _ = _grid(n)
        shade = _colour(*colour) + 6 * rng.standard_normal(3).astype(np.float32)
        return shade + (y - 0.5) * rng.uniform(-30, 30) + 3 * _noise(rng, n, 4)

    return draw


def _grass(rng: Rng, n: int) -> Pixels:
    return _colour(70, 150, 50) + (14 * _noise(rng, n, 28) + 11 * _noise(rng, n, 6)) * _colour(0.7, 1, 0.5)


def _sand(rng: Rng, n: int) -> Pixels:
    y, x = _grid(n)
    ripples = _waves(y * rng.uniform(3, 5) + 0.15 * np.sin(5 * x + rng.uniform(0, 6)))
    return _colour(225, 200, 150) + 12 * ripples + 7 * _noise(rng, n, 4)


def _snow(rng: Rng, n: int) -> Pixels:
    ground = _colour(235, 242, 250) + 8 * _noise(rng, n, 4) * _colour(1, 1, 0.6)
    return _specks(rng, ground, _colour(185, 203, 232), 40, 0.012)


def _specks(rng: Rng, ground: Pixels, colour: Pixels, count: int, radius: float) -> Pixels:
    """Scatter soft dots of a radius, in parts of the edge."""
    n = len(ground)
    y, x = _grid(n)
    cover = np.zeros((n, n, 1), np.float32)
    for cy, cx, size in zip(rng.random(count), rng.random(count), rng.uniform(0.6, 1.4, count), strict=True):
        reach = 2 * radius * size + 1 / n
        box = np.s_[max(0, int((cy - reach) * n)) : int((cy + reach) * n) + 2, :]
        near = (y[box] - cy) ** 2 + (x[box] - cx) ** 2
        cover[box] = np.maximum(cover[box], np.exp(-near / (radius * size) ** 2))
    return ground * (1 - cover) + colour * cover


def _wood(rng: Rng, n: int) -> Pixels:
    y, _ = _grid(n)
    grain = _waves(y * rng.uniform(4, 6) + 0.35 * _noise(rng, n, 3))
    table = _colour(160, 105, 60) + 20 * grain + 4 * _noise(rng, n, 20)
    for board in range(3):
        row = int(n * (board + rng.uniform(0.2, 0.4)) / 3)
        table[row : row + max(1, n // 64)] *= 0.55
    return table


def _tiles(rng: Rng, n: int, gap: Pixels, size: tuple[float, float], shift: float, stone: Pixels) -> Pixels:
    """A wall or floor of blocks (height, width in parts of the edge); every second row shifted by part of a block."""
    surface = np.ones((n, n, 3), np.float32) * gap
    height, width = round(size[0] * n), round(size[1] * n)
    line = max(1, n // 64)
    top = int(rng.integers(height))
    left = int(rng.integers(width))
    for row in range(-1, n // height + 1):
        for column in range(-1, n // width + 2):
            y = row * height + top
            x = column * width - left + int((row % 2) * shift * width)
            block = stone + 12 * rng.standard_normal() + 4 * rng.standard_normal(3)
            surface[max(0, y + line) : max(0, y + height), max(0, x + line) : max(0, x + width)] = block
    return surface


def _brick(rng: Rng, n: int) -> Pixels:
    return _tiles(rng, n, _colour(200, 190, 180), (0.17, 0.34), 0.5, _colour(175, 75, 55))


def _tiled_floor(rng: Rng, n: int) -> Pixels:
    return _tiles(rng, n, _colour(120, 130, 135), (0.25, 0.25), 0, _colour(190, 215, 215))


def _drawn(ground: Pixels, draw: Callable[[ImageDraw.ImageDraw, float], None]) -> Pixels:
    """Draw on a backdrop with smooth edges; `draw` gets a pen and the edge that it draws on."""
    n = len(ground)
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8)).resize((_FINE * n, _FINE * n))
    draw(ImageDraw.Draw(picture), float(_FINE * n))
    return np.asarray(picture.resize((n, n), Image.Resampling.BOX)).astype(np.float32)


def _underwater(rng: Rng, n: int) -> Pixels:
    y, x = _grid(n)
    rays = np.maximum(0, _waves(x * rng.uniform(1.5, 3) + 0.5 * y + rng.random()))
    water = _colour(20, 110, 170) * (1 - 0.55 * y) + 30 * rays * (1 - y)

    def bubbles(pen: ImageDraw.ImageDraw, edge: float) -> None:
        for cx, cy, radius in zip(*(edge * rng.random((2, 7))), edge * rng.uniform(0.025, 0.06, 7), strict=True):
            box = (cx - radius, cy - radius, cx + radius, cy + radius)
            pen.ellipse(box, outline=(150, 205, 230), width=round(0.02 * edge))

    return _drawn(water, bubbles)


def _night(rng: Rng, n: int) -> Pixels:
    y, _ = _grid(n)
    sky = _colour(15, 18, 55) + _colour(25, 15, 50) * y + 5 * _noise(rng, n, 4)
    return _specks(rng, sky, _colour(255, 250, 220), 40, 0.009)


def _sky(rng: Rng, n: int) -> Pixels:
    y, _ = _grid(n)
    cloud = 1 / (1 + np.exp(-4 * (0.6 * _noise(rng, n, 6) + _noise(rng, n, 3) - 0.5)))
    return (_colour(95, 170, 235) + _colour(60, 40, 15) * y) * (1 - cloud) + _colour(250, 252, 255) * cloud


def _sunset(rng: Rng, n: int) -> Pixels:
    y, _ = _grid(n)
    glow = 40 * np.exp(-((y - rng.uniform(0.65, 0.85)) ** 2) * 60) * _colour(1, 0.6, 0.1)
    sky: Pixels = _colour(90, 50, 120) * (1 - y) + _colour(250, 140, 60) * y + glow + 4 * _noise(rng, n, 3)
    return sky


def _checkered(rng: Rng, n: int) -> Pixels:
    edge = n * rng.uniform(0.12, 0.2)
    y, x = np.mgrid[0:n, 0:n] + edge * rng.random((2, 1, 1))
    dark = ((y // edge + x // edge) % 2)[..., None]
    return np.where(dark, _colour(205, 50, 50), _colour(245, 240, 235)) + 3 * _noise(rng, n, 4)


def _dotted(rng: Rng, n: int) -> Pixels:
    edge = n * rng.uniform(0.18, 0.26)
    y, x = np.mgrid[0:n, 0:n] + edge * rng.random((2, 1, 1))
    x = x + (y // edge % 2) * edge / 2
    inside = np.hypot(y % edge - edge / 2, x % edge - edge / 2) - 0.27 * edge
    cover = np.clip(0.5 - inside, 0, 1)[..., None]
    dots: Pixels = _colour(120, 200, 190) * (1 - cover) + _colour(250, 250, 245) * cover
    return dots


def _striped(rng: Rng, n: int) -> Pixels:
    edge = n * rng.uniform(0.1, 0.16)
    dark = ((np.arange(n) + edge * rng.random()) // edge % 2)[None, :, None]
    return np.where(dark, _colour(40, 70, 140), _colour(240, 238, 230)) + 3 * _noise(rng, n, 4)


def _marble(rng: Rng, n: int) -> Pixels:
    y, x = _grid(n)
    veins = np.abs(np.sin(3 * np.pi * (x + 0.6 * y + 0.5 * _noise(rng, n, 3) + 0.15 * _noise(rng, n, 9))))
    stone: Pixels = _colour(200, 203, 208) + 38 * np.minimum(1, veins * 1.5)
    return stone


def _leaves(rng: Rng, n: int) -> Pixels:
    def leaves(pen: ImageDraw.ImageDraw, edge: float) -> None:
        for cx, cy, size in zip(*(edge * rng.random((2, 60))), edge * rng.uniform(0.09, 0.14, 60), strict=True):
            turn = rng.uniform(0, np.pi)
            along = size * np.array([np.cos(turn), np.sin(turn)])
            across = 0.5 * size * np.array([-np.sin(turn), np.cos(turn)])
            tint = _colour(205, 110, 30) + _colour(38, 45, 15) * rng.uniform(-1, 1)
            corners = [(cx + d[0], cy + d[1]) for d in (along, across, -along, -across)]
            pen.polygon(corners, fill=tuple(int(v) for v in tint.clip(0, 255)))

    return _drawn(np.ones((n, n, 3), np.float32) * _colour(140, 80, 40), leaves)


def _flowers(rng: Rng, n: int) -> Pixels:
    field: Pixels = _colour(95, 165, 75) + 8 * _noise(rng, n, 10) * _colour(0.7, 1, 0.5)
    field = _specks(rng, field, _colour(250, 245, 250), 12, 0.035)
    field = _specks(rng, field, _colour(240, 120, 180), 12, 0.035)
    return _specks(rng, field, _colour(250, 215, 60), 12, 0.03)


def _pebbles(rng: Rng, n: int) -> Pixels:
    def pebbles(pen: ImageDraw.ImageDraw, edge: float) -> None:
        for cx, cy, rx in zip(*(edge * rng.random((2, 55))), edge * rng.uniform(0.08, 0.13, 55), strict=True):
            ry, tone = rx * rng.uniform(0.6, 0.9), int(rng.uniform(125, 200))
            box = (cx - rx, cy - ry, cx + rx, cy + ry)
            pen.ellipse(box, fill=(tone, tone - 4, tone - 10), outline=(95, 92, 90), width=round(0.01 * edge))

    return _drawn(np.ones((n, n, 3), np.float32) * _colour(70, 68, 66), pebbles)


def _rain(rng: Rng, n: int) -> Pixels:
    y, _ = _grid(n)

    def streaks(pen: ImageDraw.ImageDraw, edge: float) -> None:
        for x, top, length in zip(*(edge * rng.random((2, 26))), edge * rng.uniform(0.1, 0.2, 26), strict=True):
            pen.line((x, top, x - 0.3 * length, top + length), fill=(165, 180, 200), width=round(0.02 * edge))

    return _drawn(_colour(95, 105, 120) + 25 * (1 - y) + 8 * _noise(rng, n, 3), streaks)


def _hills(rng: Rng, n: int) -> Pixels:
    y, x = _grid(n)
    scene = _colour(150, 205, 240) + _colour(60, 35, 10) * y
    for depth, colour in enumerate((_colour(120, 175, 120), _colour(85, 150, 75), _colour(60, 120, 50))):
        ridge = 0.4 + 0.17 * depth + 0.06 * _waves(x * rng.uniform(0.6, 1.4) + rng.random())
        scene = np.where(y > ridge, colour + 4 * _noise(rng, n, 8), scene)
    return scene


def _curtain(rng: Rng, n: int) -> Pixels:
    y, x = _grid(n)
    folds = _waves(x * rng.uniform(4, 6) + 0.1 * y * rng.uniform(-1, 1) + rng.random())
    return _colour(150, 30, 45) + 38 * folds * _colour(1, 0.35, 0.4) - 25 * y


def _concrete(rng: Rng, n: int) -> Pixels:
    surface = _colour(165, 163, 158) + 7 * _noise(rng, n, 5) + 4 * _noise(rng, n, 24)
    return _specks(rng, surface, _colour(125, 123, 118), 25, 0.01)


CONTEXTS: dict[str, Backdrop] = {
    **{f"on {'an' if word[0] in 'aeiou' else 'a'} {word} background": _plain(rgb) for word, rgb in COLOURS.items()},
    "on grass": _grass,
    "on sand": _sand,
    "in the snow": _snow,
    "on a wooden table": _wood,
    "in front of a brick wall": _brick,
    "under water": _underwater,
    "in the night sky": _night,
    "in a blue sky": _sky,
    "at sunset": _sunset,
    "on a checkered cloth": _checkered,
    "on a polka dot cloth": _dotted,
    "on a striped cloth": _striped,
    "on marble": _marble,
    "on a tiled floor": _tiled_floor,
    "on autumn leaves": _leaves,
    "in a field of flowers": _flowers,
    "on pebbles": _pebbles,
    "in the rain": _rain,
    "in front of green hills": _hills,
    "in front of a red curtain": _curtain,
    "on concrete": _concrete,
}
"""Backdrop by the words that name it."""
