"""Which masks are mended, and how well."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageFilter

from objdrive.catalog.masks import intersection_over_union, mend_mask

EDGE = 240


def ellipse(centre, radii, edge=EDGE):
    """(edge, edge) bool."""
    y, x = np.mgrid[:edge, :edge] + 0.5
    return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 <= 1


def photo(objects, colours, ground=(90, 140, 90), noise=8):
    """(H, W, 3) uint8: each object in its colour, on a ground that is lighter to the right; all noisy."""
    edge = objects[0].shape[0]
    picture = np.empty((edge, edge, 3))
    picture[:] = ground
    picture += np.linspace(-30, 30, edge)[None, :, None]
    for shape, colour in zip(objects, colours, strict=True):
        picture[shape] = colour
    picture += np.random.default_rng(0).normal(0, noise, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def grown(mask, pixels):
    """The mask, larger by so many pixels on every side; smaller if they are negative."""
    filtered = ImageFilter.MaxFilter if pixels > 0 else ImageFilter.MinFilter
    picture = Image.fromarray(mask.astype(np.uint8) * 255).filter(filtered(2 * abs(pixels) + 1))
    return np.asarray(picture, dtype=np.float32) / 255


def jagged(mask, pixels):
    chosen = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(bool)
    chosen = np.kron(chosen, np.ones((mask.shape[0] // 16, mask.shape[1] // 16), bool))
    return np.where(chosen, grown(mask, pixels), grown(mask, -pixels)).astype(np.float32)


def agreement(exact, mask):
    return intersection_over_union(exact, mask >= 0.5)


SPOILED = {
    "too small": lambda mask: grown(mask, -10),
    "too large": lambda mask: grown(mask, 10),
    "jagged": lambda mask: jagged(mask, 10),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("centre", [(120, 120), (40, 200)], ids=["in the middle", "at the picture's edge"])
def test_a_careless_mask_is_mended(spoil, centre):
    exact = ellipse(centre, (70, 50))
    mask = spoil(exact)
    assert agreement(exact, mask) < 0.8
    mended = mend_mask(photo([exact], [(200, 60, 50)]), mask)
    assert agreement(exact, mended) > 0.95
    assert mended.dtype == np.float32
    assert (mended.min(), mended.max()) == (0, 1)


@pytest.mark.parametrize("edge", [60, 240, 1200])
def test_whatever_the_size_of_the_photo(edge):
    exact = ellipse((edge / 2, edge / 2), (0.2 * edge, 0.25 * edge), edge)
    mended = mend_mask(photo([exact], [(200, 60, 50)]), grown(exact, round(0.04 * edge)))
    assert agreement(exact, mended) > 0.95


def test_what_reaches_far_beyond_the_mask_is_found_again():
    """Of a guitar only the body is masked."""
    body, neck = ellipse((60, 180), (35, 35)), np.zeros((EDGE, EDGE), bool)
    y, x = np.mgrid[:EDGE, :EDGE]
    neck[(abs(x + y - 240) < 14) & (x > 60) & (x < 160)] = True
    exact = body | neck
    mended = mend_mask(photo([exact], [(200, 60, 50)]), grown(body, -6))
    assert agreement(exact, mended) > 0.95


@pytest.mark.parametrize("radius", [20, 50])
def test_a_hole_that_was_masked_is_opened_again(radius):
    """The bow of a key."""
    bow = ellipse((120, 120), (80, 80))
    exact = bow & ~ellipse((120, 120), (radius, radius))
    mended = mend_mask(photo([exact], [(200, 160, 50)], ground=(255, 0, 255)), grown(bow, 8))
    assert agreement(exact, mended) > 0.95


def test_a_mask_that_follows_the_picture_stays_itself():
    exact = ellipse((120, 120), (70, 50))
    mask = exact.astype(np.float32)
    assert mend_mask(photo([exact], [(200, 60, 50)]), mask) is mask


@pytest.mark.parametrize("name", ["rocket-01", "key-01", "rose-01", "bicycle-01", "drum-01", "stethoscope-01"])
def test_exact_masks_of_photos_stay_themselves(name, catalog_scene):
    scene = catalog_scene(name)
    assert mend_mask(scene.image, scene.objects[0].mask) is scene.objects[0].mask


def test_an_object_of_the_colour_of_its_ground_keeps_its_mask():
    mask = ellipse((120, 120), (70, 50)).astype(np.float32)
    image = np.full((EDGE, EDGE, 3), 235, np.uint8) + np.random.default_rng(0).integers(0, 8, (EDGE, EDGE, 3), np.uint8)
    assert mend_mask(image, mask) is mask


def test_a_part_that_the_mask_names_is_not_grown_into_the_whole():
    """A shirt is asked for, not who wears it."""
    shirt, face = ellipse((120, 150), (60, 50)), ellipse((120, 80), (30, 35))
    mask = (shirt & ~face).astype(np.float32)
    assert mend_mask(photo([shirt, face], [(40, 60, 180), (220, 180, 150)]), mask) is mask


def test_a_neighbour_stays_out_of_the_mask():
    """Two mugs of one colour that touch each other."""
    left, right = ellipse((75, 120), (45, 50)), ellipse((165, 120), (45, 50))
    image = photo([left, right], [(200, 60, 50), (200, 60, 50)])
    careless = grown(left, -8)
    # The neighbour's own mask tells them apart: nothing in the picture does.
    mended = mend_mask(image, careless, right.astype(np.float32))
    assert agreement(left, mended) > 0.95
    assert float(mended[right].mean()) < 0.02


def test_a_mask_of_nearly_the_whole_picture_is_kept():
    mask = np.ones((EDGE, EDGE), np.float32)
    mask[0, 0] = 0
    image = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    assert mend_mask(image, mask) is mask


def test_a_mask_that_is_finer_than_what_is_looked_at_is_kept():
    mask = np.zeros((2000, 2000), np.float32)
    mask[1000, 500:1500] = 1
    image = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)
    assert mend_mask(image, mask) is mask


@pytest.mark.parametrize("seed", [3, 5, 6])
def test_an_object_that_shrinks_to_less_than_a_pixel_of_the_photo_keeps_its_mask(seed):
    """One of many stripes, each of a colour of its own."""
    colours = np.random.default_rng(seed).integers(0, 256, (68, 1, 3), np.uint8)
    mask = np.zeros((68, 68), np.float32)
    mask[12:14, 6:-6] = 1
    assert mend_mask(np.repeat(colours, 68, axis=1), mask) is mask


def test_what_ran_before_makes_no_difference():
    exact = ellipse((120, 120), (70, 50))
    image, mask = photo([exact], [(200, 60, 50)]), grown(exact, 10)
    first = mend_mask(image, mask)
    mend_mask(photo([exact], [(20, 60, 250)], noise=30), jagged(exact, 8))
    np.testing.assert_array_equal(mend_mask(image, mask), first)


def test_agreement_against_counting_by_hand():
    one, other = np.array([True, True, False, False]), np.array([False, True, True, False])
    assert intersection_over_union(one, other) == pytest.approx(1 / 3)
    assert intersection_over_union(one & False, other & False) == 0


def textured(seed, colours, edge=EDGE):
    """(edge, edge, 3): blotches between two colours, as wood, stone or leaves have them."""
    random = np.random.default_rng(seed)
    blotches = Image.fromarray(random.integers(0, 256, (edge // 6, edge // 6), np.uint8))
    share = np.asarray(blotches.resize((edge, edge), Image.Resampling.BICUBIC))[..., None] / 255
    return share * colours[0] + (1 - share) * colours[1] + random.normal(0, 6, (edge, edge, 3))


def photographed(exact):
    """A shell on a table: both are of brown blotches, and a dark ridge parts the shell in two."""
    table = textured(1, np.array([(120, 80, 50), (90, 55, 30)]))
    shell = textured(2, np.array([(165, 120, 80), (110, 70, 40)]))
    picture = np.where(exact[..., None], shell, table)
    y, x = np.mgrid[:EDGE, :EDGE]
    ridge = exact & (abs(x - y / 2 - 60) < 3)
    picture[ridge] = (50, 30, 15)
    return picture.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("pixels", [0, 4])
def test_a_loose_mask_of_what_has_its_grounds_colours_loses_no_part(pixels):
    exact = ellipse((120, 120), (70, 45))
    mask = exact.astype(np.float32) if pixels == 0 else grown(exact, pixels)
    mended = mend_mask(photographed(exact), mask)
    assert agreement(mask >= 0.5, mended) >= 0.9
    assert agreement(exact, mended) >= agreement(exact, mask) - 0.01


def test_an_edge_is_refined_where_colours_do_not_tell_all():
    """Half of the shirt has the ground's colour, and the rest of its edge is plain to see."""
    exact = ellipse((120, 120), (70, 60))
    picture = np.where(exact[..., None], textured(3, np.array([(200, 60, 60), (60, 60, 90)])), (128, 132, 120))
    picture[exact & (np.mgrid[:EDGE, :EDGE][1] > 120)] = (60, 60, 90)
    picture[:, :40] = (200, 60, 60)
    mask = grown(exact, 2)
    mended = mend_mask(picture.clip(0, 255).astype(np.uint8), mask)
    assert agreement(mask >= 0.5, mended) >= 0.9
    assert agreement(exact, mended) > agreement(exact, mask)


def test_a_large_photo_takes_no_more_than_a_small_one():
    exact = ellipse((120, 120), (70, 50))
    small = photo([exact], [(200, 60, 50)])
    factor = 20
    large = np.asarray(Image.fromarray(small).resize((EDGE * factor, EDGE * factor), Image.Resampling.BICUBIC))
    mask = np.kron(grown(exact, 8), np.ones((factor, factor), np.float32))
    tracemalloc.start()
    mended = mend_mask(large, mask)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert agreement(np.kron(exact, np.ones((factor, factor), bool)), mended) > 0.95
    # The mask itself is a fifth of it.
    assert peak < 5 * mask.nbytes
