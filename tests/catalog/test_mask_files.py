"""What is made of mask files, whatever tool wrote them."""

import numpy as np
import pytest
from picture_files import ORIENTATION, UPRIGHT, box_mask, code_of, colours, encode
from PIL import Image, ImageFilter

from objdrive.catalog.photos import decode_photo

IMAGE = encode(colours())
SOLID = box_mask() > 0


def palette(values, *entries):
    picture = Image.fromarray(values.astype(np.uint8), "P")
    picture.putpalette([level for entry in entries for level in entry])
    return encode(picture)


def painted(ground, thing):
    return np.where(SOLID[..., None], thing, ground).astype(np.uint8)


def read(mask, image=IMAGE):
    return decode_photo(image, mask, name="mug-7")


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (encode(SOLID.astype(np.uint8)), "0 and 1"),
        (encode(np.where(SOLID, 90, 30).astype(np.uint8)), "30 and 90"),
        (encode(np.where(SOLID, 3, 0).astype(np.uint16)), "0 and 3"),
        (palette(SOLID, (0, 0, 0), (128, 0, 0)), "(128, 0, 0)"),
        (encode(painted((0, 0, 0), (255, 0, 0))), "(255, 0, 0)"),
        (encode(painted((0, 0, 90), (0, 200, 0)), "WEBP", lossless=True), "(0, 200, 0)"),
    ],
    ids=["labels 0 and 1", "two greys", "16 bits", "palette", "red on black", "two colours"],
)
def test_masks_of_any_two_values(mask, says):
    photo = read(mask)
    np.testing.assert_array_equal(photo.mask, SOLID)
    (warning,) = photo.warnings
    assert says in warning


def test_two_values_with_the_noise_of_a_jpeg():
    large = np.kron(SOLID, np.ones((9, 9), bool))[3:, 5:]
    picture = np.where(large[..., None], [250, 10, 20], [10, 0, 30]).astype(np.uint8)
    photo = read(encode(picture, "JPEG", quality=85), encode(colours(*large.shape)))
    assert ((photo.mask >= 0.5) == large).mean() > 0.999


def test_white_on_black_with_the_noise_of_a_jpeg_is_no_assumption():
    large = np.kron(box_mask(), np.ones((9, 9), np.uint8))[3:, 5:]
    photo = read(encode(large, "JPEG", quality=85), encode(colours(*large.shape)))
    assert ((photo.mask >= 0.5) == (large > 0)).mean() > 0.999
    assert photo.warnings == ()


@pytest.mark.parametrize("radius", [1, 3, 8])
def test_soft_edges_stay_soft(radius):
    large = Image.fromarray(np.kron(box_mask(), np.ones((6, 6), np.uint8))).filter(ImageFilter.GaussianBlur(radius))
    photo = read(encode(large), encode(colours(large.height, large.width)))
    np.testing.assert_array_equal(photo.mask, np.asarray(large) / np.float32(255))
    assert photo.warnings == ()


def labelled(*values):
    picture = np.zeros((32, 48), np.uint8)
    for number, value in enumerate(values):
        picture[4:20, 4 + 12 * number : 14 + 12 * number] = value
    return picture


@pytest.mark.parametrize(
    ("mask", "listed"),
    [
        (encode(labelled(1, 2)), "0, 1, 2"),
        (encode(labelled(38, 75, 113)), "0, 38, 75, 113"),
        (encode(labelled(128, 255)), "0, 128, 255"),
        (encode(labelled(1, 255)), "0, 1, 255"),
        (palette(labelled(1, 2), (0, 0, 0), (128, 0, 0), (0, 128, 0)), "0, (128, 0, 0), (0, 128, 0)"),
        (encode(Image.fromarray(labelled(100, 255)).resize((144, 96), Image.Resampling.BILINEAR)), "0, 100, 255"),
    ],
)
def test_more_labels_than_two_are_listed(mask, listed):
    picture = encode(colours(96, 144)) if listed == "0, 100, 255" else IMAGE
    code, message = code_of(lambda: read(mask, picture))
    assert code == "mask_labels"
    assert f"labels: {listed};" in message
    assert message.startswith("mug-7: ")


@pytest.mark.parametrize("size", [(24, 16), (96, 64), (480, 320), (17, 11)])
def test_a_mask_at_another_scale_is_resampled(size):
    mask = Image.fromarray(box_mask(320, 480, (100, 80, 300, 240))).resize(size, Image.Resampling.BOX)
    photo = read(encode(mask))
    assert photo.mask.shape == (32, 48)
    assert ((photo.mask >= 0.5) == SOLID).mean() > 0.97
    assert f"{size[0]} x {size[1]} pixels, the image 48 x 32" in photo.warnings[0]


def turned_photo(picture, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(picture, exif=exif)


def scene(height, width):
    """Something coloured in a corner of a dark ground."""
    solid = np.zeros((height, width), np.uint8)
    solid[4 : height // 2, 6 : width // 3] = 255
    return np.where(solid[..., None], [220, 90, 40], [40, 50, 60]).astype(np.uint8), solid


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_mask_that_fits_the_stored_pixels_is_turned(orientation, factor):
    picture, solid = scene(32, 48)
    photo = read(encode(np.kron(solid, np.ones((factor, factor), np.uint8))), turned_photo(picture, orientation))
    np.testing.assert_array_equal(photo.mask, UPRIGHT[orientation](solid) / 255)
    assert "EXIF" in photo.warnings[-1]


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_where_sizes_cant_tell_the_pictures_edges_do(orientation):
    picture, solid = scene(48, 48)
    upright = UPRIGHT[orientation](solid)
    as_stored = read(encode(solid), turned_photo(picture, orientation))
    np.testing.assert_array_equal(as_stored.mask, upright / 255)
    assert "EXIF" in as_stored.warnings[0]
    as_seen = read(encode(upright), turned_photo(picture, orientation))
    np.testing.assert_array_equal(as_seen.mask, upright / 255)
    assert as_seen.warnings == ()


def test_where_edges_cant_tell_either_the_mask_is_upright():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 10:50] = 255
    photo = read(encode(mask), turned_photo(picture, 6))
    np.testing.assert_array_equal(photo.mask, mask / 255)
    assert "taken to be upright" in photo.warnings[0]


def test_a_mask_that_is_turned_by_its_own_exif_is_believed():
    picture, solid = scene(48, 48)
    photo = read(turned_photo(solid, 6), turned_photo(picture, 6))
    np.testing.assert_array_equal(photo.mask, UPRIGHT[6](solid) / 255)
    assert photo.warnings == ()


def test_an_inverted_mask_is_used_with_a_warning():
    picture, solid = scene(64, 64)
    picture = np.roll(picture, (12, 12), (0, 1))
    solid = np.roll(solid, (12, 12), (0, 1))
    picture[solid > 0] = np.random.default_rng(0).integers(60, 255, (int((solid > 0).sum()), 3))
    photo = read(encode(255 - solid), encode(picture))
    np.testing.assert_array_equal(photo.mask, (255 - solid) / 255)
    assert "inverted" in photo.warnings[0]
    assert read(encode(solid), encode(picture)).warnings == ()
