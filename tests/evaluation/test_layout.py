"""Where things are: told on plain and on patterned grounds, once, twice or not at all."""

import numpy as np
import pytest

from jobs.pretrain.contexts import CONTEXTS
from objdrive.evaluation.layout import Box, around, find_things, overlap, spread


def scene(*places: tuple[slice, slice], context: str = "on grass") -> np.ndarray:
    """A picture of 64 x 64 with red things before a backdrop."""
    picture = CONTEXTS[context](np.random.default_rng(0), 64).clip(0, 255)
    for place in places:
        picture[place] = (210, 40, 40)
    return picture.astype(np.uint8)


@pytest.mark.parametrize("context", ["on grass", "on sand", "in the snow", "on a wooden table", "on a checkered cloth"])
def test_a_thing_is_found_where_it_is(context: str) -> None:
    (box,) = find_things(scene(np.s_[10:42, 20:52], context=context))
    assert overlap(box, Box(20 / 64, 10 / 64, 52 / 64, 42 / 64)) > 0.6


def test_a_thing_that_reaches_the_border_is_found() -> None:
    (box,) = find_things(scene(np.s_[4:64, 24:40]))
    assert overlap(box, Box(24 / 64, 4 / 64, 40 / 64, 1)) > 0.75


def test_things_are_counted_the_largest_first() -> None:
    boxes = find_things(scene(np.s_[20:40, 6:20], np.s_[10:50, 34:58], np.s_[2:4, 2:4]))
    assert len(boxes) == 2
    assert boxes[0].area > boxes[1].area
    assert overlap(around(boxes), Box(6 / 64, 10 / 64, 58 / 64, 50 / 64)) > 0.8


def test_a_backdrop_alone_shows_nothing() -> None:
    assert find_things(scene()) == []


def test_overlap_is_intersection_over_union() -> None:
    left, right = Box(0.0, 0.0, 0.5, 1.0), Box(0.25, 0.0, 0.75, 1.0)
    assert overlap(left, right) == pytest.approx(1 / 3)
    assert overlap(left, left) == 1
    assert overlap(left, Box(0.6, 0.0, 0.9, 1.0)) == 0


def test_spread_is_none_for_one_layout_and_grows_with_distance() -> None:
    boxes = [Box(0.1 * step, 0.2, 0.5 + 0.1 * step, 0.8) for step in range(3)]
    assert spread([boxes[0]] * 3) == 0
    assert 0 < spread([boxes[0], boxes[1]]) < spread([boxes[0], boxes[2]]) < 1
    with pytest.raises(ValueError, match="at least two"):
        spread(boxes[:1])
