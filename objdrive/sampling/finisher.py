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


@dataclass(frozen=True)
class Decoded:
    """N decoded pictures on their way to the CPU.

    Attributes:
        finite: (N,), whether all values of a picture are.
        latents: (N, C, h, w).
        pixels: (N, H, W, 3) uint8.
        landed: when all of these are there; None: they are.
    """

    finite: Tensor
    latents: Tensor
    pixels: Tensor
    landed: torch.cuda.Event | None

    @classmethod
    def of(cls, latents: Tensor, pixels: Tensor) -> "Decoded":
        """Launch what is left to do of latents (N, C, h, w) that were decoded to pixels (N, 3, H, W) in [0, 1]."""
        finite = latents.isfinite().flatten(1).all(dim=1)
        # Launched now, copies stand before the next step; asked for later, they would wait for it.
        finite_there, latents_there, pixels_there = (
            tensor.to("cpu", non_blocking=True) for tensor in (finite, latents, as_bytes(pixels))
        )
        landed = None
        if latents.is_cuda:
            landed = torch.cuda.Event()
            landed.record(torch.cuda.current_stream(latents.device))
        return cls(finite_there, latents_there, pixels_there, landed)


class Finisher:
    """Makes pictures on a thread of its own, in the order in which they were given, so that no step waits for them.

    All that computes is done or launched by `Decoded.of`: the thread only waits for the device, copies and tells.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="objdrive-pictures")

    def give(self, decoded: Decoded, tell: Sequence[Callable[[Outcome], None]]) -> None:
        """Have N pictures made; each of `tell` is called with its outcome, on the finisher's thread."""
        self._thread.submit(_make, decoded, tell)

    def close(self) -> None:
        """Return when all that was given has been told."""
        self._thread.shutdown()


def _make(decoded: Decoded, tell: Sequence[Callable[[Outcome], None]]) -> None:
    try:
        if decoded.landed is not None:
            decoded.landed.synchronize()
        outcomes: list[Outcome] = [
            Finished(image, own.clone()) if fine else None
            for fine, own, image in zip(
                decoded.finite.tolist(), decoded.latents, as_images(decoded.pixels), strict=True
            )
        ]
    except Exception as error:
        _logger.exception("%d pictures could not be made of what was decoded", len(tell))
        outcomes = [error] * len(tell)
    for each, outcome in zip(tell, outcomes, strict=True):
        try:
            each(outcome)
        except Exception:
            # The others' drawings have to end as well.
            _logger.exception("what came of a picture could not be told")
