"""How many scenes fit the device's memory."""

import os

import psutil
import torch
from torch import Tensor

from objdrive.adapters.bank import AdapterBank
from objdrive.base.stable_diffusion import Base
from objdrive.training.objective import adapted
from objdrive.training.recipe import Recipe

LARGEST_GROUP = 16
"""Scenes in a group beyond which nothing is gained."""


def fitting_group_size(base: Base, recipe: Recipe) -> int:
    """Scenes that can be fine-tuned together in half of the device's free memory, from 1 to `LARGEST_GROUP`."""
    if base.device.type == "cuda":
        free = torch.cuda.mem_get_info(base.device)[0]
    else:
        # There is a worker on every core, and they share the memory.
        free = psutil.virtual_memory().available // (os.cpu_count() or 1)
    return int(max(1, min(LARGEST_GROUP, free // 2 // _bytes_per_scene(base, recipe))))


def _bytes_per_scene(base: Base, recipe: Recipe) -> int:
    """What one scene's forward pass through the network keeps for the backward pass."""
    kept: dict[int, int] = {}
    # Views of the base's weights are saved too, but all scenes share them.
    weights = {weight.untyped_storage().data_ptr() for weight in base.unet.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    samples = recipe.views + (recipe.class_samples if recipe.ccr_weight else 0)
    latents = torch.zeros(samples, base.unet.config["in_channels"], base.latent_size, base.latent_size)
    # Learned tokens get their gradients through the prompts.
    prompts = base.encode_text([base.tokenize("")] * samples).as_leaf()
    with (
        AdapterBank(base.unet, base.family.lora_targets, slots=1, rank=recipe.rank) as bank,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        bank.initialise(0, torch.Generator(), least_rank=recipe.least_rank)
        timesteps = torch.zeros(samples, dtype=torch.long, device=base.device)
        with adapted(base, bank, timesteps[None]):
            output = base.predict(latents.to(base.device), timesteps, prompts)
    del output
    return sum(kept.values())
