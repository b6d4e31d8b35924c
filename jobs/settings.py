"""What a worker's fine-tunes depend on, in a module without heavy imports."""

from dataclasses import dataclass

from jobs.ingest import Target
from objdrive.training.recipe import Recipe


@dataclass(frozen=True)
class FineTuneSettings:
    """All that a worker needs to make its `jobs.finetune.FineTune`; picklable."""

    base: str
    clip: str | None
    recipe: Recipe
    target: Target
    group_size: int | None
    threads: int | None
