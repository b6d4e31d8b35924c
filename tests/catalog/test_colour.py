"""What pictures with colour profiles look like."""

import numpy as np
import pytest
from colour_profiles import (
    P3_TO_XYZ,
    SRGB_TO_XYZ,
    grey_profile,
    ink_profile,
    matrix_profile,
    srgb_curve,
    srgb_linear,
)
from picture_files import box_mask, colours, encode
from PIL import Image, ImageCms

from objdrive.catalog.photos import decode_photo

MASK = encode(box_mask())
REDS = [(200, 30, 40), (255, 0, 0), (120, 10, 10), (90, 160, 220)]


def plain(colour):
    return np.broadcast_to(np.array(colour, np.uint8), (32, 48, len(colour)))


def decoded(data):
    return decode_photo(data, MASK, name="mug")


def in_p3(colour):
    """The Display P3 value of an sRGB colour."""
    linear = np.linalg.solve(P3_TO_XYZ, SRGB_TO_XYZ @ srgb_linear(np.array(colour) / 255))
    return np.rint(255 * srgb_curve(linear)).astype(np.uint8)


@pytest.mark.parametrize("colour", REDS)
@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_a_colour_in_display_p3_is_the_same_in_srgb(colour, file_format, options):
    assert np.abs(in_p3(colour).astype(int) - colour).max() > 5
    data = encode(plain(in_p3(colour)), file_format, icc_profile=matrix_profile(P3_TO_XYZ), **options)
    assert np.abs(decoded(data).image.astype(int) - colour).max() <= 2
    assert decoded(data).warnings == ()


def test_srgbs_own_profile_changes_nothing():
    for profile in (matrix_profile(SRGB_TO_XYZ), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        np.testing.assert_array_equal(decoded(encode(colours(), icc_profile=profile)).image, colours())


def test_transparency_is_kept():
    pixels = np.dstack([plain(in_p3(REDS[0])), box_mask()])
    photo = decode_photo(encode(pixels, icc_profile=matrix_profile(P3_TO_XYZ)), None, name="mug")
    np.testing.assert_array_equal(photo.mask, box_mask() / 255)
    assert np.abs(photo.image[10, 12].astype(int) - REDS[0]).max() <= 2
    assert (photo.image[0, 0] == 255).all()


def test_greys_of_another_gamma():
    data = encode(np.full((32, 48), 100, np.uint8), icc_profile=grey_profile(1.8))
    expected = 255 * srgb_curve(np.array((100 / 255) ** 1.8))
    assert np.abs(decoded(data).image - expected).max() <= 1


# Relative to the paper, as profiles have them.
PAPER, CYAN, BLACK = (100, 0, 0), (55, -37, -50), (0, 0, 0)


def lab_to_srgb(lightness, a, b):
    """sRGB by CIELAB's definition."""
    y = (lightness + 16) / 116
    roots = np.array([y + a / 500, y, y - b / 200])
    ratios = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29))
    linear = np.linalg.solve(SRGB_TO_XYZ, ratios * np.array([0.9642, 1, 0.8249]))
    return 255 * srgb_curve(linear.clip(0, 1))


@pytest.mark.parametrize(("inks", "proof"), [((0, 0, 0, 0), PAPER), ((255, 0, 0, 0), CYAN), ((0, 0, 0, 255), BLACK)])
def test_inks_look_like_their_proof(inks, proof):
    def corner(cyan, magenta, yellow, black):
        return BLACK if black else CYAN if cyan else PAPER

    picture = Image.fromarray(plain(inks), "CMYK")
    photo = decoded(encode(picture, "JPEG", quality=100, icc_profile=ink_profile(corner)))
    assert np.abs(photo.image - lab_to_srgb(*proof)).max() <= 3


@pytest.mark.parametrize(
    ("profile", "says"),
    [(b"no profile", "can't be used"), (grey_profile(2.2), "GRAY"), (matrix_profile(P3_TO_XYZ)[:200], "can't be used")],
)
def test_a_broken_profile_is_a_warning(profile, says):
    photo = decoded(encode(colours(), icc_profile=profile))
    np.testing.assert_array_equal(photo.image, colours())
    (warning,) = photo.warnings
    assert says in warning


def test_a_masks_profile_changes_nothing():
    mask = encode(box_mask(), icc_profile=grey_profile(1.0))
    photo = decode_photo(encode(colours()), mask, name="mug")
    np.testing.assert_array_equal(photo.mask, box_mask() / 255)
