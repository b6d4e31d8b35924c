"""Who draws which part of a picture, from maps of attention."""

import pytest
import torch

from objdrive.sampling.regions import asks_for_several, find_regions


def blob(down, across, height=1.0, edge=8):
    """(edge, edge): attention to a thing whose middle is there, in parts of the edge."""
    middles = (torch.arange(edge) + 0.5) / edge
    square = (middles[:, None] - down) ** 2 + (middles[None] - across) ** 2
    return 0.01 + height * torch.exp(-square / 0.015)


def test_a_single_thing_is_its_objects_everywhere():
    shares = find_regions(blob(0.5, 0.4)[None], (16, 16))
    assert torch.equal(shares[0], torch.ones(16, 16))
    assert not shares[1].any()


def test_of_two_things_the_one_that_the_word_means_more_is_the_objects():
    """The other one, say a teapot beside it, is the base's."""
    shares = find_regions((blob(0.5, 0.25, 0.7) + blob(0.5, 0.75))[None], (16, 16))
    own, base = shares[0], shares[1]
    assert own[8, 12] > 0.95
    assert base[8, 3] > 0.95
    assert torch.allclose(shares.sum(dim=0), torch.ones(16, 16))


@pytest.mark.parametrize("swapped", [False, True])
def test_each_of_two_objects_has_the_thing_that_its_word_means(swapped):
    left, right = blob(0.5, 0.25) + blob(0.5, 0.75, 0.6), blob(0.5, 0.75) + blob(0.5, 0.25, 0.6)
    shares = find_regions(torch.stack([right, left] if swapped else [left, right]), (16, 16))
    first, second = (shares[1], shares[0]) if swapped else (shares[0], shares[1])
    assert first[8, 3] > 0.95
    assert second[8, 12] > 0.95
    assert not shares[2].abs().gt(1e-6).any()


def test_objects_that_share_one_thing_divide_it_along_its_length():
    wide = sum(blob(0.5, across) for across in (0.3, 0.4, 0.5, 0.6, 0.7))
    shares = find_regions(torch.stack([wide, wide]), (16, 16))
    sides = {int(one[8, 2] > 0.5) for one in shares[:2]}
    assert sides == {0, 1}
    assert torch.allclose(shares[0].flip(1), shares[1], atol=0.2)


def test_things_beyond_the_objects_are_the_bases():
    maps = [blob(0.25, across, 1.0) + 0.5 * blob(0.8, 0.5) for across in (0.2, 0.8)]
    shares = find_regions(torch.stack(maps), (16, 16))
    assert shares[2, 13, 8] > 0.9
    assert shares[0, 4, 3] > 0.9
    assert shares[1, 4, 12] > 0.9


@pytest.mark.parametrize(
    ("prompt", "several"),
    [
        ("a photo of {} on grass", False),
        ("a photo of {} and a teapot", False),
        ("three {} on grass", True),
        ("a Pair of {}", True),
        ("12 {}", True),
        ("a photo of someone's {}", False),
    ],
)
def test_numbers_before_an_object_ask_for_several(prompt, several):
    assert asks_for_several(prompt) is several
