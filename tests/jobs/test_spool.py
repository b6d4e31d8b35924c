"""Lines come out as they went in, however they are read."""

import threading

import pytest

from jobs.spool import spooled


def test_all_lines_in_order():
    lines = [f"line {number} é\t" + "x" * (number % 300) for number in range(5000)]
    assert list(spooled(lines)) == lines


def test_no_lines():
    assert list(spooled([])) == []


def test_reads_ahead_of_its_consumer():
    at_the_end = threading.Event()

    def source():
        yield from map(str, range(1000))
        at_the_end.set()

    lines = spooled(source())
    assert next(lines) == "0"
    assert at_the_end.wait(timeout=60)
    assert list(lines) == [str(number) for number in range(1, 1000)]


def test_a_line_is_there_before_the_next_one_is_made():
    received = threading.Event()

    def source():
        yield "first"
        assert received.wait(timeout=60)
        yield "second"

    lines = spooled(source())
    assert next(lines) == "first"
    received.set()
    assert list(lines) == ["second"]


def test_a_failure_comes_after_the_lines_before_it():
    def source():
        yield "first"
        raise OSError("gone")

    lines = spooled(source())
    assert next(lines) == "first"
    with pytest.raises(OSError, match="gone"):
        next(lines)


def test_closing_ends_the_source():
    ended = threading.Event()

    def source():
        try:
            while True:
                yield "again"
        finally:
            ended.set()

    lines = spooled(source())
    assert next(lines) == "again"
    lines.close()
    assert ended.wait(timeout=60)
