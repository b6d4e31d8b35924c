from typing import ClassVar

import torch

from objdrive.sampling.device_clock import DeviceClock


class Event:
    """Stands for CUDA's: it happens when the test says."""

    made: ClassVar[list["Event"]] = []

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None
        self.made.append(self)

    def record(self, stream):
        assert stream == "stream of cuda:0"

    def query(self):
        return self.at is not None

    def elapsed_time(self, other):
        return other.at - self.at


def test_on_a_gpu_work_counts_once_it_is_over(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    Event.made.clear()
    clock = DeviceClock(torch.device("cuda:0"))
    for _ in range(2):
        with clock.measure():
            pass
    clock.collect()
    assert clock.seconds.snapshot().count == 0
    for event, at in zip(Event.made, (0.0, 250.0, 250.0), strict=False):
        event.at = at
    clock.collect()
    assert (clock.seconds.snapshot().count, clock.seconds.snapshot().total) == (1, 0.25)
    Event.made[3].at = 1000.0
    with clock.measure():
        pass
    assert (clock.seconds.snapshot().count, clock.seconds.snapshot().total) == (2, 1.0)


def test_elsewhere_work_counts_when_it_returns():
    clock = DeviceClock(torch.device("cpu"))
    with clock.measure():
        pass
    assert clock.seconds.snapshot().count == 1
