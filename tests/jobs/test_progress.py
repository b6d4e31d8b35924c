"""How far a run has come, in words and on streams."""

import io
import threading
from dataclasses import replace
from itertools import pairwise

import pytest

from jobs.progress import Pace, Progress, Standing, describe


def standing(*, done=0, failed=0, known=10, total=10, trained=0, **working):
    return Standing(done, failed, known, total, trained, **working)


@pytest.mark.parametrize(
    ("now", "seconds", "text"),
    [
        (standing(), 0.0, "0 done, 0 failed, 10 left"),
        (standing(known=7, total=None), 3.0, "0 done, 0 failed, 7 left so far, still reading the manifest"),
        (
            standing(done=4, failed=1, total=None, trained=4),
            60.0,
            "4 done, 1 failed, 5 left so far, still reading the manifest, 4.0 objects a minute",
        ),
        (standing(done=4, failed=1, trained=4), 60.0, "4 done, 1 failed, 5 left, 4.0 objects a minute"),
        # What was committed before took no time.
        (standing(done=5, known=10, trained=1), 10.0, "5 done, 0 failed, 5 left, 6.0 objects a minute"),
        (standing(working=8), 5.0, "0 done, 0 failed, 8 in work, 2 left"),
        (standing(working=8, step=119.6, steps=231), 90.0, "0 done, 0 failed, 8 in work (step 120 of 231), 2 left"),
        (standing(done=9, failed=1, trained=3), 90.0, "9 done, 1 failed, 0 left, 2.0 objects a minute"),
        (standing(known=0, total=0), 1.0, "0 done, 0 failed, 0 left"),
    ],
)
def test_a_standing_in_words(now, seconds, text):
    assert describe(now, seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(50.0, "50 s to go"), (75.0, "1 min 15 s to go"), (599_999.6, "166 h 40 min to go")],
)
def test_the_time_to_go_in_words(seconds, text):
    assert describe(standing(), 1.0, seconds).endswith(f"10 left, {text}")


def to_go(pace, at, *, rows=100, group=10, rate=1.0, start=30.0):
    """The time to go of a run of groups of ten that makes `rate` rows a second after its start."""
    made = max(0.0, at - start) * rate
    done = int(made // group) * group
    steps = 100 * (made - done) / group
    return pace.seconds_to_go(
        standing(done=done, known=rows, total=rows, trained=done, working=group, step=steps, steps=100), at
    )


def test_the_time_to_go_is_right_before_the_first_object_is_done_and_falls():
    pace = Pace()
    shown = [to_go(pace, float(at)) for at in range(130)]
    assert shown[:30] == [None] * 30
    assert next(second for second, value in enumerate(shown) if value is not None) < 45
    said = [(second, value) for second, value in enumerate(shown) if value is not None]
    assert all(value == pytest.approx(130 - second, abs=3) for second, value in said)
    assert all(later < before for (_, before), (_, later) in pairwise(said))


def test_small_changes_of_pace_do_not_raise_the_time_to_go_and_large_ones_do():
    pace, row = Pace(), standing(known=100, total=100, trained=1, done=1)
    pace.seconds_to_go(row, 0.0)
    expected = pace.seconds_to_go(replace(row, trained=11, done=11), 100.0)
    assert expected == pytest.approx(890)
    # Ten seconds a row: a row late by a tenth is no cause, a worker lost is.
    assert pace.seconds_to_go(replace(row, trained=21, done=21), 210.0) == pytest.approx(780)
    assert pace.seconds_to_go(replace(row, trained=22, done=22), 420.0) == pytest.approx(78 * 420 / 21)


@pytest.mark.parametrize(("workers", "rows", "group"), [(1, 24, 12), (2, 13, 4), (2, 100, 8), (8, 1000, 16)])
def test_phases_of_different_pace_do_not_raise_it(workers, rows, group):
    """Workers take groups at once; a group's steps are slow at first (masks), quick, and slow again (previews)."""
    pace, shown, seconds = Pace(), [], 0
    phases = ((10.0, 30), (20.0, 200), (8.0, 40))  # seconds, steps
    steps, lasts = sum(count for _, count in phases), sum(span for span, _ in phases)
    rounds = -(-rows // (workers * group))
    while seconds < rounds * lasts:
        done = min(rows, int(seconds // lasts) * workers * group)
        within, made = seconds % lasts, 0.0
        for span, count in phases:
            made += count * min(1.0, max(0.0, within / span))
            within -= span
        working = min(workers * group, rows - done)
        row = standing(done=done, known=rows, total=rows, trained=done, working=working, step=made, steps=steps)
        shown.append(pace.seconds_to_go(row, float(seconds)))
        seconds += 1
    said = [value for value in shown if value is not None]
    assert len(said) > len(shown) / 2
    assert all(later <= before + 1 for before, later in pairwise(said))


def test_nothing_is_said_of_the_time_while_the_manifest_is_read_or_nothing_is_left():
    pace = Pace()
    for at in (0.0, 100.0):
        assert pace.seconds_to_go(standing(trained=int(at), total=None), at) is None
    assert pace.seconds_to_go(standing(done=10, trained=10), 200.0) is None


class Stream(io.StringIO):
    """A stream that may be a terminal; `shown` is set at each write of a text."""

    def __init__(self, *, terminal, awaited=""):
        super().__init__()
        self._terminal = terminal
        self._awaited = awaited
        self.shown = threading.Event()

    def isatty(self):
        return self._terminal

    def write(self, text):
        if self._awaited in text:
            self.shown.set()
        return super().write(text)


def test_elsewhere_than_on_a_terminal_plain_lines_are_printed():
    stream = Stream(terminal=False)
    with Progress(lambda: standing(done=9, failed=1), stream):
        pass
    assert stream.getvalue() == "objdrive: 9 done, 1 failed, 0 left\n"


def test_lines_come_while_a_run_goes_on_and_only_if_they_say_something_new(monkeypatch):
    monkeypatch.setattr("jobs.progress._LINES_SECONDS", 0.01)
    stands = iter([standing(done=1)] * 3 + [standing(done=2)] * 3)
    last, seen = standing(done=3), threading.Event()

    def now():
        following = next(stands, last)
        if following is last:
            seen.set()
        return following

    stream = Stream(terminal=False)
    with Progress(now, stream):
        assert seen.wait(10)
    assert stream.getvalue().splitlines() == [f"objdrive: {n} done, 0 failed, {10 - n} left" for n in (1, 2, 3)]


def test_on_a_terminal_a_bar_is_redrawn_in_one_line():
    stream = Stream(terminal=True, awaited="5 done")
    with Progress(lambda: standing(done=5), stream):
        assert stream.shown.wait(10)
    shown = stream.getvalue()
    assert "\robjdrive: 5 done, 0 failed, 5 left" in shown
    assert "#" * 15 in shown
    assert "#" * 16 not in shown
    assert shown.strip("\n").count("\n") == 0


def test_the_last_standing_is_shown_when_a_run_fails():
    stream = Stream(terminal=False)

    def fail():
        with Progress(lambda: standing(done=2), stream):
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    assert stream.getvalue() == "objdrive: 2 done, 0 failed, 8 left\n"
