"""How a base adds noise and what it predicts of it: pure functions of the noise level, and a base's own process."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from objdrive.base.steppers import SchedulerName, Stepper, most_steps

TimestepChoice = Literal["uniform", "log-normal"]
"""Which timesteps are trained on: all alike, or by noise levels, which `timestep_odds` explains."""

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
    level = noise_level(alphas).log()
    density = torch.exp(-(((level - _LEVEL_MEAN) / _LEVEL_DEVIATION) ** 2) / 2) * torch.gradient(level)[0]
    return density / density.sum()


def noise_level(alphas: Tensor) -> Tensor:
    """``sqrt((1 - a_t) / a_t)``: how much noise there is for each part of the picture (sigma of arXiv 2206.00364).

    Args:
        alphas: (...), the cumulative products of alpha.
    """
    return ((1 - alphas) / alphas.clamp(min=1e-8)).sqrt()


def velocity_weight(alphas: Tensor, *, velocity: bool) -> Tensor:
    """The weight that turns a loss into the velocity's (arXiv 2202.00512): ``1 / a_t`` for noise, 1 for the velocity.

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


@dataclass(frozen=True)
class NoiseProcess:
    """How a base's pictures become noise and back: its noise schedule, and what its network predicts of it.

    Owned by the base. Training asks for targets, odds and weights, sampling for a stepper; neither knows what the
    network predicts.

    Attributes:
        scheduler: diffusers' own, with the schedule and the kind of prediction.
        alphas: (T,), the cumulative products of alpha at all timesteps.
    """

    scheduler: DDIMScheduler
    alphas: Tensor

    @classmethod
    def of(cls, scheduler: DDIMScheduler, device: torch.device | str) -> "NoiseProcess":
        """The process that a snapshot's scheduler describes."""
        return cls(scheduler, scheduler.alphas_cumprod.to(device))

    @property
    def predicts_velocity(self) -> bool:
        """Whether the network predicts the velocity; else it predicts the noise."""
        return str(self.scheduler.config["prediction_type"]) == "v_prediction"

    @property
    def most_steps(self) -> int:
        """The most steps that a stepper can take."""
        return most_steps(self.scheduler)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(..., C, H, W): `latents` with `noise` (..., C, H, W) at `timesteps` (...), see `add_noise`."""
        return add_noise(latents, noise, self.alphas[timesteps])

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(..., C, H, W): what the network should predict of what `add_noise` makes: the noise or the velocity."""
        return velocity(latents, noise, self.alphas[timesteps]) if self.predicts_velocity else noise

    def level(self, timestep: int) -> float:
        """The noise level of a timestep, see `noise_level`."""
        # The scheduler's are on the CPU: no step of a drawing waits for a GPU to tell.
        return float(noise_level(self.scheduler.alphas_cumprod[timestep]))

    def timestep_odds(self, choice: TimestepChoice, *, most_noise: float = math.inf) -> Tensor:
        """(T,) on the CPU, in parts of any sum: how often each timestep is trained on; never above `most_noise`."""
        alphas = self.alphas.cpu()
        odds = timestep_odds(alphas) if choice == "log-normal" else torch.ones_like(alphas)
        return odds * (noise_level(alphas) <= most_noise)

    def loss_weights(self, timesteps: Tensor, choice: TimestepChoice) -> Tensor:
        """(...): what losses at `timesteps` (...) count for; log-normal ones are the velocity's (`velocity_weight`)."""
        alphas = self.alphas[timesteps]
        if choice == "uniform":
            return torch.ones_like(alphas)
        return velocity_weight(alphas, velocity=self.predicts_velocity)

    def stepper(self, name: SchedulerName, steps: int) -> Stepper:
        """A way from noise to picture in `steps` steps. Raises as `Stepper` does."""
        return Stepper(self.scheduler, name, steps)
