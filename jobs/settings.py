"""What a worker's fine-tunes depend on, in a module without heavy imports."""

from dataclasses import dataclass

from jobs.ingest import Target
from objdrive.training.recipe import Recipe

PREVIEW_PROMPTS = (
    "a photo of {} on grass",
    "a photo of {} in the snow",
    "a photo of {} on a wooden table",
    "a photo of {} under water",
)
"""Of an object, as previews show it."""


@dataclass(frozen=True)
class FineTuneSettings:
    """All that a worker needs to make its `jobs.finetune.FineTune`; picklable.

    `cpu_threads`: PyTorch's threads where there is no GPU; None: PyTorch chooses.
    """

    base: str
    clip: str | None
    recipe: Recipe
    target: Target
    group_size: int | None
    cpu_threads: int | None
    vae: str | None = None
