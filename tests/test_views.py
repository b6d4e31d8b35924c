"""Which views a scene is learned from, and what counts in them."""

import numpy as np
import pytest
import torch

from objdrive.recipe import make_recipe
from objdrive.views import Scene, SceneObject, make_views

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
    return make_views(base, scene(*masks), make_recipe(overrides=overrides))


def filled(view):
    """How much of a view is the object's."""
    return float((view.weights > 0.5).float().mean())


def test_a_large_object_is_seen_in_its_picture(tiny64):
    (whole,) = views_of(tiny64, square(0.2, 0.2, 0.6))
    assert whole.shown == (0,)
    assert filled(whole) == pytest.approx(0.36, abs=0.05)


@pytest.mark.parametrize("place", [(0.4, 0.4), (0.0, 0.85)])
def test_a_small_object_is_seen_at_its_least_size_wherever_it_is(tiny64, place):
    (close,) = views_of(tiny64, square(*place, 0.15))
    assert filled(close) == pytest.approx(0.36, abs=0.05)


def test_what_is_outside_of_the_mask_counts_for_nothing(tiny64):
    (view,) = views_of(tiny64, square(0.25, 0.25, 0.5))
    assert float(view.weights.min()) == 0
    (plain,) = views_of(tiny64, square(0.25, 0.25, 0.5), overrides=["masked=false"])
    assert bool((plain.weights == 1).all())


def test_neighbours_are_seen_together_and_each_alone(tiny64):
    whole, *close = views_of(tiny64, square(0, 0, 0.3), square(0.6, 0.6, 0.3))
    assert whole.shown == (0, 1)
    assert filled(whole) == pytest.approx(2 * 0.3**2, abs=0.05)
    assert [view.shown for view in close] == [(0,), (1,)]
    assert all(filled(view) == pytest.approx(0.6**2, abs=0.06) for view in close)


def test_of_its_neighbours_an_object_learns_nothing(tiny64):
    masks = square(0.1, 0.3, 0.3), square(0.44, 0.3, 0.3)
    plain = np.full((EDGE, EDGE, 3), 128, np.uint8)
    coloured = plain.copy()
    coloured[masks[1] > 0] = (255, 0, 255)
    objects = scene(*masks).objects
    recipe = make_recipe(overrides=["masked=false"])
    seen, unseen = (make_views(tiny64, Scene("key", image, objects), recipe) for image in (coloured, plain))
    assert not torch.equal(seen[0].latents, unseen[0].latents)
    assert torch.equal(seen[1].latents, unseen[1].latents)
    # The view reaches from 0 to 0.5 of the photo, the other object from 0.44 on.
    assert bool((seen[1].weights[..., :14] == 1).all())
    assert float(seen[1].weights[..., 14:].min()) == 0


def test_neighbours_that_fill_the_photo_are_seen_alone_too(tiny64):
    left = np.zeros((EDGE, EDGE), np.float32)
    left[:, : EDGE // 2] = 1
    _, *close = views_of(tiny64, left, 1 - left)
    assert all(bool(view.latents.isfinite().all()) for view in close)


def test_small_neighbours_are_cropped_together(tiny64):
    whole, *_ = views_of(tiny64, square(0.4, 0.4, 0.1), square(0.52, 0.4, 0.1))
    assert filled(whole) > 5 * 2 * 0.1**2


def test_the_preset_of_the_paper_takes_the_photo_as_it_is(tiny64):
    masks = square(0.4, 0.4, 0.15), square(0.6, 0.4, 0.15)
    (whole,) = make_views(tiny64, scene(*masks), make_recipe("paper", overrides=["soft_mask=true"]))
    assert filled(whole) == pytest.approx(2 * 0.15**2, abs=0.02)
