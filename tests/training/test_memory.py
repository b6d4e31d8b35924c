from collections import namedtuple

import psutil
import pytest

from objdrive.training import memory
from objdrive.training.memory import LARGEST_GROUP, LARGEST_ON_PROCESSOR, fitting_group_size, group_size
from objdrive.training.recipe import Recipe

RECIPE = Recipe()
GIB = 2**30
SCENE = 2.8 * GIB
"""Of SD 1.5, as it is counted."""


class TestGroupSize:
    @pytest.fixture
    def free_memory(self, monkeypatch):
        """Call it to set how many bytes are free."""
        memory = namedtuple("memory", "available")
        return lambda size: monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(size))

    def test_is_a_size_of_a_group(self, tiny64):
        assert 1 <= fitting_group_size(tiny64, RECIPE) <= LARGEST_ON_PROCESSOR

    def test_is_one_at_least_and_the_largest_at_most(self, tiny64, free_memory):
        free_memory(0)
        assert fitting_group_size(tiny64, RECIPE) == 1
        free_memory(10**15)
        assert fitting_group_size(tiny64, RECIPE) == LARGEST_ON_PROCESSOR

    def test_counts_what_grows_with_the_group_and_no_shared_weights(self, tiny64, free_memory, monkeypatch):
        monkeypatch.setattr(memory, "LARGEST_ON_PROCESSOR", 10**9)
        free_memory(10**13)
        sizes = [fitting_group_size(tiny64, Recipe(rank=1, views=views, ccr_weight=0.0)) for views in (1, 4)]
        assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.15)

    @pytest.mark.parametrize(
        ("card", "share", "least", "most"),
        # What SD 1.5's architecture took on an H200: 9, 19 and 59 GiB in groups of 1, 4 and 16.
        [(12, 1.0, 1, 1), (24, 1.0, 4, 5), (80, 1.0, 17, 22), (80, 0.25, 2, 4), (80, 0.1, 1, 1), (288, 1.0, 32, 32)],
    )
    def test_fills_a_card_or_a_share_of_it(self, card, share, least, most):
        free = int((card * share - 4) * GIB)
        size = group_size(free, int(SCENE), gpu=True)
        assert least <= size <= most <= LARGEST_GROUP
        assert 5.7 + 3.3 * size < max(card * share, 9.1)

    @pytest.mark.parametrize("free", [-GIB, 0, 1, GIB])
    def test_is_one_where_nothing_fits(self, free):
        assert group_size(free, int(SCENE), gpu=True) == group_size(free, int(SCENE), gpu=False) == 1
