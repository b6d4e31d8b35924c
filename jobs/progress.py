"""How far a run has come: a live bar on a terminal, plain lines elsewhere."""

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

_TERMINAL_SECONDS = 0.5
_LINES_SECONDS = 10.0
_EVIDENCE_SECONDS = 10.0
_TOO_LATE = 1.2
_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Standing:
    """Rows at one moment.

    Attributes:
        done: in the store.
        failed: rejected or failed.
        known: read from the source.
        total: of the source; None as long as it is still being read.
        trained: of those done, how many this run has made.
        working: being made.
        step: of `steps`, how far those in work are; a mean.
        steps: of those in work; 0 as long as it is not known.
        waiting: for what the cluster is waited for; empty if it is not.
        things: what is made.
        source: what is read to know of rows.
    """

    done: int
    failed: int
    known: int
    total: int | None
    trained: int
    working: int = 0
    step: float = 0.0
    steps: int = 0
    waiting: str = ""
    things: str = "objects"
    source: str = "manifest"

    @property
    def left(self) -> int:
        """Rows that are neither done nor failed."""
        return self.known - self.done - self.failed

    @property
    def partly(self) -> float:
        """What is done of the rows in work, in rows."""
        return self.working * self.step / self.steps if self.steps else 0.0


class Pace:
    """How fast a run gets on, and from that the time to go.

    The time to go falls as time passes. It rises only for a cause: if the rows that are left take over a fifth longer
    than it says. Phases of a group differ in pace, so an earlier end is believed by and by, over as long a time as the
    run has been watched.
    """

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._ends: float | None = None
        self._seen = 0.0

    def seconds_to_go(self, standing: Standing, now: float) -> float | None:
        """The time to go at the time `now` (seconds); None as long as nothing can be said."""
        trained = standing.trained + standing.partly
        if trained <= 0 or standing.total is None or not standing.left:
            return None
        if self._first is None:
            self._first = now, trained
        since, before = self._first
        if now - since < _EVIDENCE_SECONDS or trained <= before:
            return None if self._ends is None else max(0.0, self._ends - now)
        estimate = (standing.left - standing.partly) * (now - since) / (trained - before)
        if self._ends is None or estimate > _TOO_LATE * (self._ends - now):
            self._ends = now + estimate
        elif now + estimate < self._ends:
            self._ends += (now + estimate - self._ends) * min(1.0, (now - self._seen) / (now - since))
        self._seen = now
        return max(0.0, self._ends - now)


def describe(standing: Standing, seconds: float, to_go: float | None = None) -> str:
    """One line: done, failed, in work, left, things per minute, time to go, what is waited for."""
    parts = [f"{standing.done} done", f"{standing.failed} failed"]
    if standing.working:
        how_far = f" (step {standing.step:.0f} of {standing.steps})" if standing.steps else ""
        parts.append(f"{standing.working} in work{how_far}")
    left = standing.left - standing.working
    parts.append(
        f"{left} left" if standing.total is not None else f"{left} left so far, still reading the {standing.source}"
    )
    if standing.trained:
        parts.append(f"{standing.trained / seconds * 60:.1f} {standing.things} a minute")
    if to_go is not None:
        parts.append(f"{_duration(to_go)} to go")
    if standing.waiting:
        parts.append(standing.waiting)
    return ", ".join(parts)


class Progress:
    """Reports a standing now and then from a thread of its own, until closed."""

    def __init__(self, standing: Callable[[], Standing], stream: TextIO = sys.stderr) -> None:
        self._standing = standing
        self._stream = stream
        self._bar = tqdm(file=stream, unit="row", bar_format="{desc}|{bar:30}|") if stream.isatty() else None
        self._started = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._last = ""
        self._pace = Pace()

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def _run(self) -> None:
        while not self._closed.wait(_TERMINAL_SECONDS if self._bar is not None else _LINES_SECONDS):
            self._show()
        self._show()

    def _show(self) -> None:
        standing = self._standing()
        seconds = time.monotonic() - self._started
        text = describe(standing, seconds, self._pace.seconds_to_go(standing, seconds))
        if self._bar is not None:
            self._bar.total = max(1, standing.known)
            self._bar.n = standing.done + standing.failed + standing.partly
            self._bar.set_description_str(f"objdrive: {text} ")
        elif text != self._last:
            print(f"objdrive: {text}", file=self._stream, flush=True)
            self._last = text


class WaitLines:
    """Prints what is waited for, at once and then once a minute."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._last = -math.inf

    def __call__(self, what: str) -> None:
        """Say what is waited for; nothing any more, if it is empty."""
        if what and time.monotonic() - self._last >= _WAIT_SECONDS:
            print(f"objdrive: {what}", file=self._stream, flush=True)
            self._last = time.monotonic()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
