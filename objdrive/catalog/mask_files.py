"""Mask files: what their values and their size say of a photo, whatever tool wrote them."""

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from objdrive.catalog.decoding import Decoded, decode, size_text
from objdrive.catalog.edges import change_along, colour_change
from objdrive.errors import RowError

# Large files are looked at by so many pixels a side.
_LOOK = 1024
_LEAST_SHARE = 1e-3
# Values nearer to each other than the farthest ones are by so many times are one, with noise.
_APART = 8
_COLOURS = 256
_SHOWN = 8
_NEARLY_BLACK, _NEARLY_WHITE = 25, 230
_CLEARLY = 1.2
_MOST_OF_BORDER = 0.75

_LUMINANCE = np.array([0.299, 0.587, 0.114])


def read_mask(data: bytes, name: str, photo: Decoded) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Read a mask file for a photo.

    Args:
        data: the file's content.
        name: the object in messages.
        photo: what the mask is for.

    Returns:
        (H, W) in [0, 1], of the upright photo's size, and warnings that say what was assumed.

    Raises:
        RowError: of `decode`, ``mask_labels`` (it has more than two labels) or ``mask_size_mismatch``.
    """
    decoded = decode(data, name, "mask")
    grey, warnings = _object_values(decoded.picture, name)
    mask, assumed = _placed(grey, decoded.turn, photo, name)
    values = np.asarray(mask, dtype=np.float32) / np.float32(255)
    return values, (*warnings, *assumed, *_inverted(photo.picture, mask))


def _object_values(picture: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """In mode L: 255 is the object."""
    if picture.mode == "RGBA":
        alpha = picture.getchannel("A")
        if len(set(alpha.getextrema())) > 1:
            return alpha, ()
    colours = picture.convert("RGB")
    labels = _labels(_looked_at(colours))
    if len(labels) > 2:
        listed = ", ".join(map(_label_text, labels[:_SHOWN])) + (", ..." if len(labels) > _SHOWN else "")
        raise RowError(
            "mask_labels",
            f"{name}: the mask has {len(labels)} labels: {listed}; "
            "give each object a mask of its own with two values, the lighter one on the object",
        )
    if len(labels) < 2:
        return picture.convert("L"), ()
    ground, thing = labels
    if ground.max() <= _NEARLY_BLACK and thing.min() >= _NEARLY_WHITE:
        return picture.convert("L"), ()
    assumed = (
        f"the mask's values are {_label_text(ground)} and {_label_text(thing)}: the lighter is taken for the object"
    )
    return _between(colours, ground, thing), (assumed,)


def _looked_at(picture: Image.Image) -> NDArray[np.uint8]:
    step = -(-max(picture.size) // _LOOK)
    return np.ascontiguousarray(np.asarray(picture)[::step, ::step])


def _labels(pixels: NDArray[np.uint8]) -> list[NDArray[np.int_]]:
    """The colours that fill areas of a picture (H, W, 3), dark ones first; colours of edges and noise are none.

    Where colours of areas lead to each other step by step, they are a soft mask's, and one label.
    """
    square = np.ones((3, 3), np.uint8)
    flat = (cv2.erode(pixels, square) == cv2.dilate(pixels, square)).all(axis=-1)
    numbers = pixels @ (256 ** np.arange(3))
    found, counts = np.unique(numbers[flat], return_counts=True)
    lossless = len(np.unique(numbers)) == len(found)
    if not lossless and len(found) > 2:
        # The most frequent come first, and stand for those that are near to them.
        order = np.argsort(-counts, kind="stable")[:_COLOURS]
        found = found[order][counts[order] >= _LEAST_SHARE * counts.sum()]
        return sorted(_apart(_colours(found)), key=_luminance)
    return sorted(_colours(found), key=_luminance)


def _colours(numbers: NDArray[np.int_]) -> NDArray[np.int_]:
    colours: NDArray[np.int_] = np.stack([numbers % 256, numbers // 256 % 256, numbers // 256**2], axis=-1)
    return colours


def _apart(colours: NDArray[np.int_]) -> NDArray[np.int_]:
    """The first of each chain of near colours (N, 3)."""
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    near = (distances < distances.max() / _APART).astype(int)
    while not np.array_equal(linked := np.minimum(near @ near, 1), near):
        near = linked
    first: NDArray[np.int_] = colours[np.unique(near.argmax(axis=1))]
    return first


def _luminance(colour: NDArray[np.int_]) -> float:
    return float(colour @ _LUMINANCE)


def _label_text(colour: NDArray[np.int_]) -> str:
    red, green, blue = (int(value) for value in colour)
    return f"{red}" if red == green == blue else f"({red}, {green}, {blue})"


def _between(picture: Image.Image, ground: NDArray[np.int_], thing: NDArray[np.int_]) -> Image.Image:
    """How far on the way from one colour to the other each pixel is, in mode L."""
    way = (thing - ground) / np.square(thing - ground).sum()
    share = np.asarray(picture, dtype=np.float32) @ way.astype(np.float32) - np.float32(ground @ way)
    return Image.fromarray(np.rint(255 * share.clip(0, 1)).astype(np.uint8))


def _placed(
    mask: Image.Image, own_turn: Image.Transpose | None, photo: Decoded, name: str
) -> tuple[Image.Image, tuple[str, ...]]:
    """The mask on the upright photo: turned as it was, and at its size."""
    size = photo.picture.size
    as_given = _resampled(mask, size)
    turned = None
    # A mask that says how it is to be turned leaves no doubt.
    if photo.turn is not None and own_turn is None:
        turned = _resampled(mask.transpose(photo.turn), size)
    scaled = (
        ()
        if mask.size in (size, size[::-1])
        else (f"the mask is {size_text(mask)} pixels, the image {size_text(photo.picture)}: it was resampled",)
    )
    if as_given is None and turned is None:
        raise RowError(
            "mask_size_mismatch",
            f"{name}: the mask is {size_text(mask)} pixels, the image {size_text(photo.picture)}: "
            "they must have the same shape",
        )
    if turned is None:
        assert as_given is not None
        return as_given, scaled
    if as_given is None:
        return turned, (
            *scaled,
            "the mask fits the photo as it is stored: it was turned by the photo's EXIF orientation",
        )
    return _better_followed(as_given, turned, photo.picture, scaled)


def _resampled(mask: Image.Image, size: tuple[int, int]) -> Image.Image | None:
    """The mask at this size, None if it has another shape."""
    if mask.size == size:
        return mask
    # Sides of masks are rounded to whole pixels.
    if abs(mask.width * size[1] - mask.height * size[0]) > max(size):
        return None
    larger = mask.width < size[0]
    return mask.resize(size, Image.Resampling.BILINEAR if larger else Image.Resampling.BOX)


def _better_followed(
    as_given: Image.Image, turned: Image.Image, picture: Image.Image, scaled: tuple[str, ...]
) -> tuple[Image.Image, tuple[str, ...]]:
    given_change, turned_change = (_change_along(picture, mask) for mask in (as_given, turned))
    if turned_change > _CLEARLY * given_change:
        return turned, (
            *scaled,
            "the mask was drawn on the photo as it is stored, by the picture's edges: "
            "it was turned by the photo's EXIF orientation",
        )
    if given_change > _CLEARLY * turned_change:
        return as_given, scaled
    return as_given, (
        *scaled,
        "the photo has an EXIF orientation, and its edges don't tell whether the mask has it too: "
        "it is taken to be upright",
    )


def _change_along(picture: Image.Image, mask: Image.Image) -> float:
    share = _small(mask).astype(np.float32) / np.float32(255)
    return change_along(colour_change(_small(picture.convert("RGB"))), share)


def _small(picture: Image.Image) -> NDArray[np.uint8]:
    step = -(-max(picture.size) // _LOOK)
    return np.array(picture.reduce(step) if step > 1 else picture)


def _inverted(picture: Image.Image, mask: Image.Image) -> tuple[str, ...]:
    """A warning if what is masked lies all around, and is the plainer."""
    solid = _small(mask) >= 128
    border = np.concatenate([solid[0], solid[-1], solid[:, 0], solid[:, -1]])
    if border.mean() < _MOST_OF_BORDER or solid.all():
        return ()
    change = colour_change(_small(picture.convert("RGB")))
    inner = cv2.erode(solid.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=1) > 0
    outer = cv2.erode((~solid).astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=1) > 0
    if not inner.any() or not outer.any() or change[inner].mean() >= change[outer].mean():
        return ()
    return ("the mask covers most of the picture's border and looks inverted: it is used as it is",)
