"""Masks of objects before a plain ground, taken from the picture alone."""

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# The picture is looked at by so many pixels a side.
_LOOK = 512
# How far a pixel may be from the ground's colour, in CIELAB; a ground that is plain has nearly all of the border so.
_NEAR = 6.0
_MOST = 0.9
_RIM = 0.02
_FIT_ROUNDS = 4
_SPECK = 2e-3
_LEAST, _LARGEST = 5e-3, 0.95
_BAND = 4
_ROUNDS = 3
_NO_BOX = (0, 0, 1, 1)


def mask_from_ground(image: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """Tell an object from the plain ground that it stands before, as in a shop's photo.

    The ground's colour may run evenly across the picture, as light falls off. What has it and is joined to the border
    is ground.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (H, W) in [0, 1], or None: the ground is not plain, or nothing stands before it.
    """
    height, width = image.shape[:2]
    scale = min(1.0, _LOOK / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    distance = _from_ground(picture)
    if distance is None:
        return None
    ground = _joined_to_border(distance < _NEAR)
    found = _without_specks(_sharpened(picture, ~ground))
    share = found.mean()
    if not _LEAST <= share <= _LARGEST:
        return None
    soft = Image.fromarray(found.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(soft)


def _from_ground(picture: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """(H, W): how far each colour is from the ground's there; None if the border is not plain."""
    lab = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    height, width = lab.shape[:2]
    rim = max(1, round(_RIM * min(height, width)))
    border = np.ones((height, width), bool)
    border[rim:-rim, rim:-rim] = False
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).reshape(-1, 6)
    colours, on_border = lab.reshape(-1, 3), border.reshape(-1)
    near = np.linalg.norm(colours - np.median(colours[on_border], axis=0), axis=-1) < 4 * _NEAR
    for _ in range(_FIT_ROUNDS):
        used = on_border & near
        if used.sum() < _MOST * on_border.sum():
            return None
        fit = np.linalg.lstsq(terms[used], colours[used], rcond=None)[0]
        distance = np.linalg.norm(colours - terms @ fit, axis=-1)
        near = distance < _NEAR
    return None if near[on_border].mean() < _MOST else distance.reshape(height, width).astype(np.float32)


def _joined_to_border(alike: NDArray[np.bool_]) -> NDArray[np.bool_]:
    framed = np.pad(alike, 1, constant_values=True).astype(np.uint8)
    _, parts = cv2.connectedComponents(framed, connectivity=4)
    joined: NDArray[np.bool_] = parts == parts[0, 0]
    return joined[1:-1, 1:-1]


def _sharpened(picture: NDArray[np.uint8], found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """GrabCut's decision along the edge."""
    solid = found.astype(np.uint8)
    square = np.ones((2 * _BAND + 1, 2 * _BAND + 1), np.uint8)
    sure, out = cv2.erode(solid, square) > 0, cv2.dilate(solid, square) == 0
    if not sure.any() or not out.any():
        return found
    labels = np.where(found, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[sure], labels[out] = cv2.GC_FGD, cv2.GC_BGD
    # It clusters colours at random.
    cv2.setRNGSeed(0)
    cv2.grabCut(picture, labels, _NO_BOX, np.zeros((1, 65)), np.zeros((1, 65)), _ROUNDS, cv2.GC_INIT_WITH_MASK)
    return np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))


def _without_specks(found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    count, parts, stats, _ = cv2.connectedComponentsWithStats(found.astype(np.uint8), connectivity=8)
    large = [part for part in range(1, count) if stats[part, cv2.CC_STAT_AREA] >= _SPECK * found.size]
    return np.isin(parts, large)
