"""The way from noise to picture: diffusers' own schedulers, with the step state of one request each."""

from typing import Literal

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from objdrive.errors import ObjdriveError

SchedulerName = Literal["ddim", "dpmsolver++"]


def most_steps(scheduler: DDIMScheduler) -> int:
    """The most steps that both solvers can take: with more, timesteps coincide or pass the last one trained on."""
    return int(scheduler.config["num_train_timesteps"]) - 2


class Stepper:
    """One request's way through the noise levels.

    ``ddim`` is DDIM with eta = 0 (arXiv 2010.02502), ``dpmsolver++`` is DPM-Solver++(2M) (arXiv 2211.01095). Every
    request has a scheduler object of its own, because diffusers keeps the state of a run in it.

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
        self._scheduler: DDIMScheduler | DPMSolverMultistepScheduler
        if name == "ddim":
            self._scheduler = DDIMScheduler.from_config(scheduler.config)
        else:
            self._scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
        self._scheduler.set_timesteps(steps)
        self._timesteps: list[int] = self._scheduler.timesteps.tolist()
        self._predicted: Tensor | None = None
        self.taken = 0

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self._timesteps)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.taken == self.steps

    @property
    def timestep(self) -> int:
        """The next step's timestep."""
        return self._timesteps[self.taken]

    @property
    def following(self) -> int | None:
        """The timestep of the step after the next; None if the next one is the last."""
        return self._timesteps[self.taken + 1] if self.taken + 1 < self.steps else None

    @property
    def predicted(self) -> Tensor:
        """(1, C, h, w): the picture that the last step predicted, x_0."""
        if self._predicted is None:
            raise ValueError("no step has been taken yet")
        return self._predicted

    def step(self, output: Tensor, latents: Tensor) -> Tensor:
        """(1, C, h, w) latents at the next noise level, from the network's output at this one."""
        stepped = self._scheduler.step(output, self.timestep, latents)
        if isinstance(self._scheduler, DDIMScheduler):
            self._predicted = stepped.pred_original_sample
        else:
            self._predicted = self._scheduler.model_outputs[-1]
        self.taken += 1
        following: Tensor = stepped.prev_sample
        return following
