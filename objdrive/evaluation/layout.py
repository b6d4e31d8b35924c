"""Where things are in a drawn picture: told from the backdrop, which a picture's border shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

_BORDER = 0.08
_SHARE_OF_BORDER = 0.06
_USUAL = 0.75
_MARGIN = 1.3
_LEAST_DIFFERENCE = 12.0
_LEAST_AREA = 0.015
_LEAST_OF_LARGEST = 0.2


@dataclass(frozen=True)
class Box:
    """Where a thing is, in parts of the picture's edge (x to the right, y down)."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """Share of the picture that it takes."""
        return (self.right - self.left) * (self.bottom - self.top)


def foreground(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(H, W): what differs from the backdrop, in a picture (H, W, 3).

    A place belongs to the backdrop if its colour, averaged over its neighbours, is about as near to a share of the
    border's colours as most of the border itself is. A thing that reaches the border takes too small a share of it to
    count as backdrop; a checkered cloth has large shares of both its colours.
    """
    edge = max(2, round(_BORDER * min(picture.shape[:2])))
    colours = ndimage.uniform_filter(picture.astype(np.float32), size=(3, 3, 1))
    border = np.ones(picture.shape[:2], bool)
    border[edge:-edge, edge:-edge] = False
    seen = colours[border]
    like = max(4, round(_SHARE_OF_BORDER * len(seen)))
    tree = cKDTree(seen)
    apart = tree.query(colours.reshape(-1, 3), k=[like])[0].reshape(border.shape)
    usual = float(np.quantile(tree.query(seen, k=[like + 1])[0], _USUAL))
    differs = apart > max(_LEAST_DIFFERENCE, _MARGIN * usual)
    whole: NDArray[np.bool_] = ndimage.binary_fill_holes(ndimage.binary_opening(ndimage.binary_closing(differs)))
    return whole


def find_things(picture: NDArray[np.uint8]) -> list[Box]:
    """Boxes of the things in a picture (H, W, 3), the largest first; specks beside a larger thing do not count."""
    shown = foreground(picture)
    labels, count = ndimage.label(shown, structure=np.ones((3, 3)))
    areas = ndimage.sum_labels(shown, labels, range(1, count + 1))
    least = max(_LEAST_AREA * shown.size, _LEAST_OF_LARGEST * max(areas, default=0.0))
    places = ndimage.find_objects(labels)
    height, width = shown.shape
    return [
        Box(x.start / width, y.start / height, x.stop / width, y.stop / height)
        for (y, x), area in sorted(zip(places, areas, strict=True), key=lambda pair: -pair[1])
        if area >= least
    ]


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of some boxes."""
    return Box(
        min(one.left for one in boxes),
        min(one.top for one in boxes),
        max(one.right for one in boxes),
        max(one.bottom for one in boxes),
    )


def overlap(one: Box, other: Box) -> float:
    """Area that two boxes share, over the area that they cover together; 1 if they are the same."""
    across = min(one.right, other.right) - max(one.left, other.left)
    down = min(one.bottom, other.bottom) - max(one.top, other.top)
    shared = max(0.0, across) * max(0.0, down)
    return shared / (one.area + other.area - shared)


def spread(boxes: Sequence[Box]) -> float:
    """How differently some pictures of one prompt are laid out: the mean of ``1 - overlap`` over all pairs of boxes.

    Raises:
        ValueError: fewer than two boxes.
    """
    if len(boxes) < 2:
        raise ValueError(f"{len(boxes)} box(es) have no spread: at least two are needed")
    return float(np.mean([1 - overlap(one, other) for one, other in combinations(boxes, 2)]))
