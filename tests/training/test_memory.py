from collections import namedtuple

import psutil
import pytest

from objdrive.training.memory import LARGEST_GROUP, fitting_group_size
from objdrive.training.recipe import Recipe

RECIPE = Recipe()


class TestGroupSize:
    @pytest.fixture
    def free_memory(self, monkeypatch):
        """Call it to set how many bytes are free."""
        memory = namedtuple("memory", "available")
        return lambda size: monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(size))

    def test_is_a_size_of_a_group(self, tiny64):
        assert 1 <= fitting_group_size(tiny64, RECIPE) <= LARGEST_GROUP

    def test_is_one_at_least_and_the_largest_at_most(self, tiny64, free_memory):
        free_memory(0)
        assert fitting_group_size(tiny64, RECIPE) == 1
        free_memory(10**15)
        assert fitting_group_size(tiny64, RECIPE) == LARGEST_GROUP

    def test_counts_what_grows_with_the_group_and_no_shared_weights(self, tiny64, free_memory, monkeypatch):
        monkeypatch.setattr("objdrive.training.memory.LARGEST_GROUP", 10**9)
        free_memory(10**13)
        sizes = [fitting_group_size(tiny64, Recipe(rank=1, views=views, ccr_weight=0.0)) for views in (1, 4)]
        assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.15)
