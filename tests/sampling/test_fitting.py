import numpy as np
import pytest

from objdrive.catalog.photos import Photo
from objdrive.sampling.fitting import fit, stand

MASK = np.zeros((64, 96), np.float32)
MASK[20:40, 10:50] = 1
PHOTO = Photo(np.zeros((64, 96, 3), np.uint8), MASK)
"""An object of twice the width of its height."""


class TestFit:
    def test_fits_a_box_on_its_lower_edge(self):
        assert fit(PHOTO, np.ones((80, 80), np.float32)) == (0, 40, 80, 40)
        assert fit(PHOTO, np.ones((20, 80), np.float32)) == (20, 0, 40, 20)
        assert fit(PHOTO, np.ones((500, 800), np.float32)) == (0, 100, 800, 400)

    @pytest.mark.parametrize("size", [(60, 80), (700, 400)])
    def test_fits_an_oval_as_a_whole(self, size):
        height, width = size
        down, across = np.mgrid[:height, :width]
        oval = (((down + 0.5) / height - 0.5) ** 2 + ((across + 0.5) / width - 0.5) ** 2 <= 0.25).astype(np.float32)
        left, top, wide, high = fit(PHOTO, oval)
        inside = oval[top : top + high, left : left + wide]
        assert inside.shape == (high, wide)
        assert inside.mean() > 0.985
        assert abs(wide / high - 2) < 0.1
        # The largest box of twice the width of its height in this oval, from its equation.
        largest = 1 / np.hypot(1 / width, 1 / (2 * height))
        assert 0.85 * largest < wide < 1.03 * largest

    def test_fits_beside_a_corner_that_is_cut_off(self):
        place = np.ones((60, 40), np.float32)
        place[50:, 20:] = 0
        _, top, wide, high = fit(PHOTO, place)
        assert (wide, high) == (40, 20)
        assert 27 <= top <= 31

    def test_fills_the_box_of_a_place_that_shows_it_whole_at_no_size(self):
        place = np.zeros((60, 60), np.float32)
        place[[0, -1]] = place[:, [0, -1]] = 1
        assert fit(PHOTO, place) == (0, 30, 60, 30)

    @pytest.mark.parametrize("band", [12, 20, 40])
    def test_is_small_where_only_a_small_one_is_seen_whole(self, band):
        place = np.zeros((300, 300), np.float32)
        place[:band] = place[:, :band] = place[-band:] = place[:, -band:] = 1
        left, top, wide, high = fit(PHOTO, place)
        assert place[top : top + high, left : left + wide].mean() > 0.98
        assert 0.5 * band < high <= band


class TestStand:
    @pytest.mark.parametrize("alpha", [254, 0])
    def test_specks_far_from_the_place_are_no_room(self, alpha):
        place = np.zeros((300, 300), np.uint8)
        place[0, 0] = place[299, 299] = 255 - alpha
        place[100:140, 200:240] = 255
        assert stand(PHOTO, place) == (200, 120, 40, 20)

    def test_is_in_the_largest_of_several_holes(self):
        place = np.zeros((4000, 6000), np.uint8)
        place[100:120, 100:120] = place[3900:3930, 5000:5030] = place[2000:2080, 3000:3080] = 255
        assert stand(PHOTO, place) == (3000, 2040, 80, 40)

    def test_a_mask_with_the_noise_of_its_compression_holds_it_whole(self):
        place = np.zeros((100, 100), np.uint8)
        place[20:80, 20:80] = np.random.default_rng(0).integers(245, 256, (60, 60))
        assert stand(PHOTO, place) == (20, 50, 60, 30)
        assert stand(PHOTO, place // 2 + 5) == (20, 50, 60, 30)

    def test_a_soft_edge_is_no_room(self):
        ramp = np.clip(np.arange(100) * 10, 0, 255).astype(np.uint8)
        row = np.minimum(ramp, ramp[::-1])
        left, top, wide, high = stand(PHOTO, np.minimum(row[:, None], row[None]))
        assert row[[left, left + wide - 1]].min() >= 0.9 * 255
        assert row[top + high - 1] >= 0.9 * 255
