"""Pictures as pixels, as Pillow's images and as files."""

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def as_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, 3, H, W) in [0, 1] of pictures (N, H, W, 3) uint8."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pictures of pixels (N, 3, R, R) in [0, 1]."""
    arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def encode_picture(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file of that kind (``PNG``, ``WEBP``), with options of Pillow's writer."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
