import io
import os
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from objdrive.catalog.geometry import Window, bounding_box, close_window, cut, object_alone, object_window, whole_window
from objdrive.catalog.photos import decode_photo, masks_overlap
from objdrive.catalog.sources import MAX_BYTES, Role, SourceMark, read_source, stat_source
from objdrive.errors import RowError

Floats = NDArray[np.float32]
ORIENTATION = 0x0112
# What a viewer does to the stored pixels, from the EXIF standard's table of orientations.
UPRIGHT: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def encode(picture: Image.Image | NDArray[Any], file_format: str = "PNG", **options: Any) -> bytes:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def colours(height: int = 32, width: int = 48) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 5, y * 7, (x + y) * 3], axis=-1).astype(np.uint8)


def box_mask(height: int = 32, width: int = 48, box: tuple[int, int, int, int] = (10, 8, 30, 24)) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 255
    return mask


def soft_box(height: int, width: int, box: tuple[int, int, int, int]) -> Floats:
    return (box_mask(height, width, box) / 255).astype(np.float32)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"x") + png_chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    canvas = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


IMAGE = encode(colours())
MASK = encode(box_mask())


def code_of(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        call()
    return caught.value.code, str(caught.value)


# Sources


def test_source_is_marked_and_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"picture")
    mark = stat_source(str(path))
    assert (mark.uri, mark.size) == (str(path), 7)
    assert read_source(mark) == b"picture"
    assert stat_source(str(path)) == mark
    os.utime(path, (1, 1))
    assert stat_source(str(path)).mark != mark.mark


def test_memory_source_and_links(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/shop/a.png", b"picture")
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "link.png").symlink_to("a.png")
    for uri in ("memory://shop/a.png", f"file://{tmp_path}/a.png", str(tmp_path / "link.png")):
        mark = stat_source(uri)
        assert mark.mark
        assert read_source(mark) == b"picture"


def fifo(folder: Path) -> str:
    os.mkfifo(folder / "pipe.png")
    return str(folder / "pipe.png")


def linked_fifo(folder: Path) -> str:
    (folder / "link.png").symlink_to(fifo(folder))
    return str(folder / "link.png")


def below_a_file(folder: Path) -> str:
    (folder / "a.png").write_bytes(b"")
    return f"{folder}/a.png/b.png"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda d: f"{d}/none.png", "{role}_missing"),
        (below_a_file, "{role}_missing"),
        (lambda d: "memory://none/none.png", "{role}_missing"),
        (lambda d: str(d), "source_not_file"),
        (lambda d: "/dev/zero", "source_not_file"),
        (fifo, "source_not_file"),
        (linked_fifo, "source_not_file"),
        (lambda d: f"{d}/{'x' * 300}.png", "source_unreadable"),
        (lambda d: "nonesuch://bucket/a.png", "source_unreadable"),
    ],
)
@pytest.mark.parametrize("role", ["image", "mask"])
def test_source_faults(tmp_path: Path, make: Callable[[Path], str], code: str, role: Role) -> None:
    uri = make(tmp_path)
    found, message = code_of(lambda: stat_source(uri, role=role))
    assert found == code.format(role=role)
    assert f"the {role} {uri!r}" in message


@pytest.mark.parametrize("role", ["image", "mask"])
def test_read_faults(tmp_path: Path, role: Role) -> None:
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    found, message = code_of(lambda: read_source(stat_source(str(huge)), role=role))
    assert found == f"{role}_too_large"
    assert str(MAX_BYTES + 1) in message

    gone = SourceMark(str(tmp_path / "gone.png"), 1, "")
    assert code_of(lambda: read_source(gone, role=role))[0] == f"{role}_missing"

    # A regular file whose first page isn't mapped: reading it is an I/O error.
    broken = stat_source("/proc/self/mem", role=role)
    found, message = code_of(lambda: read_source(broken, role=role))
    assert found == "source_unreadable"
    assert "OSError" in message


# Decoding


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})]
)
def test_formats(file_format: str, options: dict[str, Any]) -> None:
    photo = decode_photo(encode(colours(), file_format, **options), MASK, name="mug")
    assert photo.image.dtype == np.uint8
    assert photo.mask.dtype == np.float32
    # JPEG loses some colour; its chroma has half the resolution.
    assert np.abs(photo.image.astype(int) - colours()).mean() < (6 if file_format == "JPEG" else 1e-9)
    np.testing.assert_array_equal(photo.mask, box_mask() / 255)


def grey_ramp() -> NDArray[np.uint8]:
    return np.tile(np.arange(48, dtype=np.uint8) * 5, (32, 1))


def palette_with_transparency() -> bytes:
    picture = Image.fromarray(np.where(box_mask() > 0, 1, 0).astype(np.uint8), "P")
    picture.putpalette([10, 20, 30, 200, 100, 50])
    return encode(picture, transparency=0)


def cmyk() -> Image.Image:
    inks = np.zeros((32, 48, 4), np.uint8)
    inks[..., 0] = 255
    return Image.fromarray(inks, "CMYK")


def grey(values: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def sixteen_bit(values: NDArray[Any]) -> bytes:
    return encode(np.asarray(values, dtype=np.uint16))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(Image.fromarray(box_mask()).convert("1")), grey(box_mask())),
        (encode(grey_ramp()), grey(grey_ramp())),
        # 257 = 65535 / 255: full scale stays full scale, and nothing above 255 clips.
        (sixteen_bit(grey_ramp().astype(np.uint16) * 257), grey(grey_ramp())),
        (sixteen_bit(np.full((32, 48), 32768)), np.full((32, 48, 3), 128)),
        (encode(Image.merge("LA", [Image.fromarray(grey_ramp()), Image.fromarray(box_mask())])), None),
        (palette_with_transparency(), np.where(box_mask()[..., None] > 0, [200, 100, 50], 255)),
        (encode(Image.fromarray(grey_ramp(), "L").convert("P")), grey(grey_ramp())),
        (encode(np.dstack([colours(), box_mask()])), np.where(box_mask()[..., None] > 0, colours(), 255)),
        (encode(np.dstack([colours(), np.full((32, 48), 255, np.uint8)])), colours()),
        (encode(cmyk(), "JPEG"), np.broadcast_to([0, 255, 255], (32, 48, 3))),
    ],
    ids=["1", "L", "I;16", "I;16 half", "LA", "P transparent", "P", "RGBA", "RGBA opaque", "CMYK"],
)
def test_every_mode_becomes_rgb(data: bytes, expected: NDArray[Any] | None) -> None:
    expected = grey(np.where(box_mask() > 0, grey_ramp(), 255)) if expected is None else expected
    photo = decode_photo(data, MASK, name="mug")
    assert np.abs(photo.image.astype(int) - expected).max() <= (2 if data.startswith(b"\xff\xd8") else 0)


def test_sixteen_bit_colour_png_is_scaled() -> None:
    # Pillow can't write these. A row is one filter byte, then two bytes a channel.
    row = b"\0" + struct.pack(">HHH", 65535, 32768, 0) * 20
    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    data += png_chunk(b"IDAT", zlib.compress(row * 20)) + png_chunk(b"IEND", b"")
    photo = decode_photo(data, encode(box_mask(20, 20, (2, 2, 12, 12))), name="mug")
    np.testing.assert_array_equal(photo.image, np.broadcast_to([255, 128, 0], (20, 20, 3)))


def test_half_transparent_colour_is_composed_onto_white() -> None:
    pixels = np.zeros((32, 48, 4), np.uint8)
    pixels[..., 3] = np.where(box_mask() > 0, 204, 51)
    photo = decode_photo(encode(pixels), None, name="mug")
    np.testing.assert_array_equal(photo.image, grey(np.where(box_mask() > 0, 51, 204)))
    np.testing.assert_allclose(photo.mask, np.where(box_mask() > 0, 0.8, 0.2), atol=1e-6)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_orientation_turns_image_and_mask(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[file_format]
    upright = UPRIGHT[orientation](colours())
    upright_mask = UPRIGHT[orientation](box_mask())

    turned = encode(colours(), file_format, exif=exif, **options)
    photo = decode_photo(turned, encode(upright_mask), name="mug")
    assert np.abs(photo.image.astype(int) - upright).max() <= (4 if file_format == "JPEG" else 0)

    turned_mask = encode(grey(box_mask()), file_format, exif=exif, **options)
    photo = decode_photo(encode(upright), turned_mask, name="mug")
    assert np.abs(photo.mask - upright_mask / 255).max() <= 0.02


def test_first_frame_of_an_animation() -> None:
    first, second = Image.fromarray(colours()), Image.fromarray(255 - colours())
    for options in ({"file_format": "WEBP", "lossless": True}, {"file_format": "PNG"}):
        data = encode(first, save_all=True, append_images=[second], **options)
        np.testing.assert_array_equal(decode_photo(data, MASK, name="mug").image, colours())


def varying(values: NDArray[Any], alpha: NDArray[Any]) -> bytes:
    return encode(np.dstack([grey(values), alpha]).astype(np.uint8))


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        encode(grey(box_mask())),
        encode(Image.fromarray(box_mask()).convert("1")),
        sixteen_bit(box_mask().astype(np.uint16) * 257),
        encode(box_mask(), "WEBP", lossless=True),
        varying(np.zeros((32, 48)), box_mask()),
        varying(255 - box_mask(), box_mask()),
        varying(box_mask(), np.full((32, 48), 255)),
        varying(box_mask(), np.zeros((32, 48))),
        palette_with_transparency(),
    ],
    ids=["L", "RGB", "1", "I;16", "WebP", "alpha", "alpha wins", "opaque", "constant alpha", "palette alpha"],
)
def test_mask_kinds(mask: bytes) -> None:
    np.testing.assert_array_equal(decode_photo(IMAGE, mask, name="mug").mask, box_mask() / 255)


def test_soft_masks_stay_soft() -> None:
    mask = box_mask()
    mask[8:24, 30:34] = 100
    photo = decode_photo(IMAGE, encode(mask), name="mug")
    assert photo.mask[10, 31] == pytest.approx(100 / 255)


def test_own_alpha_is_the_mask() -> None:
    for file_format in ("PNG", "WEBP"):
        data = encode(np.dstack([colours(), box_mask()]), file_format, lossless=True)
        np.testing.assert_array_equal(decode_photo(data, None, name="mug").mask, box_mask() / 255)


# Faults of pictures


def without_end(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def noise(height: int = 64, width: int = 64) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


BROKEN = [
    (b"", "{role}_invalid", "PNG, JPEG or WebP"),
    (b"no picture", "{role}_invalid", "PNG, JPEG or WebP"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "{role}_invalid", "PNG, JPEG or WebP"),
    (encode(colours(), "GIF"), "{role}_invalid", "PNG, JPEG or WebP"),
    (encode(colours(), "TIFF"), "{role}_invalid", "PNG, JPEG or WebP"),
    (b"RIFF\x24\0\0\0WAVEfmt ", "{role}_invalid", "can't be decoded"),
    (IMAGE[:20], "{role}_truncated", "ends too early"),
    (IMAGE.replace(b"IHDR", b"JHDR"), "{role}_invalid", "can't be decoded"),
    (b"\xff\xd8\xff\xe0" + b"\0" * 50, "{role}_invalid", "can't be decoded"),
    (without_end(encode(noise())), "{role}_truncated", "truncated"),
    (without_end(encode(noise(), "JPEG")), "{role}_truncated", "truncated"),
    (without_end(encode(noise(), "WEBP")), "{role}_invalid", "can't be decoded"),
    (png_header(30_000, 30_000), "{role}_too_many_pixels", "30000 x 30000"),
    (png_header(8_001, 8_000), "{role}_too_many_pixels", "8001 x 8000"),
    (png_header(10_000, 10_000), "{role}_too_many_pixels", "10000 x 10000"),
    (webp_header(16_384, 16_384), "{role}_too_many_pixels", "64000000"),
]


@pytest.mark.parametrize(("data", "code", "says"), BROKEN)
@pytest.mark.parametrize("role", ["image", "mask"])
def test_broken_files(data: bytes, code: str, says: str, role: str) -> None:
    pair = (data, MASK) if role == "image" else (IMAGE, data)
    found, message = code_of(lambda: decode_photo(*pair, name="mug-7"))
    assert found == code.format(role=role)
    assert message.startswith("mug-7: ")
    assert says in message


def png_with_text_bomb() -> bytes:
    text = b"comment\0\0" + zlib.compress(b"x" * (80 * 2**20))
    return IMAGE[:33] + png_chunk(b"zTXt", text) + IMAGE[33:]


def test_text_bombs_in_a_header_are_refused() -> None:
    assert code_of(lambda: decode_photo(png_with_text_bomb(), MASK, name="mug"))[0] == "image_invalid"


@pytest.mark.parametrize("size", [(15, 40), (40, 15), (1, 1)])
def test_small_images_are_refused(size: tuple[int, int]) -> None:
    code, message = code_of(lambda: decode_photo(encode(colours(*size)), MASK, name="mug"))
    assert code == "image_too_small"
    assert f"{size[1]} x {size[0]}" in message


def test_smallest_image_is_taken() -> None:
    photo = decode_photo(encode(colours(16, 16)), encode(box_mask(16, 16, (0, 0, 8, 8))), name="mug")
    assert photo.mask.sum() == 64


@pytest.mark.parametrize(
    ("image", "mask", "code", "says"),
    [
        (IMAGE, None, "mask_absent", ["name a mask"]),
        (varying(colours()[..., 0], np.full((32, 48), 255)), None, "mask_absent", ["no transparency"]),
        (varying(colours()[..., 0], np.zeros((32, 48))), None, "mask_empty", ["0 of 255"]),
        (varying(colours()[..., 0], np.full((32, 48), 200)), None, "mask_full", ["whole picture"]),
        (IMAGE, encode(box_mask(48, 32)), "mask_size_mismatch", ["32 x 48", "48 x 32"]),
        (IMAGE, encode(box_mask(8, 8)), "mask_size_mismatch", ["8 x 8", "48 x 32"]),
        (IMAGE, encode(np.zeros((32, 48), np.uint8)), "mask_empty", ["0 of 255"]),
        (IMAGE, encode(box_mask() // 255), "mask_empty", ["1 of 255"]),
        (IMAGE, encode(np.full((32, 48), 127, np.uint8)), "mask_empty", ["127 of 255"]),
        (IMAGE, encode(np.full((32, 48), 128, np.uint8)), "mask_full", ["inverted"]),
        (IMAGE, encode(box_mask(box=(0, 0, 9, 7))), "mask_too_small", ["63", "64"]),
    ],
)
def test_mask_faults(image: bytes, mask: bytes | None, code: str, says: list[str]) -> None:
    found, message = code_of(lambda: decode_photo(image, mask, name="mug-7"))
    assert found == code
    for text in ["mug-7", *says]:
        assert text in message


def test_turned_image_needs_a_mask_of_its_upright_size() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = encode(colours(), exif=exif)
    assert code_of(lambda: decode_photo(turned, MASK, name="mug"))[0] == "mask_size_mismatch"


def test_decoding_in_threads() -> None:
    expected = decode_photo(IMAGE, MASK, name="mug")
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            photo = decode_photo(IMAGE, MASK, name="mug")
            if not np.array_equal(photo.image, expected.image):
                wrong.append("image")
            try:
                decode_photo(png_header(30_000, 30_000), MASK, name="mug")
            except RowError as error:
                if error.code != "image_too_many_pixels":
                    wrong.append(error.code)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Scenes


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([(0, 0, 10, 10), (10, 0, 20, 10)], None),
        ([(0, 0, 20, 10), (0, 0, 20, 10)], (0, 1, 1.0)),
        # 94 of 100 pixels, then 95.
        ([(0, 0, 10, 10), (0, 0, 10, 9)], (0, 1, 1.0)),
        ([(0, 0, 100, 1), (6, 0, 106, 1)], None),
        ([(0, 0, 100, 1), (5, 0, 105, 1)], (0, 1, 0.95)),
        ([(0, 0, 10, 10), (20, 0, 30, 10), (22, 2, 25, 5)], (1, 2, 1.0)),
        ([(0, 0, 10, 10)], None),
        ([], None),
    ],
)
def test_masks_overlap(boxes: list[tuple[int, int, int, int]], expected: tuple[int, int, float] | None) -> None:
    assert masks_overlap([soft_box(20, 120, box) for box in boxes]) == expected


# Geometry


def test_bounding_box() -> None:
    mask = np.full((20, 30), 0.49, np.float32)
    mask[4, 7] = mask[11, 3] = 0.5
    assert bounding_box(mask) == (3, 4, 8, 12)
    with pytest.raises(ValueError, match="empty"):
        bounding_box(np.zeros((4, 4), np.float32))


def best_whole_window(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[int, float, float]:
    """Search all half-pixel positions that hold the box for the one nearest to the picture's centre."""
    left, top, right, bottom = box
    side = max(min(height, width), right - left, bottom - top)

    def nearest(extent: int, low: int, high: int) -> float:
        starts = np.arange(-2 * side, 2 * extent + 1) / 2
        starts = starts[(starts <= low) & (starts + side >= high)]
        return float(starts[np.argmin(np.abs(starts + side / 2 - extent / 2))])

    return side, nearest(width, left, right), nearest(height, top, bottom)


@pytest.mark.parametrize("seed", range(40))
def test_whole_window(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width = (int(n) for n in random.integers(16, 60, 2))
    left, right = sorted(int(n) for n in random.choice(width + 1, 2, replace=False))
    top, bottom = sorted(int(n) for n in random.choice(height + 1, 2, replace=False))
    window = whole_window(soft_box(height, width, (left, top, right, bottom)))
    side, best_left, best_top = best_whole_window(height, width, (left, top, right, bottom))
    assert (window.side, window.left, window.top) == (side, best_left, best_top)
    if side == min(height, width):
        assert 0 <= window.left <= width - side
        assert 0 <= window.top <= height - side


@pytest.mark.parametrize(
    ("height", "width", "box", "expected"),
    [
        (40, 100, (45, 5, 55, 15), Window(30, 0, 40)),
        (40, 100, (80, 5, 95, 15), Window(55, 0, 40)),
        (40, 100, (0, 0, 10, 10), Window(0, 0, 40)),
        (100, 40, (5, 90, 15, 100), Window(0, 60, 40)),
        (40, 100, (10, 5, 90, 15), Window(10, -20, 80)),
    ],
)
def test_whole_window_by_hand(height: int, width: int, box: tuple[int, int, int, int], expected: Window) -> None:
    assert whole_window(soft_box(height, width, box)) == expected


@pytest.mark.parametrize(
    ("height", "width", "box", "least_fill", "expected"),
    [
        (40, 100, (45, 10, 55, 15), 0.5, Window(40, 2.5, 20)),
        (40, 100, (0, 0, 10, 5), 0.5, Window(0, 0, 20)),
        (40, 100, (92, 30, 100, 40), 0.5, Window(80, 20, 20)),
        (40, 100, (30, 5, 50, 15), 0.5, Window(30, 0, 40)),
        (40, 100, (45, 10, 55, 15), 0.0, Window(30, 0, 40)),
        (40, 100, (5, 5, 95, 15), 1.0, Window(5, -25, 90)),
    ],
)
def test_close_window_by_hand(
    height: int, width: int, box: tuple[int, int, int, int], least_fill: float, expected: Window
) -> None:
    assert close_window(soft_box(height, width, box), least_fill) == expected


@pytest.mark.parametrize("fill", [0.3, 0.5, 0.9, 1.0])
def test_object_window(fill: float) -> None:
    window = object_window(soft_box(32, 48, (10, 8, 30, 20)), fill)
    assert window.side == pytest.approx(20 / fill)
    assert (window.left + window.side / 2, window.top + window.side / 2) == pytest.approx((20, 14))


def test_cut_of_whole_pixels_is_a_slice() -> None:
    mask = soft_box(32, 48, (10, 8, 30, 24))
    image, cut_mask, inside = cut(colours(), mask, Window(7, 3, 20), 20)
    np.testing.assert_array_equal(image, colours()[3:23, 7:27])
    np.testing.assert_array_equal(cut_mask, mask[3:23, 7:27])
    np.testing.assert_array_equal(inside, np.ones((20, 20)))
    assert (image.dtype, cut_mask.dtype, inside.dtype) == (np.uint8, np.float32, np.float32)


@pytest.mark.parametrize("window", [Window(-6, -4, 40), Window(-10, 5, 24), Window(30, 20, 24)])
def test_cut_outside_of_the_picture(window: Window) -> None:
    mask = np.full((32, 48), 0.75, np.float32)
    size = int(window.side)
    image, cut_mask, inside = cut(colours(), mask, window, size)
    y, x = np.mgrid[:size, :size]
    y, x = y + int(window.top), x + int(window.left)
    within = (x >= 0) & (x < 48) & (y >= 0) & (y < 32)
    np.testing.assert_array_equal(inside, within)
    np.testing.assert_array_equal(cut_mask, np.where(within, np.float32(0.75), 0))
    np.testing.assert_array_equal(image, colours()[y.clip(0, 31), x.clip(0, 47)])


def test_cut_shrinks_without_aliasing() -> None:
    # One-pixel stripes: picking single pixels would give black or white, an average gives grey.
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for side in (160, 150.5, 100):
        image, _, _ = cut(stripes, np.ones((256, 256), np.float32), Window(45.3, 50, side), 32)
        assert np.abs(image.astype(int) - 127.5).max() <= 8


def test_cut_averages_masks_over_areas() -> None:
    mask = np.random.default_rng(0).random((60, 60)).astype(np.float32)
    _, cut_mask, _ = cut(colours(60, 60), mask, Window(4, 8, 48), 12)
    expected = mask[8:56, 4:52].reshape(12, 4, 12, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(cut_mask, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "seen"),
    [
        (Window(5.0, 3.25, 10.0), 10 * 10),
        (Window(-4.5, 25.5, 10.0), 5.5 * 6.5),
        (Window(-20.5, 3.25, 33.3), 12.8 * 28.75),
        (Window(-20.5, -40.0, 70.0), 48 * 30),
        (Window(5.0, -40.0, 150.0), 43 * 32),
    ],
)
def test_cut_equals_resizing_a_padded_picture(window: Window, seen: float) -> None:
    image, mask = colours(), soft_box(32, 48, (10, 8, 30, 24))
    got, got_mask, inside = cut(image, mask, window, 24)

    pad = 200
    left, top = window.left + pad, window.top + pad
    box = (left, top, left + window.side, top + window.side)
    sharp, soft = (
        (Image.Resampling.LANCZOS, Image.Resampling.BOX)
        if window.side > 24
        else (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
    )
    padded = Image.fromarray(np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge"))
    assert np.abs(got.astype(int) - np.asarray(padded.resize((24, 24), sharp, box))).max() <= 1
    padded_mask = np.asarray(Image.fromarray(np.pad(mask, pad)).resize((24, 24), soft, box))
    np.testing.assert_allclose(got_mask, np.where(inside > 0, padded_mask, 0), atol=1e-4)
    assert inside.sum() * (window.side / 24) ** 2 == pytest.approx(seen, rel=1e-4)


def test_cut_keeps_masks_in_range_when_enlarging() -> None:
    mask = soft_box(32, 48, (10, 8, 30, 24))
    _, cut_mask, _ = cut(colours(), mask, Window(5, 4, 10), 97)
    assert cut_mask.min() >= 0
    assert cut_mask.max() <= 1


def test_cut_of_a_wide_window_makes_no_huge_copy() -> None:
    image, mask = np.zeros((500, 500, 3), np.uint8), np.ones((500, 500), np.float32)
    tracemalloc.start()
    result, _, inside = cut(image, mask, Window(-10_000, -10_000, 20_000), 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.shape == (256, 256, 3)
    assert inside.sum() == pytest.approx((500 / 20_000 * 256) ** 2, rel=1e-4)
    assert peak < 20_000**2 / 10


def test_cut_beside_the_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match="outside"):
        cut(colours(), np.ones((32, 48), np.float32), Window(48, 0, 10), 8)


@pytest.mark.parametrize("background", [255, 0])
def test_object_alone(background: int) -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[..., 1] = 255
    image[30:66, 40:76] = [200, 30, 60]
    mask = soft_box(100, 100, (40, 30, 76, 66))
    alone = object_alone(image, mask, 40, background)
    # The box of 36 pixels takes 0.9 of the window: 36 of the 40 pixels, two of background around them.
    expected = np.full((40, 40, 3), background)
    expected[2:38, 2:38] = [200, 30, 60]
    np.testing.assert_array_equal(alone, expected)


def test_object_alone_has_no_seam_from_the_old_background() -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    image[..., 1] = 255
    y, x = np.mgrid[:300, :300]
    disc = (y - 150) ** 2 + (x - 150) ** 2 < 120**2
    image[disc] = 255
    # White on white: any green left would be the background's.
    alone = object_alone(image, disc.astype(np.float32), 32)
    np.testing.assert_array_equal(alone, np.full((32, 32, 3), 255))


def test_object_alone_at_the_pictures_edge_is_not_smeared() -> None:
    image = np.full((60, 60, 3), [10, 20, 30], np.uint8)
    alone = object_alone(image, soft_box(60, 60, (0, 0, 36, 36)), 40)
    expected = np.full((40, 40, 3), 255)
    expected[2:38, 2:38] = [10, 20, 30]
    np.testing.assert_array_equal(alone, expected)
