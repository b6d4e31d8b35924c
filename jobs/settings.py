"""What a worker needs to make its work, in a module without heavy imports."""

from dataclasses import dataclass

from jobs.fanout import Work
from jobs.ingest import Target
from objdrive.training.recipe import Recipe


@dataclass(frozen=True)
class FineTuneSettings:
    """All that a worker needs to make its `FineTune`; picklable."""

    base: str
    clip: str | None
    recipe: Recipe
    target: Target
    group_size: int | None
    threads: int | None

    def __call__(self) -> Work:
        """Load the base."""
        # Ray's own actors read these settings too: only workers need torch.
        import torch

        from jobs.finetune import FineTune

        if self.threads:
            torch.set_num_threads(self.threads)
        return FineTune(self)
