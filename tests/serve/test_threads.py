import pytest
import torch

from serve.threads import fastest, use_threads


class Machine:
    """Where a drawing takes as long as the test says, for each number of threads."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.now = 0.0
        self.drawn = []

    def draw(self, count):
        self.drawn.append(count)
        took = self.seconds[count]
        self.now += took.pop(0) if isinstance(took, list) else took

    def fastest(self, **options):
        return fastest(sorted(self.seconds), self.draw, clock=lambda: self.now, **options)


def test_the_number_that_is_fastest_in_most_rounds_is_taken():
    assert Machine({1: 0.2, 2: 0.1, 4: 0.3}).fastest() == 2
    # Once somebody else needed the core; and the first drawing of all is slow.
    assert Machine({1: [9.0, 0.2, 0.2, 0.2], 2: [0.1, 0.1, 0.5, 0.5]}).fastest(most_seconds=100) == 1


def test_a_slow_base_is_drawn_once_with_each():
    machine = Machine({1: 50.0, 8: 9.0})
    assert machine.fastest() == 8
    assert machine.drawn == [1, 8]


def test_where_there_is_no_choice_nothing_is_measured():
    machine = Machine({1: 1.0})
    assert machine.fastest() == 1
    assert machine.drawn == []


@pytest.mark.parametrize("wanted", [None, 1])
def test_the_server_draws_with_that_number(small, monkeypatch, wanted):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    use_threads(small, wanted)
    assert set(used) == ({1} if wanted else {1, 2, 4})
