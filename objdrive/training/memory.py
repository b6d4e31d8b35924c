"""How many scenes fit the device's memory."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from objdrive.adapters.bank import AdapterBank
from objdrive.base.family import Family
from objdrive.base.memory import free_bytes
from objdrive.base.stable_diffusion import Base
from objdrive.training.recipe import Recipe

LARGEST_GROUP = 32
"""Scenes in a group at most, whatever the memory. SD 1.5's architecture made 28, 88 and 205 objects an hour on an H200
in groups of 1, 4 and 16, so that the card was not busy yet; at 32 it is nearer to that than to 16, and its memory is
full. A lease is lost as a whole: with yet larger groups a death costs more than they win."""
LARGEST_ON_PROCESSOR = 16
"""The same without a GPU: groups of 8 and 16 are 2.5 and 2.8 times as fast as one scene at a time (`tiny64`)."""

_PROMPT_TOKENS = 77
_WORKSPACE = 3 * 2**30
"""Beside a group, on a GPU: kernels' workspace, and fragments. 2.4 GiB were measured on SD 1.5's architecture."""
_OVERHEAD = 1.25
"""What a scene takes against what is counted of it. 3.3 GiB were measured where 2.8 are counted."""


def fitting_group_size(base: Base, recipe: Recipe) -> int:
    """Scenes that can be fine-tuned together in the memory that this process may still take of the device."""
    each = bytes_per_scene(base.unet.config, base.family, recipe, base.unet.dtype)
    return group_size(free_bytes(base.device), each, gpu=base.device.type == "cuda")


def group_size(free: int, each: int, *, gpu: bool) -> int:
    """Scenes of `each` bytes that fit `free` bytes, at least 1.

    A GPU's memory, or a worker's share of it, is the worker's own, and is used but for what is not counted. Others use
    a processor's too: half of it is left to them.
    """
    if not gpu:
        return max(1, min(LARGEST_ON_PROCESSOR, free // 2 // each))
    # Of a small base, what is not counted is small too.
    return max(1, min(LARGEST_GROUP, int((free - min(_WORKSPACE, free // 4)) / (_OVERHEAD * each))))


def bytes_per_scene(config: Mapping[str, Any], family: Family, recipe: Recipe, dtype: torch.dtype) -> int:
    """What one scene takes of memory besides the base: its share of the bank, and what a step keeps for its backward.

    Nothing is computed: the network is made of tensors without values, and what its forward pass would keep is counted.

    Args:
        config: of the UNet.
        family: of the base.
        recipe: of the fine-tune.
        dtype: of the UNet.
    """
    samples = recipe.views + (recipe.class_samples if recipe.ccr_weight else 0)
    edge, width = int(config["sample_size"]), int(config["cross_attention_dim"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet: Any = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
        kept = _Kept(unet)
        latents = torch.empty(samples, int(config["in_channels"]), edge, edge)
        # Learned tokens get their gradients through the prompts.
        states = torch.empty(samples, _PROMPT_TOKENS, width, requires_grad=True)
        told = {}
        if family.sized:
            pooled = int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])
            told = {"text_embeds": torch.empty(samples, pooled), "time_ids": torch.empty(samples, 6)}
        if family.checkpointing:
            unet.enable_gradient_checkpointing(kept.block)
        with AdapterBank(unet, family.lora_targets, slots=1, rank=recipe.rank) as bank, bank.active([0]), kept:
            unet(latents, torch.zeros(samples, dtype=torch.long), states, added_cond_kwargs=told)
        # Weights in float32, their gradients, and two moments of AdamW.
        lora = 4 * bank.values.nbytes
    return kept.nbytes * dtype.itemsize // torch.float32.itemsize + lora


class _Kept:
    """Counts what is saved for the backward pass, without the network's own weights, which all scenes share.

    Of a checkpointed block it counts the inputs. What the block itself keeps is there too while the backward pass goes
    through it, but only of one block at a time.
    """

    def __init__(self, network: nn.Module) -> None:
        self._shared = {weight.untyped_storage()._cdata for weight in network.parameters()}
        self._sizes: dict[int, int] = {}
        self._largest_block = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self._hooks.__exit__(*exc_info)

    @property
    def nbytes(self) -> int:
        """All that is there at once."""
        return sum(self._sizes.values()) + self._largest_block

    def block(self, block: nn.Module, *inputs: Any) -> Any:
        """A checkpointed block's forward pass."""
        outside, self._sizes = self._sizes, {}
        output = block(*inputs)
        inside, self._sizes = self._sizes, outside
        self._largest_block = max(self._largest_block, sum(inside.values()))
        for tensor in filter(torch.is_tensor, inputs):
            self._note(tensor)
        return output

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._shared:
            self._sizes[storage._cdata] = storage.nbytes()
        return tensor
