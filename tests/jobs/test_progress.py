"""How far a run has come, in words and on streams."""

import io
import threading

import pytest

from jobs.progress import Progress, Standing, describe


def standing(*, done=0, failed=0, known=10, total=10, trained=0):
    return Standing(done, failed, known, total, trained)


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
        (
            standing(done=4, failed=1, trained=4),
            60.0,
            "4 done, 1 failed, 5 left, 4.0 objects a minute, 1 min 15 s to go",
        ),
        # What was committed before took no time.
        (
            standing(done=5, known=10, trained=1),
            10.0,
            "5 done, 0 failed, 5 left, 6.0 objects a minute, 50 s to go",
        ),
        (
            standing(done=100, known=1_000_100, total=1_000_100, trained=100),
            60.0,
            "100 done, 0 failed, 1000000 left, 100.0 objects a minute, 166 h 40 min to go",
        ),
        (standing(done=9, failed=1, trained=3), 90.0, "9 done, 1 failed, 0 left, 2.0 objects a minute"),
        (standing(known=0, total=0), 1.0, "0 done, 0 failed, 0 left"),
    ],
)
def test_a_standing_in_words(now, seconds, text):
    assert describe(now, seconds) == text


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
