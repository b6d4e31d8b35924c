"""Which views a scene is learned from, and what counts in them."""

import numpy as np
import pytest
import torch

from objdrive.recipe import make_recipe
from objdrive.views import Scene, SceneObject, make_views

EDGE = 128
POOL = 6


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
    recipe = make_recipe(overrides=[f"view_pool={POOL}", *overrides])
    return make_views(base, scene(*masks), recipe, torch.Generator().manual_seed(0))


def filled(view):
    """How much of a view is the object's."""
    return float((view.weights > 0.5).float().mean())


def test_a_large_object_is_seen_in_its_picture_alone(tiny64):
    (whole,) = views_of(tiny64, square(0.2, 0.2, 0.6))
    assert whole.shown == (0,)
    assert filled(whole) == pytest.approx(0.36, abs=0.05)


def test_a_small_object_is_zoomed_in_on_up_to_its_usual_size(tiny64):
    whole, *zoomed = views_of(tiny64, square(0.4, 0.4, 0.15))
    assert len(zoomed) == POOL - 1
    assert filled(whole) < 0.03
    assert all(filled(whole) < filled(view) <= 0.7**2 + 0.05 for view in zoomed)


def test_neighbours_are_seen_together_and_each_alone(tiny64):
    whole, *zoomed = views_of(tiny64, square(0, 0, 0.45), square(0.5, 0.5, 0.5))
    assert whole.shown == (0, 1)
    assert [view.shown for view in zoomed] == [(0,)] * (POOL - 1) + [(1,)] * (POOL - 1)


def test_a_background_counts_only_where_the_prompt_names_it(tiny64):
    always = views_of(tiny64, square(0.4, 0.4, 0.2), overrides=["backdrop=1", "outside_weight=0.25"])
    never = views_of(tiny64, square(0.4, 0.4, 0.2), overrides=["backdrop=0", "outside_weight=0.25"])
    assert [float(view.weights.min()) for view in always] == [0] + [0.25] * (POOL - 1)
    assert [float(view.weights.min()) for view in never] == [0] * POOL
    assert all(view.context.endswith("background") for view in always[1:])
    assert not any(view.context for view in (always[0], *never))


def test_without_zoom_there_is_the_picture_alone(tiny64):
    assert len(views_of(tiny64, square(0.4, 0.4, 0.15), overrides=["zoom=0"])) == 1
