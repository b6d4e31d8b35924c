"""Pictures as they might also have been: drawings of other proportions, scenes less sharp and in other light."""

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from jobs.pretrain.contexts import Rng

_STRETCH = 0.75
_SHEAR = 0.15
_BLUR = 1.5
"""Deviation in pixels at 64 x 64."""
_NOISE = 8.0
_COARSE = 36 / 64


def stretched(sprite: Image.Image, rng: Rng) -> Image.Image:
    """A drawing made narrower or lower by up to a quarter, and sheared a little, about its middle."""
    ways = [1 / rng.uniform(_STRETCH, 1), 1.0]
    across, down = ways if rng.random() < 0.5 else ways[::-1]
    lean, slope = rng.uniform(-_SHEAR, _SHEAR, 2)
    middle = sprite.width / 2
    # From places in the new picture to places in the old one.
    matrix = (across, lean, middle * (1 - across - lean), slope, down, middle * (1 - slope - down))
    return sprite.transform(sprite.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def varied(pixels: np.ndarray, rng: Rng) -> np.ndarray:
    """(n, n, 3) uint8: a picture blurred, smoothed, of other colour and contrast, and with noise, each at times."""
    picture = Image.fromarray(pixels)
    if rng.random() < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, _BLUR) * picture.width / 64))
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.MedianFilter(3))
    if rng.random() < 0.4:
        picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.6, 1.5))
    if rng.random() < 0.4:
        picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.7, 1.3))
    changed = np.asarray(picture)
    if rng.random() < 0.4:
        noise = rng.normal(0, rng.uniform(0, _NOISE), changed.shape)
        changed = (changed + noise).clip(0, 255).round().astype(np.uint8)
    return changed


def coarse(pictures: Tensor) -> Tensor:
    """(N, 3, n, n): pictures brought down to 36 of 64 pixels and back."""
    edge = pictures.shape[-1]
    small = F.interpolate(pictures, size=round(edge * _COARSE), mode="area")
    return F.interpolate(small, size=edge, mode="bicubic").clamp(0, 1)
