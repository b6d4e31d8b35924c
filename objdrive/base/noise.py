"""How a base adds noise and what it predicts, as pure functions of the noise level."""

import torch
from torch import Tensor

# The middle and the width of the noise levels' logarithms.
_LEVEL_MEAN, _LEVEL_DEVIATION = 0.5, 1.0


def timestep_odds(alphas: Tensor) -> Tensor:
    """How often each timestep is trained on, so that noise levels are log-normal (arXiv 2206.00364, table 1).

    Levels are in parts of the latents' deviation; their logarithms have a mean of 0.5 and a deviation of 1. It is
    strong noise that decides what a picture shows, and all timesteps alike hardly learn there.

    Args:
        alphas: (T,), the cumulative products of alpha at all timesteps.

    Returns:
        (T,), with a sum of 1.
    """
    level = ((1 - alphas) / alphas.clamp(min=1e-8)).log() / 2
    density = torch.exp(-(((level - _LEVEL_MEAN) / _LEVEL_DEVIATION) ** 2) / 2) * torch.gradient(level)[0]
    return density / density.sum()


def velocity_weight(alphas: Tensor, *, velocity: bool) -> Tensor:
    """What makes a loss one of the velocity (arXiv 2202.00512): ``1 / a_t`` for predicted noise, 1 for the velocity.

    An error of the noise is ``sqrt(a_t)`` times the velocity's: a plain loss of it counts strong noise as nothing.

    Args:
        alphas: (...), the cumulative products of alpha at each sample's timestep.
        velocity: whether the network predicts the velocity.

    Returns:
        (...).
    """
    return torch.ones_like(alphas) if velocity else 1 / alphas


def add_noise(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """``z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps`` (arXiv 2006.11239, equation 4).

    Args:
        latents: (..., C, H, W), `noise` the same.
        alphas: (...), the cumulative products of alpha at each sample's timestep.
    """
    a = alphas[..., None, None, None]
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def velocity(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """``v = sqrt(a_t) eps - sqrt(1 - a_t) z_0`` (arXiv 2202.00512), the target of v-prediction bases."""
    a = alphas[..., None, None, None]
    return a.sqrt() * noise - (1 - a).sqrt() * latents
