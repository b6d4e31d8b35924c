"""Which views a scene is learned from, and what counts in them."""

import numpy as np
import pytest
import torch

from objdrive.training.recipe import make_recipe
from objdrive.training.views import Scene, SceneObject, make_views, with_mended_masks

EDGE = 128


def square(left, top, edge):
    """(H, W) mask of a square, in parts of the picture's edge."""
    mask = np.zeros((EDGE, EDGE), np.float32)
    x, y, side = (round(value * EDGE) for value in (left, top, edge))
    mask[y : y + side, x : x + side] = 1
    return mask


def scene(*masks):
    image = np.random.default_rng(0).integers(0, 255, (EDGE, EDGE, 3), np.uint8)
    return Scene("key", image, tuple(SceneObject(f"{n}", "mug", mask) for n, mask in enumerate(masks)))


def views_of(base, *masks, overrides=()):
    """Views in the places that objects have in the photo, or in their close-ups."""
    return make_views(base, scene(*masks), make_recipe(overrides=["placements=1", *overrides]))


def filled(view):
    """How much of a view is the object's."""
    return float((view.weights > 0.5).float().mean())


def test_a_large_object_is_seen_in_its_picture(tiny64):
    for whole in views_of(tiny64, square(0.2, 0.2, 0.6)):
        assert whole.shown == (0,)
        assert filled(whole) == pytest.approx(0.36, abs=0.05)


def test_an_object_is_seen_on_dark_and_on_light_grey(tiny64):
    dark, light = views_of(tiny64, square(0.2, 0.2, 0.6))
    corners = [float(tiny64.decode_latents(view.latents[None])[..., :8, :8].mean()) for view in (dark, light)]
    assert corners == pytest.approx([0.25, 0.75], abs=0.05)
    assert torch.equal(dark.weights, light.weights)


@pytest.mark.parametrize("place", [(0.4, 0.4), (0.0, 0.85)])
def test_a_small_object_is_seen_at_its_least_size_wherever_it_is(tiny64, place):
    close, _ = views_of(tiny64, square(*place, 0.15))
    assert filled(close) == pytest.approx(0.36, abs=0.05)


def test_what_is_outside_of_the_mask_counts_for_nothing(tiny64):
    view, _ = views_of(tiny64, square(0.25, 0.25, 0.5))
    assert float(view.weights.min()) == 0
    plain, _ = views_of(tiny64, square(0.25, 0.25, 0.5), overrides=["masked=false"])
    assert bool((plain.weights == 1).all())


def test_neighbours_are_seen_together_and_each_alone(tiny64):
    whole, _, *close = views_of(tiny64, square(0, 0, 0.3), square(0.6, 0.6, 0.3))
    assert whole.shown == (0, 1)
    assert filled(whole) == pytest.approx(2 * 0.3**2, abs=0.05)
    assert [view.shown for view in close] == [(0,), (0,), (1,), (1,)]
    assert all(filled(view) == pytest.approx(0.6**2, abs=0.06) for view in close)


def box_of(view):
    """(left, top, right, bottom) of the object, in parts of the view's edge."""
    rows, columns = np.nonzero(view.weights[0].numpy() >= 0.5)
    edge = view.weights.shape[-1]
    return columns.min() / edge, rows.min() / edge, (columns.max() + 1) / edge, (rows.max() + 1) / edge


def placed(base, *masks, overrides=()):
    return make_views(base, scene(*masks), make_recipe(overrides=overrides))


class TestPlacements:
    """Objects are seen at many places and sizes, whole, so that none is learned with them."""

    def test_an_object_is_whole_at_every_place_and_size(self, tiny64):
        views = placed(tiny64, square(0.1, 0.6, 0.25))
        boxes = np.array([box_of(view) for view in views])
        sizes = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
        assert len(views) == 24
        assert sizes.min() >= 0.45 - 2 / 16
        assert sizes.max() <= 0.8 + 2 / 16
        assert np.ptp(sizes) > 0.15
        middles = (boxes[:, 2:] + boxes[:, :2]) / 2
        assert (np.ptp(middles, axis=0) > 0.2).all()

    def test_grounds_are_dark_and_light_by_turns(self, tiny64):
        views = placed(tiny64, square(0.1, 0.6, 0.25), overrides=["placements=4"])
        # A corner that no object reaches.
        greys = [float(tiny64.decode_latents(view.latents[None])[..., :3, :3].mean()) for view in views]
        assert greys == pytest.approx([0.25, 0.75] * 2, abs=0.08)

    @pytest.mark.parametrize("mirrored", [True, False])
    def test_half_of_them_show_the_object_as_in_a_mirror(self, tiny64, mirrored):
        heavy_on_the_left = np.maximum(square(0.2, 0.2, 0.3), square(0.65, 0.6, 0.15))
        views = placed(tiny64, heavy_on_the_left, overrides=["placements=4", f"mirrored={mirrored}"])
        sides = []
        for view in views:
            left, _, right, _ = box_of(view)
            columns = view.weights[0].sum(dim=0)
            middle = round((left + right) / 2 * len(columns))
            sides.append("left" if columns[:middle].sum() > columns[middle:].sum() else "right")
        assert sides == ["left", "left", *(["right"] * 2 if mirrored else ["left"] * 2)]

    def test_the_sizes_are_the_recipes(self, tiny64):
        overrides = ["placements=6", "least_placed_fill=0.3", "most_placed_fill=0.35"]
        for view in placed(tiny64, square(0.3, 0.3, 0.5), overrides=overrides):
            left, top, right, bottom = box_of(view)
            assert max(right - left, bottom - top) == pytest.approx(0.33, abs=0.1)

    def test_they_are_the_scenes_own_and_the_same_again(self, tiny64):
        one, again = (placed(tiny64, square(0.3, 0.3, 0.5), overrides=["placements=2"]) for _ in range(2))
        other = make_views(tiny64, scene(square(0.3, 0.3, 0.5)), make_recipe(overrides=["placements=2", "seed=1"]))
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(one, again, strict=True))
        assert not any(torch.equal(a.latents, b.latents) for a, b in zip(one, other, strict=True))

    def test_neighbours_are_placed_together_and_each_alone(self, tiny64):
        views = placed(tiny64, square(0, 0, 0.3), square(0.6, 0.6, 0.3), overrides=["placements=3"])
        assert [view.shown for view in views] == [(0, 1)] * 3 + [(0,)] * 3 + [(1,)] * 3


def coloured(ground, colour, *masks):
    """A scene of grey objects, with another colour where `ground` is 1."""
    image = np.full((EDGE, EDGE, 3), 128, np.uint8)
    image[ground > 0] = colour
    return Scene("key", image, scene(*masks).objects)


def test_each_object_has_a_mask_of_its_own_that_follows_the_picture():
    exact = square(0.1, 0.3, 0.3), square(0.4, 0.3, 0.3)
    image = coloured(np.maximum(*exact), (200, 60, 50), *exact).image
    careless = square(0.15, 0.35, 0.2)
    objects = (SceneObject("left", "mug", careless), SceneObject("right", "mug", exact[1]))
    mended = with_mended_masks(Scene("key", image, objects))
    assert np.abs(mended.objects[0].mask - exact[0]).mean() < 0.01
    assert np.abs(careless - exact[0]).mean() > 0.04
    assert (mended.objects[0].object_id, mended.key, mended.image) == ("left", "key", image)
    # Once is enough: what was mended ahead of a fine-tune is not looked at again.
    assert with_mended_masks(mended) is mended


def test_of_its_neighbours_an_object_learns_nothing(tiny64):
    masks = square(0.1, 0.3, 0.3), square(0.44, 0.3, 0.3)
    blue, red = (
        make_views(tiny64, coloured(masks[1], colour, *masks), make_recipe()) for colour in ((0, 0, 255), (255, 0, 0))
    )
    for one, other in zip(blue, red, strict=True):
        assert torch.equal(one.latents, other.latents) == (one.shown == (0,))


@pytest.mark.parametrize(("plain", "same"), [("true", True), ("false", False)])
def test_of_the_photos_ground_an_object_learns_nothing_unless_asked_to(tiny64, plain, same):
    mask = square(0.2, 0.2, 0.6)
    recipe = make_recipe(overrides=["placements=1", f"plain_ground={plain}"])
    (blue, *_), (red, *_) = (
        make_views(tiny64, coloured(1 - mask, colour, mask), recipe) for colour in ((0, 0, 255), (255, 0, 0))
    )
    assert torch.equal(blue.latents, red.latents) == same


def test_where_masks_overlap_nothing_is_learned_alone(tiny64):
    masks = square(0.1, 0.3, 0.4), square(0.3, 0.3, 0.4)
    _, _, left, _, right, _ = views_of(tiny64, *masks)
    assert filled(left) == pytest.approx(0.6**2 / 2, abs=0.06)
    assert filled(right) == pytest.approx(0.6**2 / 2, abs=0.06)


def test_neighbours_that_fill_the_photo_are_seen_alone_too(tiny64):
    left = np.zeros((EDGE, EDGE), np.float32)
    left[:, : EDGE // 2] = 1
    assert all(bool(view.latents.isfinite().all()) for view in views_of(tiny64, left, 1 - left))


def test_small_neighbours_are_cropped_together(tiny64):
    whole, *_ = views_of(tiny64, square(0.4, 0.4, 0.1), square(0.52, 0.4, 0.1))
    assert filled(whole) > 5 * 2 * 0.1**2


def test_the_preset_of_the_paper_takes_the_photo_as_it_is(tiny64):
    masks = square(0.4, 0.4, 0.15), square(0.6, 0.4, 0.15)
    (whole,) = make_views(tiny64, scene(*masks), make_recipe("paper", overrides=["soft_mask=true"]))
    assert filled(whole) == pytest.approx(2 * 0.15**2, abs=0.02)
