"""How much of a device's memory a process may take: all of it, or its share of a GPU that others use too."""

import os

import psutil
import torch

_UNCOUNTED = 0.05
"""Of a share: the CUDA context, which PyTorch does not count."""


def limit_memory(gpus: float) -> None:
    """Keep this process within its share of a GPU; whole GPUs, and processors, are left as they are.

    What is beyond raises `torch.OutOfMemoryError` here, not in a neighbour.

    Args:
        gpus: of this process, a part of one or whole ones.
    """
    if 0 < gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction((1 - _UNCOUNTED) * gpus)


def free_bytes(device: torch.device) -> int:
    """What this process may still take of a device's memory."""
    if device.type != "cuda":
        # There is a worker on every core, and they share the memory.
        return int(psutil.virtual_memory().available) // (os.cpu_count() or 1)
    free, total = torch.cuda.mem_get_info(device)
    part = torch.cuda.get_per_process_memory_fraction(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    # What the allocator has reserved and not given out is as good as free.
    return left_of_share(free + reserved - allocated, total, allocated, part)


def share_bytes(device: torch.device) -> int:
    """What this process may take in all of a GPU's memory."""
    return int(
        torch.cuda.get_device_properties(device).total_memory * torch.cuda.get_per_process_memory_fraction(device)
    )


def left_of_share(free: int, total: int, held: int, part: float) -> int:
    """Bytes that a process may still take: what is left of its part, if that much is free.

    Args:
        free: of the device, for this process.
        total: of the device.
        held: by this process.
        part: of the total that is this process's, in [0, 1].
    """
    return max(0, min(free, int(part * total) - held))
