"""Decoding: the bytes of a picture, which nobody vouches for, to pixels under limits."""

import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from objdrive.catalog.colour import ProfileError, to_srgb
from objdrive.catalog.sources import Role
from objdrive.errors import RowError

MAX_PIXELS = 64_000_000
MIN_SIDE = 16

READ = "PNG, JPEG, WebP, AVIF, HEIC, TIFF, BMP, GIF or JPEG 2000"
"""The formats that are read."""

_Decoder = Callable[[io.BytesIO], ImageFile.ImageFile]
_DECODERS: dict[bytes, _Decoder] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
    b"GIF87a": GifImageFile,
    b"GIF89a": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"\0\0\0\x0cjP  \r\n\x87\n": Jpeg2KImageFile,
    b"\xff\x4f\xff\x51": Jpeg2KImageFile,
}
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_DEEP = ("I", "F")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoded:
    """A picture, upright.

    `picture` has mode RGB, RGBA or L and 8 bits. `turn` is what its EXIF orientation did to the stored pixels, None if
    nothing. `warnings` say what was assumed.
    """

    picture: Image.Image
    turn: Image.Transpose | None
    warnings: tuple[str, ...]


def decode(data: bytes, name: str, role: Role) -> Decoded:
    """Decode a file; size limits are checked on its header, before pixels are decoded.

    An image's colours are turned into sRGB by its ICC profile; a mask's values are kept.

    Raises:
        RowError: ``image_invalid``, ``image_truncated``, ``image_too_many_pixels``, the same with ``mask_``, and
            ``image_too_small``.
    """
    decoder = _decoder(data, name, role)
    # Decoders meet untrusted bytes with a dozen kinds of exception.
    try:
        # Not Image.open(): above a limit of its own it warns or fails before the size can be told.
        picture: Image.Image = decoder(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise RowError(f"{role}_too_many_pixels", f"{name}: {_too_many(role)}: {error}") from error
    except Exception as error:
        raise _undecodable(name, role, error) from error
    _check_size(picture, name, role)
    if picture.mode in _DEEP:
        raise RowError(f"{role}_invalid", f"{name}: the {role} has 32 bits a channel: save it with 8 or 16")
    try:
        profile = picture.info.get("icc_profile")
        # Some decoders turn as they load, and forget that they did.
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
        picture = _loaded(picture, data)
        if picture.mode.startswith("I;16"):
            picture = _eight_bit(picture, role)
        ImageOps.exif_transpose(picture, in_place=True)
        warnings: tuple[str, ...] = ()
        if profile and role == "image":
            picture, warnings = _in_srgb(picture, profile)
        return Decoded(_plain(picture), turn, warnings)
    except Exception as error:
        raise _undecodable(name, role, error) from error


def _decoder(data: bytes, name: str, role: Role) -> _Decoder:
    if data[4:8] == b"ftyp":
        # The major brand, then a version, then brands that it is compatible with.
        length = min(int.from_bytes(data[:4]), 256)
        brands = {data[start : start + 4] for start in (8, *range(16, length, 4))}
        if brands & _AVIF:
            return AvifImageFile
        if brands & _HEIC:
            return _heif_decoder(name, role)
    for magic, decoder in _DECODERS.items():
        if data.startswith(magic):
            return decoder
    raise RowError(f"{role}_invalid", f"{name}: the {role} is not a {READ} file")


def _heif_decoder(name: str, role: Role) -> _Decoder:
    try:
        decoder: _Decoder = importlib.import_module("pillow_heif").HeifImageFile
    except ImportError as error:
        raise RowError(
            f"{role}_invalid",
            f"{name}: the {role} is a HEIC file: install objdrive[heif] to read it, or save it as JPEG",
        ) from error
    return decoder


def _loaded(picture: Image.Image, data: bytes) -> Image.Image:
    """The picture with its pixels, of which colours have 8 bits a channel."""
    picture.load()
    if not isinstance(picture, PngImageFile) or data[24] != 16 or data[25] not in (2, 4, 6):
        return picture
    # Pillow keeps the upper byte alone.
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16 or deep.shape[:2] != picture.size[::-1]:
        raise ValueError("its 16 bits a channel can't be read")
    order = cv2.COLOR_BGR2RGB if deep.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
    scaled = Image.fromarray(np.rint(cv2.cvtColor(deep, order) / 257).astype(np.uint8))
    scaled.info = picture.info
    return scaled


def _eight_bit(picture: Image.Image, role: Role) -> Image.Image:
    # Pillow's own conversion clips.
    values = np.asarray(picture)
    small_labels = role == "mask" and values.max() < 256
    grey = Image.fromarray((values if small_labels else np.rint(values / 257)).astype(np.uint8))
    grey.info = picture.info
    return grey


def _in_srgb(picture: Image.Image, profile: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    known = picture if picture.mode == "CMYK" else _plain(picture)
    try:
        return to_srgb(known, profile), ()
    except ProfileError as error:
        return known, (f"the image's colour profile can't be used, its colours are taken for sRGB's: {error}",)


def _undecodable(name: str, role: Role, error: Exception) -> RowError:
    if "truncated" in str(error).lower():
        return RowError(f"{role}_truncated", f"{name}: the {role} ends too early, upload it again: {error}")
    return RowError(f"{role}_invalid", f"{name}: the {role} can't be decoded: {error}")


def _too_many(role: Role) -> str:
    return f"the {role} has more than {MAX_PIXELS} pixels, scale it down"


def _check_size(picture: Image.Image, name: str, role: Role) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise RowError(f"{role}_too_many_pixels", f"{name}: {_too_many(role)}: it is {size_text(picture)}")
    # A small mask is a mask of the wrong size, which says more.
    if role == "image" and min(picture.size) < MIN_SIDE:
        raise RowError(
            "image_too_small",
            f"{name}: the image is {size_text(picture)} pixels: at least {MIN_SIDE} a side are needed",
        )


def size_text(picture: Image.Image) -> str:
    """A picture's size, as messages name it."""
    return f"{picture.width} x {picture.height}"


def _plain(picture: Image.Image) -> Image.Image:
    """In mode RGB, RGBA or L."""
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
