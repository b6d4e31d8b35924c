"""Small values on their way to a device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[object], device: torch.device) -> Tensor:
    """A tensor of (nested) numbers on a device, without waiting for what that has still to do.

    PyTorch waits for a GPU before and after a copy from pageable memory: the next operations would be launched only
    once the last ones are done.
    """
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
