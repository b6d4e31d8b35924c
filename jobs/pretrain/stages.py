"""Which class trains which part, and what a worker needs to make it; in a module without heavy imports."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.pretrain.config import Config
from jobs.pretrain.folders import Folders

if TYPE_CHECKING:
    import torch

    from jobs.pretrain.loop import Stage


@dataclass(frozen=True)
class StageSettings:
    """One stage of one run; picklable."""

    name: str
    config: Config
    folders: Folders

    def __call__(self, device: "torch.device", rank: int, world: int) -> "Stage":
        """Load the worker's share of the data, and the part to train."""
        # Ray's own actors read these settings too: only workers need the networks.
        if self.name == "vae":
            from jobs.pretrain.vae import VaeStage

            return VaeStage(self.config, self.folders, device, rank, world)
        if self.name == "clip":
            from jobs.pretrain.clip import ClipStage

            return ClipStage(self.config, self.folders, device, rank, world)
        from jobs.pretrain.unet import UnetStage

        return UnetStage(self.config, self.folders, device, rank, world)
