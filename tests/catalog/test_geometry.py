"""Windows around objects, and cutting them out of pictures."""

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from objdrive.catalog.geometry import (
    Window,
    bounding_box,
    close_window,
    cut,
    object_alone,
    object_window,
    placed_window,
    whole_window,
)


def colours(height: int = 32, width: int = 48) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 5, y * 7, (x + y) * 3], axis=-1).astype(np.uint8)


def soft_box(height: int, width: int, box: tuple[int, int, int, int]) -> NDArray[np.float32]:
    mask = np.zeros((height, width), np.float32)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 1
    return mask


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


@pytest.mark.parametrize(("across", "down"), [(0, 0), (-1, 0.5), (1, -1), (0.2, 1)])
def test_a_placed_window_holds_the_object_where_it_is_asked_to(across: float, down: float) -> None:
    mask = np.zeros((60, 100), np.float32)
    mask[20:40, 30:70] = 1
    window = placed_window(mask, 0.5, across, down)
    assert window.side == 80
    left, top = (30 - window.left) / 80, (20 - window.top) / 80
    # Half of the frame is free along the object's length, three quarters across it.
    assert left == pytest.approx(0.25 * (1 + across))
    assert top == pytest.approx(0.375 * (1 + down))
