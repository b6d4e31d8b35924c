"""What a worker needs to make its stage, in a module without heavy imports."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.pretrain.config import Config

if TYPE_CHECKING:
    import torch

    from jobs.pretrain.loop import Stage


@dataclass(frozen=True)
class Folders:
    """Where a run keeps what it makes."""

    out: Path

    @property
    def packages(self) -> Path:
        """Archives of the icon packs."""
        return self.out / "packages"

    @property
    def sprites(self) -> Path:
        """All icons."""
        return self.out / "sprites.parquet"

    @property
    def scenes(self) -> Path:
        """Scenes to train on."""
        return self.out / "scenes"

    @property
    def judged(self) -> Path:
        """Scenes of held-out drawings."""
        return self.out / "judged"

    @property
    def latents(self) -> Path:
        """Scenes as the autoencoder and the tokenizer see them."""
        return self.out / "latents"

    @property
    def snapshot(self) -> Path:
        """The base, in diffusers' layout."""
        return self.out / "snapshot"

    def stage(self, name: str) -> Path:
        """A stage's checkpoints, curve and sample grids."""
        return self.out / name


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
            from jobs.pretrain.vae import VaeStage as Made
        elif self.name == "clip":
            from jobs.pretrain.clip import ClipStage as Made
        else:
            from jobs.pretrain.unet import UnetStage as Made
        return Made(self.config, self.folders, device, rank, world)
