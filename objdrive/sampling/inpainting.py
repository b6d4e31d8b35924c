"""Drawing into a picture: where it is kept, latents follow the picture's own at every step.

Blended latent diffusion (arXiv 2206.02779), without a network of its own: after each step the kept places are replaced
by the picture with as much noise as there is left, so that what is drawn grows to fit it.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from objdrive.base.noise import NoiseProcess
from objdrive.base.stable_diffusion import Base
from objdrive.base.transfers import on_device
from objdrive.pictures import as_pixels


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture to draw into, of the size that is drawn.

    Attributes:
        image: (H, W, 3) uint8.
        draw: (H, W) float32 in [0, 1], 1 where it is drawn; it is kept where this is 0.
    """

    image: NDArray[np.uint8]
    draw: NDArray[np.float32]


@dataclass(frozen=True)
class Known:
    """What is known of a picture's latents.

    Attributes:
        latents: (1, C, h, w), the picture's.
        noise: (1, C, h, w), that the drawing starts from.
        free: (1, 1, h, w), 1 where it is drawn, 0 where all that a place shows is kept.
    """

    latents: Tensor
    noise: Tensor
    free: Tensor

    @classmethod
    def of(cls, base: Base, canvas: Canvas, noise: Tensor) -> "Known":
        """What a canvas tells a drawing that starts from `noise` (1, C, h, w)."""
        # Copied, as arrays that came from another process can't be written to, which torch warns of.
        latents = base.encode_latents(as_pixels(canvas.image[None].copy()).to(base.device))
        draw = torch.tensor(canvas.draw, device=base.device)[None, None]
        # A place of which a part is drawn is drawn: what is kept of it is laid over at the end.
        free = (F.adaptive_max_pool2d(draw, latents.shape[-2:]) >= 0.5 / 255).to(latents)
        return cls(latents, noise, free)

    def within(self, maps: Tensor) -> Tensor:
        """Maps (L, e, f), each with its median over what is drawn wherever all is kept: there it tells of nothing."""
        free = F.adaptive_max_pool2d(self.free, maps.shape[-2:])[0, 0] > 0
        if free.sum() < 2:
            # A single place has no other to stand out from.
            return maps
        return torch.where(free, maps, maps[:, free].median(dim=1).values[:, None, None])

    def hold(self, latents: Tensor, process: NoiseProcess, timestep: int | None) -> Tensor:
        """`latents` (1, C, h, w) at a timestep (None: without noise), with the kept places as the picture has them."""
        kept = self.latents
        if timestep is not None:
            kept = process.add_noise(self.latents, self.noise, on_device([timestep], latents.device))
        return torch.lerp(kept, latents, self.free)
