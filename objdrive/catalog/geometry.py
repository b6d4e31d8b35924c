"""The geometry of views: windows around objects, and cutting them out of pictures."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ALONE_FILL = 0.9
"""Share of the view that the object takes when it is shown alone."""

_REACH = 3
"""How many target pixels the widest filter, Lanczos, reaches to each side."""


@dataclass(frozen=True)
class Window:
    """A square in pixel coordinates (x to the right, y down); it may reach outside of the picture."""

    left: float
    top: float
    side: float


def bounding_box(mask: NDArray[np.float32]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom (exclusive) of where the (H, W) mask is at least one half.

    Raises:
        ValueError: it is nowhere.
    """
    columns, rows = np.flatnonzero((mask >= 0.5).any(axis=0)), np.flatnonzero((mask >= 0.5).any(axis=1))
    if not len(rows):
        raise ValueError("an empty mask has no bounding box")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def whole_window(mask: NDArray[np.float32]) -> Window:
    """Return the largest square in the picture, moved from its centre only as far as the object's box needs.

    Where the box is longer than the picture's short side, it is the smallest square that holds the box.
    """
    height, width = mask.shape
    left, top, right, bottom = bounding_box(mask)
    side = max(min(height, width), right - left, bottom - top)
    return Window(_held(width, side, left, right), _held(height, side, top, bottom), side)


def close_window(mask: NDArray[np.float32], least_fill: float) -> Window:
    """Return the whole window, or a smaller one in the picture in which the object takes the share `least_fill`.

    The smaller one is centred on the object, moved only as far as the picture's edges need.

    Args:
        mask: (H, W) in [0, 1].
        least_fill: of the window's side, for the longer side of the object's box; in [0, 1].
    """
    whole = whole_window(mask)
    if least_fill == 0:
        return whole
    close = object_window(mask, least_fill)
    if close.side >= whole.side:
        return whole
    height, width = mask.shape
    return Window(_within(width, close.side, close.left), _within(height, close.side, close.top), close.side)


def object_window(mask: NDArray[np.float32], fill: float) -> Window:
    """Return the square around the object in which the longer side of its box takes the share `fill`, in (0, 1]."""
    left, top, right, bottom = bounding_box(mask)
    side = max(right - left, bottom - top) / fill
    return Window((left + right - side) / 2, (top + bottom - side) / 2, side)


def placed_window(mask: NDArray[np.float32], fill: float, across: float, down: float) -> Window:
    """Return a square that holds the object, of which the longer side of the object's box takes the share `fill`.

    Args:
        mask: (H, W) in [0, 1].
        fill: in (0, 1].
        across: where the object is in the square: -1 at its left edge, 0 in the middle, 1 at its right edge.
        down: likewise, -1 at its top edge, 1 at its bottom edge.
    """
    left, top, right, bottom = bounding_box(mask)
    centred = object_window(mask, fill)
    free_across, free_down = (centred.side - (right - left)) / 2, (centred.side - (bottom - top)) / 2
    return Window(centred.left - across * free_across, centred.top - down * free_down, centred.side)


def cut(
    image: NDArray[np.uint8], mask: NDArray[np.float32], window: Window, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Resample a window of a picture, without aliasing.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) in [0, 1].
        window: what to cut; it must touch the picture.
        size: edge of the result.

    Returns:
        image (size, size, 3) uint8, the picture's edge repeated outside of it; mask (size, size) float32, 0
        outside of the picture; inside (size, size) float32, the share of each pixel that lies in the picture.

    Raises:
        ValueError: the window lies outside of the picture.
    """
    step = window.side / size
    x = _Span.of(window.left, step, size, mask.shape[1])
    y = _Span.of(window.top, step, size, mask.shape[0])
    sources = np.ix_(y.sources, x.sources)
    within = mask[sources]
    within[~y.real] = 0
    within[:, ~x.real] = 0
    colours, greys = Image.fromarray(image[sources]), Image.fromarray(within)
    shape, box = (x.last - x.first, y.last - y.first), (x.start, y.start, x.end, y.end)
    if step > 1:
        colours = colours.resize(shape, Image.Resampling.LANCZOS, box)
        greys = greys.resize(shape, Image.Resampling.BOX, box)
    else:
        colours = colours.resize(shape, Image.Resampling.BICUBIC, box)
        greys = greys.resize(shape, Image.Resampling.BILINEAR, box)
    margins = ((y.first, size - y.last), (x.first, size - x.last))
    inside = np.outer(y.inside, x.inside).astype(np.float32)
    # Bilinear also reaches the pixels next to the picture.
    cut_mask = np.where(inside > 0, np.pad(np.asarray(greys), margins), np.float32(0))
    return np.pad(np.asarray(colours), (*margins, (0, 0)), mode="edge"), cut_mask, inside


def object_alone(
    image: NDArray[np.uint8],
    mask: NDArray[np.float32],
    size: int,
    background: int = 255,
    *,
    window: Window | None = None,
) -> NDArray[np.uint8]:
    """Show the object alone, the paper's ``x_m`` (arXiv 2401.15708): its box, all else in `background` grey.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) in [0, 1].
        size: edge of the result.
        background: grey value around the object, in [0, 255].
        window: what to show in place of the object's box; it must touch the picture.

    Returns:
        (size, size, 3) uint8.
    """
    window = window or object_window(mask, ALONE_FILL)
    left, top = max(0, math.floor(window.left)), max(0, math.floor(window.top))
    near = np.s_[top : math.ceil(window.top + window.side), left : math.ceil(window.left + window.side)]
    # Blended before it is resampled, or the old background's colour would bleed into the object's edge.
    alone = _over(background, image[near], mask[near])
    shifted = Window(window.left - left, window.top - top, window.side)
    picture, _, inside = cut(alone, mask[near], shifted, size)
    return _over(background, picture, inside)


def _over(background: int, image: NDArray[np.uint8], weight: NDArray[np.float32]) -> NDArray[np.uint8]:
    # In bytes, not floats: the picture may have tens of millions of pixels.
    share = Image.fromarray(np.rint(weight * np.float32(255)).astype(np.uint8))
    ground = Image.new("RGB", share.size, (background, background, background))
    return np.array(Image.composite(Image.fromarray(image), ground, share))


def _held(extent: int, side: float, low: int, high: int) -> float:
    """Return where a window of this side starts: in the extent's middle, moved to hold low to high."""
    return min(max((extent - side) / 2, high - side), low)


def _within(extent: int, side: float, start: float) -> float:
    """Return where a window of this side starts: at `start`, moved into the extent."""
    return min(max(start, 0.0), extent - side)


@dataclass(frozen=True)
class _Span:
    """One axis of a cut: target pixels `first` to `last` see the picture.

    `sources` are the picture's pixels to resample them from, `start` to `end` in these; `real` is False for
    those repeated from the edge. `inside` is, for every target pixel, the share that lies in the picture.
    """

    first: int
    last: int
    sources: NDArray[np.intp]
    real: NDArray[np.bool_]
    start: float
    end: float
    inside: NDArray[np.float64]

    @classmethod
    def of(cls, origin: float, step: float, size: int, extent: int) -> "_Span":
        edges = origin + step * np.arange(size + 1)
        inside = np.diff(np.clip(edges, 0, extent)) / step
        touched = np.flatnonzero(inside > 0)
        if not len(touched):
            raise ValueError(f"a window from {origin} to {edges[-1]} lies outside of a picture of {extent} pixels")
        # Only the target pixels that see the picture are resampled, so a wide window makes no huge copy.
        first, last = max(0, int(touched[0]) - _REACH), min(size, int(touched[-1]) + 1 + _REACH)
        reach = math.ceil(_REACH * max(step, 1))
        low, high = math.floor(edges[first]) - reach, math.ceil(edges[last]) + reach
        wanted = np.arange(low, high)
        sources = np.clip(wanted, 0, extent - 1)
        return cls(first, last, sources, sources == wanted, edges[first] - low, edges[last] - low, inside)
