"""personalize: one photo, masks and class words in; LoRA weights and token embeddings out (arXiv 2401.15708)."""

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from objdrive.adapters.adapter import Adapter
from objdrive.adapters.bank import AdapterBank
from objdrive.base.conditioning import Conditioning
from objdrive.base.stable_diffusion import Base
from objdrive.training.class_pictures import ClassPictures
from objdrive.training.embeddings import starting_embeddings
from objdrive.training.losses import background_loss, class_loss, object_loss
from objdrive.training.material import Draw, Material
from objdrive.training.recipe import Recipe
from objdrive.training.views import Scene, with_mended_masks


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tune yields.

    Attributes:
        adapters: one for each object.
        prototypes: (d,) for each object, what it started from.
        masks: (H, W) for each object, what it was learned by: the scene's own mask, or another one in its place.
        metrics: losses, steps and seconds.
    """

    adapters: tuple[Adapter, ...]
    prototypes: tuple[Tensor, ...]
    masks: tuple[np.ndarray, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Diverged:
    """A scene whose loss or gradient stopped being finite; its neighbours in the group are not affected."""

    step: int
    message: str


def personalize(
    base: Base,
    scenes: Sequence[Scene],
    recipe: Recipe,
    *,
    class_pictures: ClassPictures | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[FineTuned | Diverged]:
    """Fine-tune a group of scenes in common forward passes; each gets the adapter that it would get alone.

    Args:
        base: the frozen base.
        scenes: the group.
        recipe: hyperparameters.
        class_pictures: pictures of classes drawn before with this base and recipe, to share between groups.
        on_step: called after every step of every phase, so that a caller can see that work goes on.

    Returns:
        One result per scene, in order.
    """
    started = time.perf_counter()
    if recipe.mend_masks:
        scenes = _mended(base, scenes, on_step)
    prototypes = starting_embeddings(base, scenes, recipe)
    on_step()
    class_pictures = class_pictures or ClassPictures(base, recipe)
    if recipe.ccr_weight:
        class_pictures.draw({o.class_name for scene in scenes for o in scene.objects}, on_step=on_step)
    materials = []
    for scene in scenes:
        materials.append(Material.prepare(base, scene, recipe, class_pictures))
        on_step()
    # A scene with fewer objects than others leaves the last rows of its embeddings unused.
    embeddings = nn.Parameter(nn.utils.rnn.pad_sequence(prototypes, batch_first=True))
    with AdapterBank(base.unet, slots=len(scenes), rank=recipe.rank) as bank:
        for slot, material in enumerate(materials):
            bank.initialise(slot, material.generator)
        course = _train(base, bank, embeddings, materials, recipe, on_step)
        seconds = (time.perf_counter() - started) / len(scenes)
        return [
            _result(bank, slot, scene, embeddings, prototypes[slot], course, recipe, seconds)
            for slot, scene in enumerate(scenes)
        ]


def _mended(base: Base, scenes: Sequence[Scene], on_step: Callable[[], None]) -> list[Scene]:
    # A GPU waits meanwhile, and the processor's cores are free.
    threads = (os.cpu_count() or 1) if base.device.type == "cuda" else torch.get_num_threads()
    mended = []
    with ThreadPoolExecutor(threads) as pool:
        for scene in pool.map(with_mended_masks, scenes):
            mended.append(scene)
            on_step()
    return mended


@dataclass
class _Course:
    """How the training went, scene by scene: sums over steps, and the step at which a scene diverged (-1: none)."""

    object_losses: Tensor
    class_losses: Tensor
    diverged_at: Tensor


def _train(
    base: Base,
    bank: AdapterBank,
    embeddings: nn.Parameter,
    materials: Sequence["Material"],
    recipe: Recipe,
    on_step: Callable[[], None],
) -> _Course:
    embeddings.requires_grad_(recipe.embedding_lr > 0)
    trained = [([embeddings], recipe.embedding_lr)] if recipe.embedding_lr > 0 else []
    trained += [(bank.parameters(), recipe.lora_lr)] if recipe.rank > 0 else []
    values = [value for stacks, _ in trained for value in stacks]
    groups = [{"params": stacks, "lr": lr} for stacks, lr in trained]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    count = len(materials)
    sums = torch.zeros(2, count, device=base.device)
    diverged_at = torch.full((count,), -1, device=base.device)
    for step in range(recipe.steps):
        object_losses, class_losses = _losses(base, bank, embeddings, materials, recipe)
        losses = object_losses + recipe.ccr_weight * class_losses
        optimizer.zero_grad()
        losses.sum().backward()
        norms = clip_each_(values, recipe.max_grad_norm)
        broken = ~(losses.isfinite() & norms.isfinite())
        diverged_at = torch.where(broken & (diverged_at < 0), step, diverged_at)
        for gradient in (value.grad for value in values if value.grad is not None):
            gradient.masked_fill_(_per_slot(diverged_at >= 0, gradient), 0)
        optimizer.step()
        schedule.step()
        sums += torch.stack([object_losses, class_losses]).detach()
        on_step()
    return _Course(sums[0], sums[1], diverged_at)


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
    squares = [value.grad.square().flatten(1).sum(dim=1) for value in values if value.grad is not None]
    norms = torch.stack(squares).sum(dim=0).sqrt()
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for value in values:
        if value.grad is not None:
            value.grad.mul_(_per_slot(factors, value))
    return norms


def _per_slot(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 1))


def _losses(
    base: Base, bank: AdapterBank, embeddings: Tensor, materials: Sequence["Material"], recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """One step's object-specific and class losses, each (K,): every scene brings its views and what is kept."""
    draws = [material.draw(recipe) for material in materials]
    clean, noise, timesteps = (
        torch.stack(parts).to(base.device)
        for parts in zip(*((draw.clean, draw.noise, draw.timesteps) for draw in draws), strict=True)
    )
    masks = torch.stack([draw.weights for draw in draws])
    kept_prompts = Conditioning.stack([draw.kept for draw in draws])
    noised = base.noise.add_noise(clean, noise, timesteps)
    target = base.noise.target(clean, noise, timesteps)
    prompts = Conditioning.cat([_learned_prompts(base, embeddings, draws, recipe), kept_prompts], dim=1)
    with bank.active(range(len(draws))):
        prediction = _predict(base, noised, timesteps, prompts)
    importance = base.noise.loss_weights(timesteps, recipe.timesteps)
    views, kept = slice(None, recipe.views), slice(recipe.views, None)
    object_losses = (importance[:, views] * object_loss(prediction[:, views], target[:, views], masks)).mean(dim=1)
    if recipe.ccr_weight == 0:
        return object_losses, torch.zeros_like(object_losses)
    expected = target.clone()
    if recipe.ccr_target == "base":
        words = Conditioning.cat([Conditioning.stack([draw.worded for draw in draws]), kept_prompts], dim=1)
        # Without the background, what the base makes of the views is of no use.
        asked = slice(None) if recipe.ccr_background else kept
        with torch.no_grad():
            expected[:, asked] = _predict(base, noised[:, asked], timesteps[:, asked], words[:, asked])
    class_losses = (importance[:, kept] * class_loss(prediction[:, kept], expected[:, kept])).mean(dim=1)
    if recipe.ccr_background:
        around = importance[:, views] * background_loss(prediction[:, views], expected[:, views], masks)
        class_losses = class_losses + around.mean(dim=1)
    return object_losses, class_losses


def _predict(base: Base, noised: Tensor, timesteps: Tensor, prompts: Conditioning) -> Tensor:
    """(K, S, C, h, h): the network's output for S samples of each of K scenes."""
    flat = base.predict(noised.flatten(0, 1), timesteps.flatten(0, 1), prompts.flatten())
    predicted: Tensor = flat.unflatten(0, timesteps.shape)
    return predicted


def _learned_prompts(base: Base, embeddings: Tensor, draws: Sequence["Draw"], recipe: Recipe) -> Conditioning:
    """(K, views) encoded prompts with learned tokens; each distinct prompt is encoded once."""
    distinct: dict[tuple[int, str, tuple[int, ...]], int] = {}
    rows = []
    for slot, draw in enumerate(draws):
        for text, shown in zip(draw.texts, draw.shown, strict=True):
            rows.append(distinct.setdefault((slot, text, shown), len(distinct)))
    prompts = [base.tokenize(text) for _, text, _ in distinct]
    vectors = [embeddings[slot, index] for slot, _, shown in distinct for index in shown]
    encoded = base.encode_text(prompts, vectors)
    return encoded[torch.tensor(rows, device=base.device).view(len(draws), recipe.views)]


def _result(
    bank: AdapterBank,
    slot: int,
    scene: Scene,
    embeddings: Tensor,
    prototypes: Tensor,
    course: _Course,
    recipe: Recipe,
    seconds: float,
) -> FineTuned | Diverged:
    diverged_at = int(course.diverged_at[slot])
    if diverged_at >= 0:
        return Diverged(
            diverged_at, f"the loss stopped being finite at step {diverged_at}: lower lora_lr or embedding_lr"
        )
    lora = bank.export(slot) if recipe.rank else {}
    learned = embeddings.detach()[slot, : len(scene.objects)].cpu()
    steps = max(1, recipe.steps)
    metrics = {
        "loss_object": float(course.object_losses[slot]) / steps,
        "loss_class": float(course.class_losses[slot]) / steps,
        "steps": float(recipe.steps),
        "seconds": seconds,
    }
    return FineTuned(
        adapters=tuple(Adapter(lora, vector.clone()) for vector in learned),
        prototypes=tuple(vector.cpu().clone() for vector in prototypes),
        masks=tuple(o.mask for o in scene.objects),
        metrics=metrics,
    )
