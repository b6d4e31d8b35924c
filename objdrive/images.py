"""Images and masks: reading sources, decoding them under limits, and the geometry of training views."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from objdrive.errors import RowError

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000
MIN_SIDE = 16
MIN_OBJECT_PIXELS = 64
OVERLAP_LIMIT = 0.95
ALONE_FILL = 0.9
"""Share of the view that the object takes when it is shown alone."""

_REACH = 3
"""How many target pixels the widest filter, Lanczos, reaches to each side."""

Role = Literal["image", "mask"]

_DECODERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
}


@dataclass(frozen=True)
class SourceMark:
    """A source file as storage describes it: `size` in bytes; `mark` changes when the file does."""

    uri: str
    size: int
    mark: str


@dataclass(frozen=True)
class Photo:
    """A decoded object: `image` (H, W, 3) uint8 RGB and `mask` (H, W) float32 in [0, 1], 1 on the object."""

    image: NDArray[np.uint8]
    mask: NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """A square in pixel coordinates (x to the right, y down); it may reach outside of the picture."""

    left: float
    top: float
    side: float


def stat_source(uri: str, *, role: Role = "image") -> SourceMark:
    """Look a source up without opening it.

    Raises:
        RowError: ``image_missing`` or ``mask_missing``; ``source_not_file`` for folders, pipes and devices;
            ``source_unreadable`` for anything else that storage reports.
    """
    try:
        fs, path = url_to_fs(uri, use_listings_cache=False)
        info = fs.info(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(uri, role) from error
    except Exception as error:
        raise _unreadable(uri, role, error) from error
    # Opening a pipe would wait for a writer for ever.
    if info["type"] != "file":
        raise RowError("source_not_file", f"the {role} {uri!r} is not a regular file ({info['type']})")
    if info["size"] is None:
        raise RowError("source_unreadable", f"the {role} {uri!r} has a server that doesn't tell its size")
    return SourceMark(uri, int(info["size"]), _modification_mark(info))


def read_source(mark: SourceMark, *, role: Role = "image") -> bytes:
    """Read a whole source.

    Raises:
        RowError: ``image_too_large`` (more than `MAX_BYTES`, nothing is read then) or ``image_missing``, with
            ``mask_`` for a mask; ``source_unreadable`` for anything else that storage reports.
    """
    if mark.size > MAX_BYTES:
        raise RowError(
            f"{role}_too_large",
            f"the {role} {mark.uri!r} has {mark.size} bytes: at most {MAX_BYTES} are allowed, scale it down",
        )
    try:
        fs, path = url_to_fs(mark.uri, use_listings_cache=False)
        data: bytes = fs.cat_file(path)
    except FileNotFoundError as error:
        raise _missing(mark.uri, role) from error
    except Exception as error:
        raise _unreadable(mark.uri, role, error) from error
    return data


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


def _missing(uri: str, role: Role) -> RowError:
    return RowError(f"{role}_missing", f"the {role} {uri!r} is missing or can't be read: check its address")


def _unreadable(uri: str, role: Role, error: Exception) -> RowError:
    # Caught broadly by the callers: storage back ends raise errors that have no base in common.
    return RowError("source_unreadable", f"the {role} {uri!r} can't be read: {type(error).__name__}: {error}")


def _modification_mark(info: dict[str, Any]) -> str:
    # Each file system has a key of its own; an ETag says more than a time.
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
    return next((str(info[key]) for key in keys if info.get(key)), "")


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


def encode_picture(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file of that kind (``PNG``, ``WEBP``), with options of Pillow's writer."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
