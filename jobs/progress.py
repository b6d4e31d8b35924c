"""How far a run has come: a live bar on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

_TERMINAL_SECONDS = 0.5
_LINES_SECONDS = 10.0


@dataclass(frozen=True)
class Standing:
    """Rows at one moment; `total` is None as long as the manifest is still being read."""

    done: int
    failed: int
    known: int
    total: int | None
    trained: int


def describe(standing: Standing, seconds: float) -> str:
    """One line: done, failed, left, objects per minute, time to go."""
    left = standing.known - standing.done - standing.failed
    parts = [f"{standing.done} done", f"{standing.failed} failed"]
    parts.append(f"{left} left" if standing.total is not None else f"{left} left so far, still reading the manifest")
    if standing.trained:
        rate = standing.trained / seconds * 60
        parts.append(f"{rate:.1f} objects a minute")
        if standing.total is not None and left:
            parts.append(f"{_duration(left / rate * 60)} to go")
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
        text = describe(standing, time.monotonic() - self._started)
        if self._bar is not None:
            self._bar.total = max(1, standing.known)
            self._bar.n = standing.done + standing.failed
            self._bar.set_description_str(f"objdrive: {text} ")
        elif text != self._last:
            print(f"objdrive: {text}", file=self._stream, flush=True)
            self._last = text


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
