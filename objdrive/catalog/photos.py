"""Photos: an object's image and mask, decoded under limits and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from objdrive.catalog.decoding import decode
from objdrive.catalog.mask_files import read_mask
from objdrive.catalog.plain_ground import mask_from_ground
from objdrive.errors import RowError

MIN_OBJECT_PIXELS = 64
OVERLAP_LIMIT = 0.95


@dataclass(frozen=True)
class Photo:
    """A decoded object: `image` (H, W, 3) uint8 RGB and `mask` (H, W) float32 in [0, 1], 1 on the object.

    `warnings` say what was assumed of the two files.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.float32]
    warnings: tuple[str, ...] = ()


def decode_photo(image: bytes, mask: bytes | Literal["auto"] | None, *, name: str) -> Photo:
    """Decode an object's image and mask; size limits are checked on the headers, before pixels are decoded.

    Both are turned upright by their EXIF orientation. An image's colours are turned into sRGB by its ICC profile, and
    one with transparency is composed onto white. The mask is its file's alpha channel if that varies, else the lighter
    of its two values, at the image's size.

    Args:
        image: the file's content, see `objdrive.catalog.decoding.READ`.
        mask: the same for the mask; None takes the image's own alpha channel, and without one, as `AUTO_MASK` does in
            any case, what stands before a plain ground.
        name: the object in messages.

    Raises:
        RowError: ``image_invalid``, ``image_truncated``, ``image_too_many_pixels``, the same with ``mask_``,
            ``image_too_small``, ``mask_absent``, ``mask_labels``, ``mask_size_mismatch``, ``mask_empty``,
            ``mask_full`` and ``mask_too_small``.
    """
    photo = decode(image, name, "image")
    rgb, alpha = _compose_on_white(photo.picture)
    pixels = np.array(rgb)
    if isinstance(mask, bytes):
        values, warnings = read_mask(mask, name, photo)
    elif mask is None and alpha is not None:
        values, warnings = np.asarray(alpha, dtype=np.float32) / np.float32(255), ()
    else:
        values, warnings = _from_ground(pixels, name)
    _check_mask(values, name)
    return Photo(pixels, values, (*photo.warnings, *warnings))


def masks_overlap(masks: Sequence[NDArray[np.float32]]) -> tuple[int, int, float] | None:
    """Find two masks of a scene that can't be told apart.

    Args:
        masks: (H, W) each, in [0, 1].

    Returns:
        The first pair whose intersection takes at least `OVERLAP_LIMIT` of the smaller one, and that share.
    """
    solid = [mask >= 0.5 for mask in masks]
    areas = [int(np.count_nonzero(mask)) for mask in solid]
    for first in range(len(solid)):
        for second in range(first + 1, len(solid)):
            smaller = min(areas[first], areas[second])
            share = int(np.count_nonzero(solid[first] & solid[second])) / max(smaller, 1)
            if share >= OVERLAP_LIMIT:
                return first, second, share
    return None


def _from_ground(image: NDArray[np.uint8], name: str) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    mask = mask_from_ground(image)
    if mask is None:
        raise RowError(
            "mask_absent",
            f"{name}: no mask is given, the image has no transparency to take it from, and its ground isn't plain: "
            "name a mask in the manifest or cut the object out",
        )
    return mask, ("no mask is given: it was taken from the picture, whose ground is plain",)


def _compose_on_white(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the picture in RGB, and its alpha channel unless it has none or is opaque."""
    if picture.mode != "RGBA":
        return picture.convert("RGB"), None
    alpha = picture.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return picture.convert("RGB"), None
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB"), alpha


def _check_mask(mask: NDArray[np.float32], name: str) -> None:
    pixels = np.count_nonzero(mask >= 0.5)
    if pixels == 0:
        raise RowError(
            "mask_empty",
            f"{name}: the mask is empty: its highest value is {mask.max() * 255:.0f} of 255, "
            "and the object is where it is at least half",
        )
    if pixels == mask.size:
        raise RowError(
            "mask_full",
            f"{name}: the mask covers the whole picture and would train the background in: "
            "is the mask missing or inverted?",
        )
    if pixels < MIN_OBJECT_PIXELS:
        raise RowError(
            "mask_too_small",
            f"{name}: the mask has {pixels} pixels on the object: at least {MIN_OBJECT_PIXELS} are needed",
        )
