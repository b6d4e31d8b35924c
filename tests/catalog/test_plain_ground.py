"""Masks that are taken from the picture."""

import numpy as np
import pytest
from picture_files import code_of, encode

from objdrive.catalog.masks import intersection_over_union
from objdrive.catalog.photos import decode_photo
from objdrive.catalog.rows import AUTO_MASK

EDGE = 200


def shop_photo(ground=(250, 250, 250), falloff=0.0, noise=2):
    """(image, exact mask): a mug on a ground that darkens towards the corners."""
    y, x = np.mgrid[:EDGE, :EDGE] / (EDGE / 2) - 1
    mug = ((x / 0.4) ** 2 + (y / 0.55) ** 2 <= 1) | ((x > 0.3) & (x < 0.65) & (abs(y) < 0.1))
    picture = np.empty((EDGE, EDGE, 3))
    picture[:] = ground
    picture -= falloff * (x**2 + y**2)[..., None]
    picture[mug] = (60, 90, 160)
    picture[(x**2 + y**2 < 0.02)] = (235, 240, 230)
    picture += np.random.default_rng(0).normal(0, noise, picture.shape)
    return picture.clip(0, 255).astype(np.uint8), mug


@pytest.mark.parametrize(
    "options", [{}, {"falloff": 25}, {"ground": (205, 205, 205)}, {"ground": (30, 30, 30), "noise": 1}]
)
def test_before_a_plain_ground_the_mask_is_taken_from_the_picture(options):
    picture, mug = shop_photo(**options)
    photo = decode_photo(encode(picture), None, name="mug")
    assert intersection_over_union(photo.mask >= 0.5, mug) > 0.95
    assert "taken from the picture" in photo.warnings[0]


@pytest.mark.parametrize("size", [(64, 64), (1500, 900)])
def test_at_any_size(size):
    picture = np.full((*size, 3), 255, np.uint8)
    solid = np.zeros(size, bool)
    solid[size[0] // 4 : size[0] // 2, size[1] // 3 : size[1] // 2] = True
    picture[solid] = (200, 40, 40)
    photo = decode_photo(encode(picture), None, name="mug")
    assert photo.mask.shape == size
    assert intersection_over_union(photo.mask >= 0.5, solid) > 0.95


def test_auto_looks_at_the_picture_even_if_there_is_transparency():
    picture, mug = shop_photo()
    alpha = np.zeros((EDGE, EDGE), np.uint8)
    alpha[:, : EDGE // 2] = 255
    given = decode_photo(encode(np.dstack([picture, alpha])), None, name="mug")
    np.testing.assert_array_equal(given.mask, alpha / 255)
    taken = decode_photo(encode(np.dstack([picture, alpha])), AUTO_MASK, name="mug")
    assert intersection_over_union(taken.mask >= 0.5, mug & (alpha > 0)) > 0.95


@pytest.mark.parametrize("mask", [None, AUTO_MASK])
@pytest.mark.parametrize(
    "picture",
    [
        np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8),
        np.full((EDGE, EDGE, 3), 255, np.uint8),
        np.where(np.indices((EDGE, EDGE)).sum(axis=0)[..., None] % 80 < 40, 255, 120)
        .repeat(3, axis=-1)
        .astype(np.uint8),
    ],
    ids=["noise", "nothing there", "stripes"],
)
def test_where_the_ground_is_not_plain_a_mask_is_asked_for(mask, picture):
    code, message = code_of(lambda: decode_photo(encode(picture), mask, name="mug-7"))
    assert code == "mask_absent"
    assert message.startswith("mug-7: ")
