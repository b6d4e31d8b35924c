"""What fine-tunes take of a GPU's memory at full size, on paper: weights, adapters and activations are counted.

Usage: ``python benchmarks/memory.py``. Nothing is computed and no weights are needed: networks are made of tensors
without values, from the configs that come with the package. Not counted are the CUDA context, kernels' own workspace,
what an allocator leaves unused, and the autoencoder's activations before and after the steps.
"""

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection as ImageTower

from objdrive.adapters.layers import find_layers
from objdrive.base.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, Family
from objdrive.base.single_file import CONFIGS
from objdrive.training.memory import bytes_per_scene
from objdrive.training.recipe import make_recipe

GIB = 2**30
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)
GROUPS = (1, 2, 4, 8, 16)
_KEPT_FREE = 0.9
"""Of a card: the rest is for what is not counted."""
_IMAGE_TOWER = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
)


@dataclass(frozen=True)
class FullSize:
    """A base at its full size: bytes of its weights, and of one scene, and its adapter."""

    name: str
    weights: int
    scene: int
    layers: int
    values: int


def count(name: str, kind: str, family: Family) -> FullSize:
    """Count a base's weights (bfloat16; autoencoder and image tower float32) and what a scene takes."""
    config, recipe = _read(kind, "unet"), make_recipe(tuning=family.tuning)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
        half = [unet, CLIPTextModel(CLIPTextConfig(**_read(kind, "text_encoder")))]
        if family.sized:
            half.append(CLIPTextModelWithProjection(CLIPTextConfig(**_read(kind, "text_encoder_2"))))
        whole = [AutoencoderKL.from_config(_read(kind, "vae")), ImageTower(_IMAGE_TOWER)]
    found = find_layers(unet, family.lora_targets, recipe.rank)
    layers, values = len(found), sum(sum(layer.sizes) for layer in found)
    weights = sum(
        size * weight.numel() for size, parts in ((2, half), (4, whole)) for one in parts for weight in one.parameters()
    )
    return FullSize(name, weights, bytes_per_scene(config, family, recipe, torch.bfloat16), layers, values)


def _read(kind: str, part: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((CONFIGS / kind / part / "config.json").read_text())
    return read


def print_table(size: FullSize) -> None:
    print(
        f"{size.name}: weights {size.weights / GIB:.1f} GiB; an adapter has {size.layers} layers, "
        f"{size.values / 1e6:.1f} million values, {torch.float16.itemsize * size.values / 1e6:.1f} MB in a store; "
        f"a scene takes {size.scene / GIB:.2f} GiB"
    )
    for group in GROUPS:
        needed = (size.weights + group * size.scene) / GIB
        card = next((f"{card} GiB" for card in CARDS if needed <= _KEPT_FREE * card), "none")
        print(f"  a group of {group:2}: {needed:6.1f} GiB, smallest card {card}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, kind, family in (
        ("SD 1.5", "sd15", STABLE_DIFFUSION),
        ("SD 2.1", "sd21", STABLE_DIFFUSION),
        ("SDXL", "sdxl", STABLE_DIFFUSION_XL),
    ):
        print_table(count(name, kind, family))


if __name__ == "__main__":
    main()
