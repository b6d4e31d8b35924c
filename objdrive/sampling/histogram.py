"""Counting observations by size, as Prometheus wants them."""

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Bounds that suit times from a copy to a long wait."""


@dataclass(frozen=True)
class HistogramSnapshot:
    """What a histogram has seen: how many values, their sum, and how many were at most each of `bounds`."""

    count: int
    total: float
    bounds: tuple[float, ...]
    at_most: tuple[int, ...]


class Histogram:
    """Counts values by the least of `bounds` (ascending) that they do not exceed. Thread-safe."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count a value."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._total += value

    def snapshot(self) -> HistogramSnapshot:
        """Return what was seen so far."""
        with self._lock:
            *at_most, count = accumulate(self._counts)
            return HistogramSnapshot(count, self._total, self._bounds, tuple(at_most))
