"""The sizes of a base and of the training of its parts, read from YAML."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from objdrive.errors import ObjdriveError

CONFIGS = Path(__file__).parent / "configs"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Training(_Strict):
    """How one part is trained.

    Attributes:
        batch: scenes in a step, over all workers.
        optimizer: AdamW for all weights, or Muon for those inside the network and AdamW for the rest. Muon's own
            products are in bfloat16: it is for devices that have instructions for that.
        lr: peak learning rate.
        weight_decay: of the weights, in parts of the learning rate.
        warmup: steps from nothing to the peak.
        cooldown: last part of the time, in which the learning rate falls to nearly nothing.
        ema: decay of the weights' running mean, which is what is exported.
        bfloat16: products and convolutions in bfloat16 by autocast, if the device has instructions for it; weights
            and optimiser stay in float32.
        compile: by torch.compile; needs a C++ compiler where there is no GPU, and some minutes to begin.
        share: part of the whole time when all parts are trained in one run.
    """

    batch: int = Field(gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    warmup: int = Field(default=100, gt=0)
    cooldown: float = Field(default=0.25, ge=0, lt=1)
    ema: float = Field(default=0.999, ge=0, lt=1)
    bfloat16: bool = False
    compile: bool = False
    share: float = Field(gt=0, le=1)


class Part(_Strict):
    """One part of the base: the model's own configuration, and its training."""

    model: dict[str, Any]
    training: Training


class Config(_Strict):
    """A base to make.

    Attributes:
        resolution: edge of its pictures in pixels.
        scenes: composed once, to train every part on.
        judged: scenes of held-out drawings, to judge every part by.
        vocabulary: tokens of the tokenizer, unless `start` gives one.
        length: tokens that the text encoder reads.
        start: a base whose weights each part starts from, its latents being kept; none: from nothing.
        drawn_sprites: make simple shapes instead of fetching icon packs (for trying the job out).
        seed: of the scenes and of the weights.
        vae: AutoencoderKL.
        clip: CLIPModel; both of its towers.
        unet: UNet2DConditionModel.
    """

    resolution: int = Field(ge=32)
    scenes: int = Field(gt=0)
    judged: int = Field(gt=0)
    vocabulary: int = Field(ge=514)
    length: int = Field(gt=8)
    start: str | None = None
    drawn_sprites: bool = False
    seed: int = 0
    vae: Part
    clip: Part
    unet: Part


def read_config(name: str) -> Config:
    """Read a configuration: one that the project ships (``tiny64``, ``smoke``), or a YAML file.

    Raises:
        ObjdriveError: there is none of that name, or it is not one.
    """
    shipped = CONFIGS / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in CONFIGS.glob("*.yaml")))
        raise ObjdriveError(f"no configuration {name!r}: neither a YAML file nor one of {there}")
    try:
        return Config.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise ObjdriveError(f"the configuration {path} is not valid: {error}") from error
