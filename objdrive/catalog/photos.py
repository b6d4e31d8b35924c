"""Photos: an object's image and mask, decoded under limits and checked."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from objdrive.catalog.sources import Role
from objdrive.errors import RowError

MAX_PIXELS = 64_000_000
MIN_SIDE = 16
MIN_OBJECT_PIXELS = 64
OVERLAP_LIMIT = 0.95

_DECODERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
}


@dataclass(frozen=True)
class Photo:
    """A decoded object: `image` (H, W, 3) uint8 RGB and `mask` (H, W) float32 in [0, 1], 1 on the object."""

    image: NDArray[np.uint8]
    mask: NDArray[np.float32]


def decode_photo(image: bytes, mask: bytes | None, *, name: str) -> Photo:
    """Decode an object's image and mask; size limits are checked on the headers, before pixels are decoded.

    Both are turned upright by their EXIF orientation. An image with transparency is composed onto white.
    The mask is its file's alpha channel if that varies, else the file's luminance.

    Args:
        image: the file's content, PNG, JPEG or WebP.
        mask: the same for the mask; None takes the image's own alpha channel.
        name: the object in messages.

    Raises:
        RowError: ``image_invalid``, ``image_truncated``, ``image_too_many_pixels``, the same with ``mask_``,
            ``image_too_small``, ``mask_absent``, ``mask_size_mismatch``, ``mask_empty``, ``mask_full`` and
            ``mask_too_small``.
    """
    picture = _decode(image, name, "image")
    rgb, alpha = _compose_on_white(picture)
    if mask is None:
        if alpha is None:
            raise RowError(
                "mask_absent",
                f"{name}: no mask is given and the image has no transparency to take it from: "
                "name a mask in the manifest or cut the object out",
            )
        grey = alpha
    else:
        grey = _mask_channel(_decode(mask, name, "mask"))
        if grey.size != picture.size:
            raise RowError(
                "mask_size_mismatch",
                f"{name}: the mask is {_size(grey)} pixels, the image {_size(picture)}: they must be equal",
            )
    values = np.asarray(grey, dtype=np.float32) / np.float32(255)
    _check_mask(values, name)
    return Photo(np.array(rgb), values)


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


def _decode(data: bytes, name: str, role: Role) -> Image.Image:
    """Decode to mode RGB, RGBA or L, upright."""
    decoder = next((d for magic, d in _DECODERS.items() if data.startswith(magic)), None)
    if decoder is None:
        raise RowError(f"{role}_invalid", f"{name}: the {role} is not a PNG, JPEG or WebP file")
    # Decoders meet untrusted bytes with a dozen kinds of exception.
    try:
        # Not Image.open(): above a limit of its own it warns or fails before the size can be told.
        picture: Image.Image = decoder(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise RowError(f"{role}_too_many_pixels", f"{name}: {_too_many(role)}: {error}") from error
    except Exception as error:
        raise _undecodable(name, role, error) from error
    _check_size(picture, name, role)
    try:
        ImageOps.exif_transpose(picture, in_place=True)
        return _eight_bit(picture)
    except Exception as error:
        raise _undecodable(name, role, error) from error


def _undecodable(name: str, role: Role, error: Exception) -> RowError:
    if "truncated" in str(error).lower():
        return RowError(f"{role}_truncated", f"{name}: the {role} ends too early, upload it again: {error}")
    return RowError(f"{role}_invalid", f"{name}: the {role} can't be decoded: {error}")


def _too_many(role: Role) -> str:
    return f"the {role} has more than {MAX_PIXELS} pixels, scale it down"


def _check_size(picture: Image.Image, name: str, role: Role) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise RowError(f"{role}_too_many_pixels", f"{name}: {_too_many(role)}: it is {_size(picture)}")
    # A small mask is a mask of the wrong size, which says more.
    if role == "image" and min(picture.size) < MIN_SIDE:
        raise RowError(
            "image_too_small",
            f"{name}: the image is {_size(picture)} pixels: at least {MIN_SIDE} a side are needed",
        )


def _size(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height}"


def _eight_bit(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips.
        return Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def _compose_on_white(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the picture in RGB, and its alpha channel unless it has none or is opaque."""
    if picture.mode != "RGBA":
        return picture.convert("RGB"), None
    alpha = picture.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return picture.convert("RGB"), None
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB"), alpha


def _mask_channel(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGBA":
        alpha = picture.getchannel("A")
        if len(set(alpha.getextrema())) > 1:
            return alpha
    return picture.convert("L")


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
