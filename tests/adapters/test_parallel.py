import threading
from itertools import count

import pytest

from objdrive.adapters.parallel import THREADS, in_parallel


def test_results_come_in_order_whoever_is_done_first():
    last_is_done = threading.Event()

    def call(number):
        if number == 0:
            assert last_is_done.wait(30)
        if number == 9:
            last_is_done.set()
        return number * number

    assert [(item, done.result()) for item, done in in_parallel(call, range(10))] == [(n, n * n) for n in range(10)]


def test_many_calls_run_at_once():
    together = threading.Barrier(THREADS)
    results = in_parallel(lambda _: together.wait(30), range(THREADS))
    assert sorted(done.result() for _, done in results) == list(range(THREADS))


def test_an_endless_stream_is_read_a_little_ahead():
    read = []

    def items():
        for number in count():
            read.append(number)
            yield number

    results = in_parallel(str, items())
    for expected in range(1000):
        item, done = next(results)
        assert (item, done.result()) == (expected, str(expected))
        assert len(read) <= expected + 8 * THREADS
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("objdrive-store")]


def test_a_call_that_fails_ends_nothing_else():
    results = list(in_parallel(lambda number: 1 / number, [1, 0, 2]))
    assert isinstance(results[1][1].exception(), ZeroDivisionError)
    assert [results[0][1].result(), results[2][1].result()] == [1.0, 0.5]


def test_a_stream_that_fails_is_told_after_what_came_before():
    def items():
        yield from range(3)
        raise OSError("no more")

    results = in_parallel(str, items())
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no more"):
        next(results)
