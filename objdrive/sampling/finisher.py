"""From decoded pixels to pictures, beside the thread that draws."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from objdrive.pictures import as_bytes, as_images

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A picture, and the latents (C, h, w) on the CPU that it was decoded from."""

    image: Image.Image
    latents: Tensor


Outcome = Finished | Exception | None
"""What came of a picture; None: its values are not finite."""


class Finisher:
    """Makes pictures on a thread of its own, in the order in which they were given, so that no step waits for them.

    All that computes is done or launched by the caller: the thread only waits for the device, copies and tells.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="objdrive-pictures")

    def give(self, latents: Tensor, pixels: Tensor, tell: Sequence[Callable[[Outcome], None]]) -> None:
        """Have N pictures made.

        Args:
            latents: (N, C, h, w).
            pixels: (N, 3, H, W) in [0, 1], which they were decoded to.
            tell: for each, what is called with its outcome, on the finisher's thread.
        """
        finite = latents.isfinite().flatten(1).all(dim=1)
        # To a GPU this is a launch as others are: the next step stands behind the copies, not the copies behind it.
        copies = [tensor.to("cpu", non_blocking=True) for tensor in (finite, latents, as_bytes(pixels))]
        landed = None
        if latents.is_cuda:
            landed = torch.cuda.Event()
            landed.record(torch.cuda.current_stream(latents.device))
        self._thread.submit(_make, landed, *copies, tell)

    def close(self) -> None:
        """Return when all that was given has been told."""
        self._thread.shutdown()


def _make(
    landed: torch.cuda.Event | None,
    finite: Tensor,
    latents: Tensor,
    pixels: Tensor,
    tell: Sequence[Callable[[Outcome], None]],
) -> None:
    try:
        if landed is not None:
            landed.synchronize()
        outcomes: list[Outcome] = [
            Finished(image, own.clone()) if fine else None
            for fine, own, image in zip(finite.tolist(), latents, as_images(pixels), strict=True)
        ]
    except Exception as error:
        _logger.exception("%d pictures could not be made of what was decoded", len(tell))
        outcomes = [error] * len(tell)
    for each, outcome in zip(tell, outcomes, strict=True):
        each(outcome)
