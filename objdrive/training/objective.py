"""What a step minimises, ``L = L_obj + ccr_weight * L_ccr`` (arXiv 2401.15708), for a group of scenes at once."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from objdrive.adapters.bank import AdapterBank
from objdrive.base.conditioning import Conditioning
from objdrive.base.stable_diffusion import Base
from objdrive.training.losses import background_loss, class_loss, object_loss
from objdrive.training.material import StepSamples
from objdrive.training.recipe import Recipe


def group_losses(
    base: Base, bank: AdapterBank, embeddings: Mapping[str, Tensor], group: Sequence[StepSamples], recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """L_obj and L_ccr of each scene, from one forward pass of the adapted network and one of the base.

    Args:
        base: the frozen base.
        bank: slot k holds the LoRA of scene k.
        embeddings: (K, objects, d) by text encoder, the learned embeddings of all scenes.
        group: the samples of K scenes.
        recipe: which losses there are, and what they weigh.

    Returns:
        (K,) object-specific losses and (K,) losses of the regularization, which are zero if it is off.
    """
    clean, noise, timesteps, masks = (
        torch.stack(parts).to(base.device)
        for parts in zip(*((one.clean, one.noise, one.timesteps, one.weights) for one in group), strict=True)
    )
    noised, target = base.noise.add_noise(clean, noise, timesteps), base.noise.target(clean, noise, timesteps)
    kept_prompts = Conditioning.stack([one.kept for one in group])
    prompts = Conditioning.cat([_learned_prompts(base, embeddings, group), kept_prompts], dim=1)
    with adapted(base, bank, timesteps):
        prediction = _predict(base, noised, timesteps, prompts)
    importance = base.noise.loss_weights(timesteps, recipe.timesteps)
    views, kept = slice(None, recipe.views), slice(recipe.views, None)
    object_losses = (importance[:, views] * object_loss(prediction[:, views], target[:, views], masks)).mean(dim=1)
    if recipe.ccr_weight == 0:
        return object_losses, torch.zeros_like(object_losses)
    expected = target.clone()
    if recipe.ccr_target == "base":
        worded = Conditioning.cat([Conditioning.stack([one.worded for one in group]), kept_prompts], dim=1)
        # Without the background, what the base makes of the views is of no use.
        asked = slice(None) if recipe.ccr_background else kept
        with torch.no_grad():
            expected[:, asked] = _predict(base, noised[:, asked], timesteps[:, asked], worded[:, asked])
    class_losses = (importance[:, kept] * class_loss(prediction[:, kept], expected[:, kept])).mean(dim=1)
    if recipe.ccr_background:
        around = importance[:, views] * background_loss(prediction[:, views], expected[:, views], masks)
        class_losses = class_losses + around.mean(dim=1)
    return object_losses, class_losses


def adapted(base: Base, bank: AdapterBank, timesteps: Tensor) -> AbstractContextManager[None]:
    """Each scene's samples, at `timesteps` (K, S), adapted by its slot."""
    scenes, samples = timesteps.shape
    if not bank.rank_varies(range(scenes)):
        return bank.active(range(scenes))
    slots = [slot for slot in range(scenes) for _ in range(samples)]
    return bank.active(slots, (timesteps.flatten().tolist(), len(base.noise.alphas)))


def _predict(base: Base, noised: Tensor, timesteps: Tensor, prompts: Conditioning) -> Tensor:
    """(K, S, C, h, h): the network's output for S samples of each of K scenes."""
    flat = base.predict(noised.flatten(0, 1), timesteps.flatten(0, 1), prompts.flatten())
    predicted: Tensor = flat.unflatten(0, timesteps.shape)
    return predicted


def _learned_prompts(base: Base, embeddings: Mapping[str, Tensor], group: Sequence[StepSamples]) -> Conditioning:
    """The views' prompts with learned tokens, on batch axes (K, views); each distinct prompt is encoded once."""
    distinct: dict[tuple[int, str, tuple[int, ...]], int] = {}
    rows = []
    for slot, one in enumerate(group):
        for text, shown in zip(one.texts, one.shown, strict=True):
            rows.append(distinct.setdefault((slot, text, shown), len(distinct)))
    prompts = [base.tokenize(text) for _, text, _ in distinct]
    vectors = [
        {encoder: stack[slot, index] for encoder, stack in embeddings.items()}
        for slot, _, shown in distinct
        for index in shown
    ]
    encoded = base.encode_text(prompts, vectors)
    each = encoded[torch.tensor(rows, device=base.device).view(len(group), -1)]
    return each.framed([frame for one in group for frame in one.frames])
