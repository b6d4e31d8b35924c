"""Where in a place of any shape an object's own pixels stand, and how large."""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from objdrive.catalog.geometry import bounding_box
from objdrive.catalog.photos import Photo

_FITTING_EDGE = 96
"""Longer side of the grid on which room for an object is looked for."""
_PARTS = tuple(0.96**power for power in range(114))
"""Sizes that are tried, in parts of what the place's box has room for: down to a hundredth."""
_SMALLEST = 8
"""Longer side in pixels: what is smaller tells nothing of an object."""
_MOST_OUTSIDE = 0.005
"""Share of the object that may lie outside of its place: of its edge, to the grid's precision."""
_PIECES_EDGE = 1024
"""Longer side of the grid on which a place's pieces are told apart."""
_ALL = 0.9
"""Of what a place shows most of, the share that counts as its inside: a mask's soft edge is not, its noise is."""

Where = tuple[int, int, int, int]
"""Left, top, width and height."""


def stand(photo: Photo, place: NDArray[np.uint8]) -> Where:
    """Where an object stands in a place that may be soft, stippled, or in several pieces: in its largest piece.

    Args:
        photo: the object and its mask.
        place: (H, W), 255 where something may stand, 0 where nothing may; the highest is above 0.

    Returns:
        Left, top, width and height of the object's box.
    """
    inside = place >= max(1, _ALL * int(place.max()))
    left, top, right, bottom = _largest_piece(inside)
    across, down, *size = fit(photo, inside[top:bottom, left:right].astype(np.float32))
    return left + across, top + down, size[0], size[1]


def fit(photo: Photo, place: NDArray[np.float32]) -> Where:
    """Where the whole object is at its largest in a place of any shape, as low as it can stand.

    Where no size shows it whole, such as in a thin ring, it is as large as the place's box, and what reaches out is
    not seen.

    Args:
        photo: the object and its mask.
        place: (H, W) in [0, 1], 1 where something may stand; it reaches to all four edges.

    Returns:
        Left, top, width and height of the object's box in the place's.
    """
    left, top, right, bottom = bounding_box(photo.mask)
    shape = photo.mask[top:bottom, left:right]
    height, width = place.shape
    largest = min(width / (right - left), height / (bottom - top))
    coarse = min(1.0, _FITTING_EDGE / max(width, height))
    closed = 1 - _scaled(place, max(1, round(width * coarse)), max(1, round(height * coarse)))
    whole = max(1, round((right - left) * largest)), max(1, round((bottom - top) * largest))
    for part in _PARTS:
        size = max(1, round((right - left) * largest * part)), max(1, round((bottom - top) * largest * part))
        if size != whole and max(size) < _SMALLEST:
            break
        # The place is rounded to cells, and what is as wide as it takes as many.
        cells = min(_cells(size[0] * coarse), closed.shape[1]), min(_cells(size[1] * coarse), closed.shape[0])
        object_there = _scaled(shape, *cells)
        # How much of the object is outside of the place, for every position of its upper left corner.
        outside = cv2.matchTemplate(closed, object_there, cv2.TM_CCORR)
        rows, columns = np.nonzero(outside <= _MOST_OUTSIDE * object_there.sum())
        if len(rows) == 0:
            continue
        lowest = columns[rows == rows.max()]
        middle = lowest[np.abs(lowest - (closed.shape[1] - object_there.shape[1]) / 2).argmin()]
        free = width - size[0], height - size[1]
        # In the middle and on the ground to the pixel, where the coarse grid says so.
        across = free[0] // 2 if abs(2 * middle - outside.shape[1] + 1) <= 1 else round(middle / coarse)
        down = free[1] if rows.max() == outside.shape[0] - 1 else round(rows.max() / coarse)
        return min(across, free[0]), min(down, free[1]), *size
    return (width - whole[0]) // 2, height - whole[1], *whole


def _cells(length: float) -> int:
    """Of the grid, that a length takes: a part of one is one, or a small object would be cut off by so much."""
    return max(1, math.ceil(length - 1e-6))


def _largest_piece(inside: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (exclusive) of the connected piece of (H, W) with the largest area."""
    height, width = inside.shape
    coarse = min(1.0, _PIECES_EDGE / max(width, height))
    # At least a half of each cell.
    grid = _scaled(inside.view(np.uint8), max(1, round(width * coarse)), max(1, round(height * coarse)))
    _, _, stats, _ = cv2.connectedComponentsWithStats((grid >= 0.5).astype(np.uint8))
    left, top, right, bottom = 0, 0, width, height
    # The first is what is outside.
    if len(stats) > 1:
        x, y, wide, high, _ = stats[1 + stats[1:, cv2.CC_STAT_AREA].argmax()]
        scale = width / grid.shape[1], height / grid.shape[0]
        slack = 0 if coarse == 1 else 1
        left, top = max(0, int((x - slack) * scale[0])), max(0, int((y - slack) * scale[1]))
        right = min(width, math.ceil((x + wide + slack) * scale[0]))
        bottom = min(height, math.ceil((y + high + slack) * scale[1]))
    part = inside[top:bottom, left:right]
    across, down = np.flatnonzero(part.any(axis=0)), np.flatnonzero(part.any(axis=1))
    return left + int(across[0]), top + int(down[0]), left + int(across[-1]) + 1, top + int(down[-1]) + 1


def _scaled(shares: NDArray[np.float32] | NDArray[np.uint8], width: int, height: int) -> NDArray[np.float32]:
    return np.asarray(cv2.resize(shares, (width, height), interpolation=cv2.INTER_AREA), dtype=np.float32)
