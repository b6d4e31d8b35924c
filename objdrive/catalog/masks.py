"""Masks whose edges follow the picture: careless ones are mended by GrabCut."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from objdrive.catalog.edges import change_along, colour_change
from objdrive.catalog.geometry import Window, bounding_box, cut, object_window
from objdrive.catalog.photos import MIN_OBJECT_PIXELS

# GrabCut works on a square of so many pixels around the object, whose longer side takes so much of it.
_EDGE = 256
_FILL = 0.6
# How far from the mask's edge it decides, in pixels of that square: an eleventh of the object's longer side inwards.
# Outwards it is further, as thin parts are lost whole.
_INWARDS = 14
_OUTWARDS = 30
# A colour is the ground's if it takes so many times as much of the ground as of the object.
_GROUNDS_OWN = 2
_COLOUR_LEVELS = 8
_SHADES = (1.0, 0.8)
# In its square, a hole is at least as wide: narrower are accents.
_HOLE = 5
_ROUNDS = 5
_NOISE = 4
_OBJECT = (cv2.GC_FGD, cv2.GC_PR_FGD)
# OpenCV looks at it only where there is no mask.
_NO_BOX = (0, 0, 1, 1)
# What one pass has found lets the next one look further.
_PASSES = 8
_SETTLED = 0.98
_TRIES = 2
# Masks are good guides as a rule: another edge must be where the picture clearly has more of one.
_CLEARLY = 1.5
_STRONGLY = 2.0
# Measured by `benchmarks/mending.py`: GrabCut's masks of drawings are told apart by 0.95 and more, those of photographs
# by less, unless it is right.
_TOLD_APART = 0.95
_HOPELESS = 0.9
_TILE = 8
# An edge is moved by so much of the object's longer side, and the mask stays as much the same.
_BAND = 0.02
_LEAST_KEPT = 0.9
# Large photos are looked at around the object, so many times its longer side, by so many pixels.
_LOOK = 1024
_MARGIN = 2


def mend_mask(
    image: NDArray[np.uint8], mask: NDArray[np.float32], others: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Mend a mask whose edge does not follow the picture, as it is too small, too large or jagged.

    GrabCut (Rother et al., SIGGRAPH 2004) decides anew in a band along the mask's edge, again until it has settled:
    once starting from all colours on the mask's two sides, once from those that lie beyond the band. Of its two results
    the one along whose edge the picture changes more is looked at.

    It is taken whole only on strong evidence: the picture changes several times as much along its edge as along the
    given one's, and colours alone tell its two sides apart, as they do in drawings and before plain grounds. Else it
    may move the given edge a little, where the picture then changes clearly more along it, and takes no part away and
    adds none.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) in [0, 1].
        others: (H, W) in [0, 1], where other objects are: nothing there becomes a part of this one.

    Returns:
        (H, W) in [0, 1]: `mask` itself where nothing better is found.
    """
    place = _Place.around(mask)
    seen = place.look(mask)
    barred = np.zeros_like(seen)
    if others is not None:
        barred[(place.look(others) >= 0.5) & (seen < 0.5)] = 1
    found = _mended(place.look(image), seen, barred)
    return mask if found is seen else place.put_back(found, mask.shape)


def _mended(image: NDArray[np.uint8], mask: NDArray[np.float32], barred: NDArray[np.float32]) -> NDArray[np.float32]:
    if mask.max() < 0.5:
        return mask
    found = [_settle(image, mask, barred, certain_only=certain_only) for certain_only in (False, True)]
    # All are judged where the largest is seen whole.
    window = object_window(np.maximum.reduce([mask, *found]), _FILL)
    picture = cut(image, mask, window, _EDGE)[0]
    change = colour_change(picture)

    def along(one: NDArray[np.float32]) -> float:
        return change_along(change, cut(image, one, window, _EDGE)[1])

    best = max(found, key=along)
    given = along(mask)
    if along(best) > _STRONGLY * given:
        _, seen, inside = cut(image, best, window, _EDGE)
        # What belongs to other objects says nothing of the ground's colours.
        looked_at = (inside >= 0.5) & (cut(image, barred, window, _EDGE)[1] < 0.5)
        if _told_apart(picture, seen >= 0.5, looked_at) >= _TOLD_APART:
            return best
    refined = _refined(mask, best)
    return refined if refined is not None and along(refined) > _CLEARLY * given else mask


def _told_apart(picture: NDArray[np.uint8], mask: NDArray[np.bool_], inside: NDArray[np.bool_]) -> float:
    """How many pixels their colours alone put on the right side of a mask, by the colours of other pixels; up to 1."""
    colours = _colours(cv2.GaussianBlur(picture, (0, 0), 1))
    y, x = np.indices(mask.shape) // _TILE
    learned = (y + x) % 2 == 0
    smallest = 0.5 / max(1, int(np.count_nonzero(inside)))
    own, ground = (_shares(colours[side & inside & learned]) + smallest for side in (mask, ~mask))
    right = (own > ground)[colours] == mask
    sides = [right[side & inside & ~learned] for side in (mask, ~mask)]
    return float(np.mean([side.mean() for side in sides])) if all(len(side) for side in sides) else 0.0


def _refined(mask: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The mask with its edge moved towards another one's by little; None if that is a large part of it."""
    solid, other = mask >= 0.5, found >= 0.5
    left, top, right, bottom = bounding_box(mask)
    band = _BAND * max(right - left, bottom - top)
    sides = (cv2.distanceTransform(side.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5) for side in (solid, ~solid))
    changed = (solid != other) & (np.maximum(*sides) <= band)
    reach = 2 * round(band / 4) + 1
    changed = cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_OPEN, np.ones((reach, reach), np.uint8)) > 0
    refined = np.where(changed, found, mask)
    return refined if intersection_over_union(solid, refined >= 0.5) >= _LEAST_KEPT else None


def intersection_over_union(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """How well two masks agree, from 0 to 1; 0 if both are empty."""
    return int(np.count_nonzero(one & other)) / max(1, int(np.count_nonzero(one | other)))


@dataclass(frozen=True)
class _Place:
    """The part of a photo around an object, and by how much it is scaled down to be looked at."""

    box: tuple[int, int, int, int]
    factor: int

    @classmethod
    def around(cls, mask: NDArray[np.float32]) -> "_Place":
        left, top, right, bottom = bounding_box(mask)
        height, width = mask.shape
        margin = _MARGIN * max(right - left, bottom - top)
        box = max(0, left - margin), max(0, top - margin), min(width, right + margin), min(height, bottom + margin)
        return cls(box, -(-max(box[2] - box[0], box[3] - box[1]) // _LOOK))

    def look(self, pixels: NDArray[Any]) -> NDArray[Any]:
        left, top, right, bottom = self.box
        part = pixels[top:bottom, left:right]
        if self.factor == 1:
            return part
        return np.array(Image.fromarray(part).reduce(self.factor))

    def put_back(self, found: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
        left, top, right, bottom = self.box
        size = right - left, bottom - top
        if self.factor > 1:
            # The last pixel of a side may stand for less than the others.
            box = 0, 0, size[0] / self.factor, size[1] / self.factor
            found = np.asarray(Image.fromarray(found).resize(size, Image.Resampling.BILINEAR, box))
        whole = np.zeros(shape, np.float32)
        whole[top:bottom, left:right] = found
        return whole


def _settle(
    image: NDArray[np.uint8], mask: NDArray[np.float32], barred: NDArray[np.float32], *, certain_only: bool
) -> NDArray[np.float32]:
    found = mask
    for number in range(1, _PASSES + 1):
        # Anew in each pass, so that it follows what grows.
        window = object_window(found, _FILL)
        picture, seen, inside = cut(image, found, window, _EDGE)
        closed = cut(image, barred, window, _EDGE)[1] >= 0.5
        # What is outside of the picture is neither the object nor what is around it.
        real = np.ix_((inside >= 0.5).any(axis=1), (inside >= 0.5).any(axis=0))
        before, after = seen >= 0.5, np.zeros(seen.shape, bool)
        if _one_sided(before[real]):
            return mask
        labels = _with_holes(picture[real], _labels(before[real], closed[real]))
        after[real] = _decide(picture[real], labels, certain_only=certain_only)
        if _one_sided(after[real]):
            return mask
        found = _put_back(after, window, mask.shape)
        if found.max() < 0.5:
            return mask
        if intersection_over_union(before, after) > _SETTLED:
            break
        # No more than its edge will be looked at.
        if number == _TRIES and _told_apart(picture, after, (inside >= 0.5) & ~closed) < _HOPELESS:
            break
    return found


def _one_sided(mask: NDArray[np.bool_]) -> bool:
    """There are too few pixels of the object, or of what is around it, to tell their colours apart."""
    pixels = int(np.count_nonzero(mask))
    return min(pixels, mask.size - pixels) < MIN_OBJECT_PIXELS


def _labels(found: NDArray[np.bool_], barred: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """GrabCut's: what is certain, and in the band along the edge what is probable."""
    solid = found.astype(np.uint8)
    depth = cv2.distanceTransform(solid, cv2.DIST_L2, cv2.DIST_MASK_5)
    beyond = cv2.distanceTransform(1 - solid, cv2.DIST_L2, cv2.DIST_MASK_5)
    labels = np.where(found, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    # Of a thin object too the innermost part is certain.
    labels[depth > min(_INWARDS, 0.7 * depth.max())] = cv2.GC_FGD
    labels[(beyond > _OUTWARDS) | barred] = cv2.GC_BGD
    return labels


def _with_holes(picture: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Doubt what is of the object by its place, and of the ground by its colours: a hole that was masked."""
    smooth = cv2.GaussianBlur(picture, (0, 0), 1)
    inside, ground = labels == cv2.GC_FGD, smooth[labels == cv2.GC_BGD]
    # The object's shadow lies in its holes.
    of_ground = np.maximum.reduce([_shares(_colours(ground * shade)) for shade in _SHADES])
    own = of_ground > _GROUNDS_OWN * _shares(_colours(smooth[inside]))
    alike = np.isin(labels, _OBJECT) & own[_colours(smooth)]
    holes = cv2.morphologyEx(alike.astype(np.uint8), cv2.MORPH_OPEN, np.ones((_HOLE, _HOLE), np.uint8))
    near = cv2.distanceTransform(1 - holes, cv2.DIST_L2, cv2.DIST_MASK_5) < _INWARDS
    doubted = np.where(inside & near, cv2.GC_PR_FGD, labels)
    return np.where(holes > 0, cv2.GC_PR_BGD, doubted).astype(np.uint8)


def _colours(picture: NDArray[Any]) -> NDArray[np.int_]:
    """(...): numbers of the colours of pixels (..., 3), similar ones alike."""
    numbers: NDArray[np.int_] = picture.astype(int) * _COLOUR_LEVELS // 256 @ (_COLOUR_LEVELS ** np.arange(3))
    return numbers


def _shares(colours: NDArray[np.int_]) -> NDArray[np.float64]:
    """How much each colour takes of all."""
    counts: NDArray[np.float64] = np.bincount(colours, minlength=_COLOUR_LEVELS**3) / max(1, len(colours))
    return counts


def _decide(picture: NDArray[np.uint8], labels: NDArray[np.uint8], *, certain_only: bool) -> NDArray[np.bool_]:
    if certain_only:
        # A ground of one flat colour would make a model that nothing but that colour fits.
        noise = np.random.default_rng(0).normal(0, _NOISE, picture.shape)
        picture = (picture + noise).clip(0, 255).astype(np.uint8)
    # It clusters colours at random: an adapter must not depend on what ran before.
    cv2.setRNGSeed(0)
    colours = np.zeros((1, 65)), np.zeros((1, 65))
    first = np.isin(labels, (cv2.GC_FGD, cv2.GC_BGD)) if certain_only else np.ones(labels.shape, bool)
    if _one_sided((found := np.isin(labels, _OBJECT))[first]):
        return found
    cv2.grabCut(picture[first][None], labels[first][None], _NO_BOX, *colours, 0, cv2.GC_INIT_WITH_MASK)
    cv2.grabCut(picture, labels, _NO_BOX, *colours, 1, cv2.GC_EVAL_FREEZE_MODEL)
    cv2.grabCut(picture, labels, _NO_BOX, *colours, _ROUNDS - 1, cv2.GC_EVAL)
    return np.isin(labels, _OBJECT)


def _put_back(found: NDArray[np.bool_], window: Window, shape: tuple[int, ...]) -> NDArray[np.float32]:
    scale = _EDGE / window.side
    placed = (scale, 0, -window.left * scale, 0, scale, -window.top * scale)
    small = Image.fromarray(found.astype(np.float32))
    size = shape[1], shape[0]
    return np.asarray(small.transform(size, Image.Transform.AFFINE, placed, Image.Resampling.BILINEAR))
