"""Pictures of classes, for the class-characterizing regularization."""

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from objdrive.base.prompts import class_prompt
from objdrive.base.stable_diffusion import Base
from objdrive.sampling.sampler import SampleSpec, draw_latents, fitting_batch_size
from objdrive.seeds import seed_of
from objdrive.training.recipe import Recipe

_CLASSES_KEPT = 256


class ClassPictures:
    """Pictures of classes drawn by the base alone, the z' of the class-characterizing regularization.

    They depend on class word, base and recipe only; the most recently used classes are kept.
    """

    def __init__(self, base: Base, recipe: Recipe) -> None:
        self._base = base
        self._recipe = recipe
        self._latents: OrderedDict[str, Tensor] = OrderedDict()

    def __getitem__(self, class_name: str) -> Tensor:
        """(class_pool, C, h, h) latents of a class that `draw` has been asked for."""
        return self._latents[class_name]

    def steps_to_draw(self, class_names: set[str]) -> int:
        """How often `draw` of these would call `on_step`."""
        # A name at a time: another thread may be drawing.
        pictures = sum(name not in self._latents for name in class_names) * self._recipe.class_pool
        return math.ceil(pictures / fitting_batch_size(self._base)) * self._recipe.sample_steps

    def draw(self, class_names: set[str], *, on_step: Callable[[], None] = lambda: None) -> None:
        """Have pictures of all these classes, drawing the missing ones together."""
        missing = sorted(class_names - self._latents.keys())
        recipe = self._recipe
        specs = [
            SampleSpec(
                class_prompt(name),
                seed=seed_of(f"{recipe.seed}:{name}:{index}"),
                steps=recipe.sample_steps,
                guidance_scale=recipe.guidance_scale,
            )
            for name in missing
            for index in range(recipe.class_pool)
        ]
        batch = fitting_batch_size(self._base)
        drawn = [
            draw_latents(self._base, specs[first : first + batch], on_step=on_step)
            for first in range(0, len(specs), batch)
        ]
        if drawn:
            self._latents.update(zip(missing, torch.cat(drawn).split(recipe.class_pool), strict=True))
        for name in class_names:
            self._latents.move_to_end(name)
        while len(self._latents) > max(_CLASSES_KEPT, len(class_names)):
            self._latents.popitem(last=False)
