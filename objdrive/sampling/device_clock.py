"""How long work takes on a device."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from objdrive.sampling.histogram import Histogram


class DeviceClock:
    """Measures work without waiting for it.

    On CUDA work is launched long before it is done. So the device notes when it begins and ends (events), and
    `collect` reads what is over by then. Elsewhere work is over when it returns.

    Args:
        device: where it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = Histogram()
        self._device = device
        self._lock = threading.Lock()
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure what is done, or launched, inside of the block, unless it fails."""
        if self._device.type != "cuda":
            started = time.monotonic()
            yield
            self.seconds.observe(time.monotonic() - started)
            return
        self.collect()
        stream = torch.cuda.current_stream(self._device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        yield
        end.record(stream)
        with self._lock:
            self._under_way.append((begin, end))

    def collect(self) -> None:
        """Count what has ended since. Safe for use from threads."""
        with self._lock:
            try:
                while self._under_way and self._under_way[0][1].query():
                    begin, end = self._under_way.popleft()
                    self.seconds.observe(begin.elapsed_time(end) / 1000)
            except torch.AcceleratorError:
                # The work has failed, as who drew it is told; what was measured before is told on.
                self._under_way.clear()
