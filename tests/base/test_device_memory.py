"""A process's share of a device's memory, by made-up sizes."""

from types import SimpleNamespace

import pytest
import torch

from objdrive.base import memory
from objdrive.base.memory import left_of_share, limit_memory
from objdrive.sampling.sampler import pixels_at_once

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "held", "part", "left"),
    [
        (70, 4, 1.0, 70),  # alone on a card: all that is free
        (70, 4, 0.25, 16),  # one of four: its quarter, but for what it holds
        (10, 4, 0.25, 10),  # neighbours took more than theirs
        (70, 30, 0.25, 0),
    ],
)
def test_what_is_left_of_a_share_of_eighty(free, held, part, left):
    assert left_of_share(free * GIB, 80 * GIB, held * GIB, part) == left * GIB


@pytest.mark.parametrize(("gpus", "fractions"), [(0.0, []), (1.0, []), (2.0, []), (0.25, [pytest.approx(0.2375)])])
def test_only_a_worker_that_shares_a_gpu_is_limited(monkeypatch, gpus, fractions):
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    limit_memory(gpus)
    assert told == fractions


@pytest.mark.parametrize(
    ("share", "at_once"), [(0.25 * 8, 0), (8, 1), (0.25 * 80, 4), (24, 5), (40, 9), (80, 16), (141, 16)]
)
def test_a_batch_of_pictures_follows_the_share(share, at_once):
    assert pixels_at_once(int(0.95 * share * GIB)) // 512**2 == at_once


def test_what_is_free_counts_what_the_allocator_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 24 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    device = torch.device("cuda")
    assert memory.free_bytes(device) == 30 * GIB
    assert memory.share_bytes(device) == 40 * GIB
