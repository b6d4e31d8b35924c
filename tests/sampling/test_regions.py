"""Who draws which part of a picture, from maps of attention."""

import pytest
import torch

from objdrive.sampling.regions import asks_for_several, find_regions

NO_WORDS = torch.empty(0, 8, 8)


def blob(down, across, height=1.0, edge=8):
    """(edge, edge): attention to a thing whose middle is there, in parts of the edge."""
    middles = (torch.arange(edge) + 0.5) / edge
    square = (middles[:, None] - down) ** 2 + (middles[None] - across) ** 2
    return 0.01 + height * torch.exp(-square / 0.015)


def test_a_single_thing_is_its_objects_everywhere():
    shares = find_regions(blob(0.5, 0.4)[None], NO_WORDS, (16, 16))
    assert torch.equal(shares[0], torch.ones(16, 16))
    assert not shares[1].any()


def test_of_two_things_the_one_that_the_word_means_more_is_the_objects():
    """The other one, say a teapot beside it, is the base's."""
    shares = find_regions((blob(0.5, 0.25, 0.7) + blob(0.5, 0.75))[None], NO_WORDS, (16, 16))
    own, base = shares[0], shares[1]
    assert own[8, 12] > 0.95
    assert base[8, 3] > 0.95
    assert torch.allclose(shares.sum(dim=0), torch.ones(16, 16))


def test_a_second_thing_that_the_objects_word_hardly_means_is_the_bases():
    """Its own words tell where it is."""
    own, teapot = blob(0.5, 0.25) + blob(0.5, 0.75, 0.3), blob(0.5, 0.25, 0.8) + blob(0.5, 0.75)
    assert find_regions(own[None], NO_WORDS, (16, 16))[0].all()
    shares = find_regions(own[None], teapot[None], (16, 16))
    assert shares[0, 8, 3] > 0.95
    assert shares[1, 8, 12] > 0.95


def test_words_of_the_backdrop_make_no_thing():
    own = blob(0.5, 0.25)
    grass = 1 - own + blob(0.5, 0.75, 0.3)
    assert find_regions(own[None], grass[None], (16, 16))[0].all()


def test_things_that_touch_are_told_apart():
    own = blob(0.5, 0.32) + blob(0.5, 0.7, 0.9)
    shares = find_regions(own[None], NO_WORDS, (16, 16))
    assert shares[0, 8, 3] > 0.95
    assert shares[1, 8, 12] > 0.95


@pytest.mark.parametrize("swapped", [False, True])
def test_each_of_two_objects_has_the_thing_that_its_word_means(swapped):
    left, right = blob(0.5, 0.25) + blob(0.5, 0.75, 0.6), blob(0.5, 0.75) + blob(0.5, 0.25, 0.6)
    shares = find_regions(torch.stack([right, left] if swapped else [left, right]), NO_WORDS, (16, 16))
    first, second = (shares[1], shares[0]) if swapped else (shares[0], shares[1])
    assert first[8, 3] > 0.95
    assert second[8, 12] > 0.95
    assert not shares[2].abs().gt(1e-6).any()


def test_objects_that_share_one_thing_divide_it_along_its_length():
    wide = sum(blob(0.5, across) for across in (0.3, 0.4, 0.5, 0.6, 0.7))
    shares = find_regions(torch.stack([wide, wide]), NO_WORDS, (16, 16))
    sides = {int(one[8, 2] > 0.5) for one in shares[:2]}
    assert sides == {0, 1}
    assert torch.allclose(shares[0].flip(1), shares[1], atol=0.2)


def test_things_beyond_the_objects_are_the_bases():
    maps = [blob(0.25, across, 1.0) + 0.5 * blob(0.8, 0.5) for across in (0.2, 0.8)]
    shares = find_regions(torch.stack(maps), NO_WORDS, (16, 16))
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
