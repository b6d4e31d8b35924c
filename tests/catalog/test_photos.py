"""What is read of an image and its mask, and what is refused."""

import io
import struct
import sys
import threading
import zlib
from typing import Any

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from picture_files import ORIENTATION, UPRIGHT, box_mask, code_of, colours, encode, png_chunk
from PIL import Image

from objdrive.catalog.photos import decode_photo, masks_overlap
from objdrive.errors import RowError


def soft_box(height: int, width: int, box: tuple[int, int, int, int]) -> NDArray[np.float32]:
    return (box_mask(height, width, box) / 255).astype(np.float32)


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"x") + png_chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    canvas = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def gif_header(width: int, height: int) -> bytes:
    return (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 9, 9, 0) + b"\2"
    )


def tiff_header(width: int, height: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: width * height}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def jpeg_2000_header(width: int, height: int) -> bytes:
    size = struct.pack(">HHIIIIIIIIH", 47, 0, width, height, 0, 0, width, height, 0, 0, 3) + b"\7\1\1" * 3
    return b"\xff\x4f\xff\x51" + size


IMAGE = encode(colours())
MASK = encode(box_mask())


# Decoding


LOSSY = ("JPEG", "AVIF", "HEIC")


def heic(picture: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(picture)).save(buffer, quality=95)
    return buffer.getvalue()


def as_file(picture: NDArray[Any], file_format: str) -> bytes:
    options = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 95},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
        "TIFF": {"compression": "tiff_lzw"},
    }
    return heic(picture) if file_format == "HEIC" else encode(picture, file_format, **options.get(file_format, {}))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF", "BMP", "JPEG2000", *LOSSY])
def test_formats(file_format: str) -> None:
    photo = decode_photo(as_file(colours(), file_format), MASK, name="mug")
    assert photo.image.dtype == np.uint8
    assert photo.mask.dtype == np.float32
    assert photo.warnings == ()
    # Some lose colour; their chroma has half the resolution.
    assert np.abs(photo.image.astype(int) - colours()).mean() < (6 if file_format in LOSSY else 1e-9)
    np.testing.assert_array_equal(photo.mask, box_mask() / 255)


@pytest.mark.parametrize("file_format", ["TIFF", "BMP", "GIF", "JPEG2000"])
def test_formats_of_masks(file_format: str) -> None:
    photo = decode_photo(IMAGE, as_file(box_mask(), file_format), name="mug")
    np.testing.assert_array_equal(photo.mask, box_mask() / 255)


def test_a_heic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    code, message = code_of(lambda: decode_photo(heic(colours()), MASK, name="mug"))
    assert code == "image_invalid"
    assert "objdrive[heif]" in message


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
    # 0x80FF / 257 is 128.5 of 255, and 0x00FF nearly 1: their upper bytes alone would be 128 and 0.
    row = b"\0" + struct.pack(">HHH", 0x80F0, 0x00FF, 0) * 20
    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    data += png_chunk(b"IDAT", zlib.compress(row * 20)) + png_chunk(b"IEND", b"")
    photo = decode_photo(data, encode(box_mask(20, 20, (2, 2, 12, 12))), name="mug")
    np.testing.assert_array_equal(photo.image, np.broadcast_to([128, 1, 0], (20, 20, 3)))


def test_half_transparent_colour_is_composed_onto_white() -> None:
    pixels = np.zeros((32, 48, 4), np.uint8)
    pixels[..., 3] = np.where(box_mask() > 0, 204, 51)
    photo = decode_photo(encode(pixels), None, name="mug")
    np.testing.assert_array_equal(photo.image, grey(np.where(box_mask() > 0, 51, 204)))
    np.testing.assert_allclose(photo.mask, np.where(box_mask() > 0, 0.8, 0.2), atol=1e-6)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_turns_image_and_mask(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
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
    for options in ({"file_format": "WEBP", "lossless": True}, {"file_format": "PNG"}, {"file_format": "TIFF"}):
        data = encode(first, save_all=True, append_images=[second], **options)
        np.testing.assert_array_equal(decode_photo(data, MASK, name="mug").image, colours())


def test_first_frame_of_a_gif() -> None:
    first, second = Image.fromarray(grey_ramp()), Image.fromarray(255 - grey_ramp())
    data = encode(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode_photo(data, MASK, name="mug").image, grey(grey_ramp()))


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
    mask[8:24, 30:34] = [200, 150, 100, 50]
    photo = decode_photo(IMAGE, encode(mask), name="mug")
    np.testing.assert_array_equal(photo.mask, mask / np.float32(255))


def test_own_alpha_is_the_mask() -> None:
    for file_format in ("PNG", "WEBP"):
        data = encode(np.dstack([colours(), box_mask()]), file_format, lossless=True)
        np.testing.assert_array_equal(decode_photo(data, None, name="mug").mask, box_mask() / 255)


# Faults of pictures


def without_end(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def noise(height: int = 64, width: int = 64) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def wide(data: bytes) -> bytes:
    """An AVIF's or HEIC's bytes that say that its picture has 30,000 x 30,000 pixels."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", 30_000, 30_000) + data[at + 8 :]


BROKEN = [
    (b"", "{role}_invalid", "JPEG 2000"),
    (b"no picture", "{role}_invalid", "JPEG 2000"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "{role}_invalid", "JPEG 2000"),
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
    (bmp_header(30_000, 30_000), "{role}_too_many_pixels", "30000 x 30000"),
    (gif_header(30_000, 30_000), "{role}_too_many_pixels", "30000 x 30000"),
    (tiff_header(30_000, 30_000), "{role}_too_many_pixels", "30000 x 30000"),
    (jpeg_2000_header(30_000, 30_000), "{role}_too_many_pixels", "30000 x 30000"),
    (wide(heic(noise())), "{role}_too_many_pixels", "30000 x 30000"),
    (wide(encode(colours(), "AVIF")), "{role}_invalid", "can't be decoded"),
    (encode(np.zeros((32, 48), np.float32), "TIFF"), "{role}_invalid", "32 bits"),
    (without_end(encode(noise(), "TIFF")), "{role}_truncated", "too early"),
    (without_end(encode(noise(), "BMP")), "{role}_truncated", "truncated"),
    (without_end(encode(noise(), "GIF")), "{role}_truncated", "truncated"),
    (without_end(encode(noise(), "JPEG2000")), "{role}_invalid", "can't be decoded"),
    (without_end(encode(noise(), "AVIF")), "{role}_invalid", "can't be decoded"),
    (without_end(heic(noise())), "{role}_invalid", "can't be decoded"),
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
