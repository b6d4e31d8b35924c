"""The steps of a group's fine-tune: losses, gradients clipped scene by scene, and one optimiser for all."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from objdrive.adapters.bank import AdapterBank
from objdrive.base.stable_diffusion import Base
from objdrive.training.inputs import GroupMaterial
from objdrive.training.objective import group_losses
from objdrive.training.recipe import Recipe


@dataclass
class Course:
    """How the training went, scene by scene: sums over steps, and the step at which a scene diverged (-1: none)."""

    object_losses: Tensor
    class_losses: Tensor
    diverged_at: Tensor


def train(
    base: Base,
    bank: AdapterBank,
    embeddings: Mapping[str, nn.Parameter],
    group: GroupMaterial,
    recipe: Recipe,
    on_step: Callable[[], None],
) -> Course:
    """Take all of the recipe's steps; `bank` and `embeddings` hold what is learned.

    Args:
        base: the frozen base.
        bank: slot k starts as scene k does.
        embeddings: (K, objects, d) by text encoder, what the learned tokens start as.
        group: the K scenes' material.
        recipe: hyperparameters.
        on_step: called after every step.
    """
    for stack in embeddings.values():
        stack.requires_grad_(recipe.embedding_lr > 0)
    trained = [(list(embeddings.values()), recipe.embedding_lr)] if recipe.embedding_lr > 0 else []
    trained += [([bank.values], recipe.lora_lr)] if recipe.rank > 0 else []
    values = [value for stacks, _ in trained for value in stacks]
    groups = [{"params": stacks, "lr": lr} for stacks, lr in trained]
    fused = base.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    sums = torch.zeros(2, bank.slots, device=base.device)
    diverged_at = torch.full((bank.slots,), -1, device=base.device)
    for step, inputs in enumerate(group.steps()):
        object_losses, class_losses = group_losses(base, bank, embeddings, inputs, recipe)
        losses = object_losses + recipe.ccr_weight * class_losses
        optimizer.zero_grad()
        losses.sum().backward()
        norms = clip_each_(values, recipe.max_grad_norm)
        broken = ~(losses.isfinite() & norms.isfinite())
        diverged_at = torch.where(broken & (diverged_at < 0), step, diverged_at)
        for gradient in _gradients(values):
            gradient.masked_fill_(_per_slot(diverged_at >= 0, gradient), 0)
        optimizer.step()
        schedule.step()
        sums += torch.stack([object_losses, class_losses]).detach()
        on_step()
    return Course(sums[0], sums[1], diverged_at)


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a tenth at the last step."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def clip_each_(values: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradients of each slot by that slot's own norm, in place.

    Args:
        values: stacks (K, ...) with gradients; a slot's norm runs over all of them.
        max_norm: largest norm that a slot keeps.

    Returns:
        (K,) norms before clipping.
    """
    gradients = _gradients(values)
    norms: Tensor = torch.stack([torch.linalg.vector_norm(one.flatten(1), dim=1) for one in gradients])
    norms = torch.linalg.vector_norm(norms, dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(_per_slot(factors, gradient))
    return norms


def _gradients(values: Sequence[nn.Parameter]) -> list[Tensor]:
    return [value.grad for value in values if value.grad is not None]


def _per_slot(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 1))
