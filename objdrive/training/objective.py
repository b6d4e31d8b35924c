"""What a step minimises, ``L = L_obj + ccr_weight * L_ccr`` (arXiv 2401.15708), for a group of scenes at once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from objdrive.adapters.bank import AdapterBank
from objdrive.base.conditioning import Conditioning
from objdrive.base.stable_diffusion import Base
from objdrive.training.inputs import StepInputs
from objdrive.training.losses import background_loss, class_loss, object_loss
from objdrive.training.recipe import Recipe


def group_losses(
    base: Base, bank: AdapterBank, embeddings: Mapping[str, Tensor], inputs: StepInputs, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """L_obj and L_ccr of each scene, from one forward pass of the adapted network.

    Args:
        base: the frozen base.
        bank: slot k holds the LoRA of scene k.
        embeddings: (K, objects, d) by text encoder, the learned embeddings of all scenes.
        inputs: of K scenes.
        recipe: which losses there are, and what they weigh.

    Returns:
        (K,) object-specific losses and (K,) losses of the regularization, which are zero if it is off.
    """
    learned = {encoder: stack.flatten(0, 1) for encoder, stack in embeddings.items()}
    views, kept = (slice(None), slice(recipe.views)), (slice(None), slice(recipe.views, None))
    learned_prompts = base.encode_tokens(inputs.ids, inputs.learned, learned)[inputs.prompt_rows]
    prompts = Conditioning.cat([learned_prompts.framed_as(inputs.asked[views]), inputs.asked[kept]], dim=1)
    with bank.active(range(bank.slots), (inputs.timesteps.flatten(), len(base.noise.alphas))):
        flat = base.predict(inputs.noised.flatten(0, 1), inputs.timesteps.flatten(), prompts.flatten())
    prediction = flat.view_as(inputs.noised)
    importance, target, expected = inputs.importance, inputs.target, inputs.expected
    object_losses = importance[views] * object_loss(prediction[views], target[views], inputs.weights)
    object_losses = object_losses.mean(dim=1)
    if recipe.ccr_weight == 0:
        return object_losses, torch.zeros_like(object_losses)
    class_losses = (importance[kept] * class_loss(prediction[kept], expected[kept])).mean(dim=1)
    if recipe.ccr_background:
        around = background_loss(prediction[views], expected[views], inputs.weights)
        class_losses = class_losses + (importance[views] * around).mean(dim=1)
    return object_losses, class_losses
