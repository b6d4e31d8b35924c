"""The way from noise to picture: diffusers' own schedulers, and where on it each picture is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from objdrive.base.transfers import on_device
from objdrive.errors import ObjdriveError

SchedulerName = Literal["ddim", "dpmsolver++"]
_WAYS = 64
# Whatever kind of DPM-Solver a base's config is of: some add noise, and others look back more than one step.
_SOLVERS: dict[SchedulerName, dict[str, Any]] = {
    "ddim": {},
    "dpmsolver++": {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
}


def most_steps(scheduler: DDIMScheduler) -> int:
    """The most steps that both solvers can take: with more, timesteps coincide or pass the last one trained on."""
    return int(scheduler.config["num_train_timesteps"]) - 2


def _told(scheduler: DDIMScheduler) -> str:
    """A scheduler's config as JSON, with what it was not told: there another class has defaults of its own."""
    untold = scheduler.config.get("_use_default_values", [])
    return json.dumps({**json.loads(scheduler.to_json_string()), "_use_default_values": untold})


@dataclass(frozen=True)
class _Way:
    """A solver's steps from noise to picture.

    Attributes:
        timesteps: of each step.
        coefficients: of each step, how much the prediction x_0 and then the latents after it have of the network's
            output, of the latents before it and of the step before's x_0.
    """

    timesteps: tuple[int, ...]
    coefficients: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]


@lru_cache(_WAYS)
def _way(config: str, name: SchedulerName, steps: int) -> _Way:
    """What diffusers' scheduler of this config (JSON) does at each of its steps.

    Both solvers are linear in the network's output, the latents and the x_0 before. So the scheduler itself, asked with
    each of these as 1 and the others as 0, tells all that it does, and one product does it for many pictures at once.
    """
    kind: Any = DDIMScheduler if name == "ddim" else DPMSolverMultistepScheduler
    # Cutting large values off, as pixel bases do, is not linear, and latents are not pixels.
    scheduler = kind.from_config(json.loads(config), clip_sample=False, thresholding=False, **_SOLVERS[name])
    scheduler.set_timesteps(steps)
    timesteps = tuple(scheduler.timesteps.tolist())
    output, latents, earlier = torch.eye(3)
    coefficients: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    for timestep in timesteps:
        if name == "ddim":
            stepped = scheduler.step(output, timestep, latents)
            predicted = stepped.pred_original_sample
        else:
            if coefficients:
                scheduler.model_outputs[-1] = earlier
            stepped = scheduler.step(output, timestep, latents)
            predicted = scheduler.model_outputs[-1]
        coefficients.append((tuple(predicted.tolist()), tuple(stepped.prev_sample.tolist())))
    return _Way(timesteps, tuple(coefficients))


class Stepper:
    """One request's way through the noise levels.

    ``ddim`` is DDIM with eta = 0 (arXiv 2010.02502), ``dpmsolver++`` is DPM-Solver++(2M) (arXiv 2211.01095).

    Args:
        scheduler: the base's; its noise schedule and kind of prediction are kept.
        name: which solver.
        steps: how many.

    Raises:
        ObjdriveError: `steps` is not between 1 and `most_steps`.
    """

    def __init__(self, scheduler: DDIMScheduler, name: SchedulerName, steps: int) -> None:
        most = most_steps(scheduler)
        if not 1 <= steps <= most:
            raise ObjdriveError(f"steps={steps} must be at least 1 and at most {most}")
        self._way = _way(_told(scheduler), name, steps)
        self._predicted: Tensor | None = None
        self.taken = 0

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self._way.timesteps)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.taken == self.steps

    @property
    def timestep(self) -> int:
        """The next step's timestep."""
        return self._way.timesteps[self.taken]

    @property
    def following(self) -> int | None:
        """The timestep of the step after the next; None if the next one is the last."""
        return self._way.timesteps[self.taken + 1] if self.taken + 1 < self.steps else None

    @property
    def predicted(self) -> Tensor:
        """(1, C, h, w): the picture that the last step predicted, x_0."""
        if self._predicted is None:
            raise ValueError("no step has been taken yet")
        return self._predicted

    @staticmethod
    def step(steppers: "Sequence[Stepper]", outputs: Tensor, latents: Tensor) -> Tensor:
        """Take N pictures one step further, each on its own way.

        Args:
            steppers: N of them.
            outputs: (N, C, h, w), the network's at the pictures' noise levels.
            latents: (N, C, h, w), the pictures.

        Returns:
            (N, C, h, w) latents at the next noise levels.
        """
        # A first step takes nothing of an earlier one: any tensor will do.
        earlier = [
            latents[place : place + 1] if one._predicted is None else one._predicted
            for place, one in enumerate(steppers)
        ]
        parts = torch.stack([outputs, latents, torch.cat(earlier)])
        told = on_device([one._way.coefficients[one.taken] for one in steppers], latents.device)
        # One multiplication and one sum: what a picture becomes does not depend on how many there are.
        both = (told.permute(1, 2, 0)[..., None, None, None] * parts).sum(dim=1)
        predicted, following = both[0], both[1]
        for one, own in zip(steppers, predicted.split(1), strict=True):
            one._predicted = own
            one.taken += 1
        return following
