"""Where a run of pretraining keeps what it makes."""

from dataclasses import dataclass
from pathlib import Path


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
