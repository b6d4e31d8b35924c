"""personalize: one photo, masks and class words in; LoRA weights and token embeddings out (arXiv 2401.15708)."""

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from objdrive.adapter import Adapter
from objdrive.bank import AdapterBank
from objdrive.base import TOKEN_MARK, Base
from objdrive.class_pictures import ClassPictures, seed_of
from objdrive.images import object_alone
from objdrive.losses import (
    add_noise,
    background_loss,
    class_loss,
    object_loss,
    timestep_odds,
    velocity,
    velocity_weight,
)
from objdrive.prototype import class_prompt, optimise_prototypes, prototype_targets
from objdrive.recipe import Recipe
from objdrive.views import Scene, View, main_picture, make_views, to_pixels, with_mended_masks

LARGEST_GROUP = 16
"""Scenes in a group beyond which nothing is gained."""


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
    prototypes = _starting_embeddings(base, scenes, recipe)
    on_step()
    class_pictures = class_pictures or ClassPictures(base, recipe)
    if recipe.ccr_weight:
        class_pictures.draw({o.class_name for scene in scenes for o in scene.objects}, on_step=on_step)
    materials = []
    for scene in scenes:
        materials.append(_Material.prepare(base, scene, recipe, class_pictures))
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
    materials: Sequence["_Material"],
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
    base: Base, bank: AdapterBank, embeddings: Tensor, materials: Sequence["_Material"], recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """One step's object-specific and class losses, each (K,): every scene brings its views and what is kept."""
    draws = [material.draw(recipe) for material in materials]
    clean, noise, timesteps = (
        torch.stack(parts).to(base.device)
        for parts in zip(*((draw.clean, draw.noise, draw.timesteps) for draw in draws), strict=True)
    )
    masks, kept_states = (
        torch.stack(parts) for parts in zip(*((draw.weights, draw.kept_states) for draw in draws), strict=True)
    )
    alphas = base.alphas[timesteps]
    noised = add_noise(clean, noise, alphas)
    target = velocity(clean, noise, alphas) if base.predicts_velocity else noise
    states = torch.cat([_learned_states(base, embeddings, draws, recipe), kept_states], dim=1)
    with bank.active(range(len(draws))):
        prediction = _predict(base, noised, timesteps, states)
    importance = torch.ones_like(alphas)
    if recipe.timesteps == "log-normal":
        importance = velocity_weight(alphas, velocity=base.predicts_velocity)
    views, kept = slice(None, recipe.views), slice(recipe.views, None)
    object_losses = (importance[:, views] * object_loss(prediction[:, views], target[:, views], masks)).mean(dim=1)
    if recipe.ccr_weight == 0:
        return object_losses, torch.zeros_like(object_losses)
    expected = target.clone()
    if recipe.ccr_target == "base":
        words = torch.cat([torch.stack([draw.word_states for draw in draws]), kept_states], dim=1)
        # Without the background, what the base makes of the views is of no use.
        asked = slice(None) if recipe.ccr_background else kept
        with torch.no_grad():
            expected[:, asked] = _predict(base, noised[:, asked], timesteps[:, asked], words[:, asked])
    class_losses = (importance[:, kept] * class_loss(prediction[:, kept], expected[:, kept])).mean(dim=1)
    if recipe.ccr_background:
        around = importance[:, views] * background_loss(prediction[:, views], expected[:, views], masks)
        class_losses = class_losses + around.mean(dim=1)
    return object_losses, class_losses


def _predict(base: Base, noised: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
    """(K, S, C, h, h): the network's output for S samples of each of K scenes."""
    flat = base.predict(noised.flatten(0, 1), timesteps.flatten(0, 1), states.flatten(0, 1))
    predicted: Tensor = flat.unflatten(0, timesteps.shape)
    return predicted


def _learned_states(base: Base, embeddings: Tensor, draws: Sequence["_Draw"], recipe: Recipe) -> Tensor:
    """(K, views, L, d) text states of the prompts with learned tokens; each distinct prompt is encoded once."""
    distinct: dict[tuple[int, str, tuple[int, ...]], int] = {}
    rows = []
    for slot, draw in enumerate(draws):
        for text, shown in zip(draw.texts, draw.shown, strict=True):
            rows.append(distinct.setdefault((slot, text, shown), len(distinct)))
    prompts = [base.tokenize(text) for _, text, _ in distinct]
    vectors = [embeddings[slot, index] for slot, _, shown in distinct for index in shown]
    states, _ = base.encode_text(prompts, vectors)
    return states[torch.tensor(rows, device=states.device).view(len(draws), recipe.views)]


@dataclass(frozen=True)
class _Draw:
    """What one scene brings to one step: first its views, then what the regularization keeps."""

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor
    texts: list[str]
    shown: list[tuple[int, ...]]
    word_states: Tensor
    kept_states: Tensor


@dataclass(frozen=True)
class _Material:
    """All that is computed once for a scene, and the generator of everything random about it."""

    generator: torch.Generator
    views: list[View]
    phrases: list[str]
    class_latents: list[Tensor]
    class_states: Tensor
    word_states: Tensor
    null_states: Tensor
    odds: Tensor

    @classmethod
    def prepare(cls, base: Base, scene: Scene, recipe: Recipe, class_pictures: ClassPictures) -> "_Material":
        generator = torch.Generator().manual_seed(seed_of(f"{recipe.seed}:{scene.key}"))
        names = [o.class_name for o in scene.objects]
        views = make_views(base, scene, recipe)
        worded = [class_prompt(" and ".join(names[i] for i in view.shown)) for view in views]
        with torch.no_grad():
            class_states, _ = base.encode_text([base.tokenize(class_prompt(name)) for name in names])
            word_states, _ = base.encode_text([base.tokenize(text) for text in worded])
            null_states, _ = base.encode_text([base.tokenize("")])
        alphas = base.alphas.cpu()
        return cls(
            generator=generator,
            views=views,
            phrases=[token_phrase(recipe, name) for name in names],
            class_latents=[class_pictures[name] for name in names] if recipe.ccr_weight else [],
            class_states=class_states,
            word_states=word_states,
            null_states=null_states[0],
            odds=timestep_odds(alphas) if recipe.timesteps == "log-normal" else torch.ones_like(alphas),
        )

    def draw(self, recipe: Recipe) -> _Draw:
        """The next step's draw; it uses the scene's own generator only."""
        chosen = [self._view(recipe) for _ in range(recipe.views)]
        views = [self.views[index] for index in chosen]
        template = recipe.prompts[self._below(len(recipe.prompts))]
        kept = [self._kept(recipe) for _ in range(recipe.class_samples if recipe.ccr_weight else 0)]
        clean = torch.stack([view.latents for view in views] + [latents for latents, _ in kept])
        return _Draw(
            clean=clean,
            noise=torch.randn(clean.shape, generator=self.generator),
            timesteps=torch.multinomial(self.odds, len(clean), replacement=True, generator=self.generator),
            weights=torch.stack([view.weights for view in views]),
            texts=[self._text(template, view) for view in views],
            shown=[view.shown for view in views],
            word_states=self.word_states[chosen],
            kept_states=torch.stack([states for _, states in kept]) if kept else self.class_states[:0],
        )

    def _view(self, recipe: Recipe) -> int:
        close = [index for index, view in enumerate(self.views) if len(view.shown) < len(self.phrases)]
        zoomed = bool(close) and self._chance() < recipe.zoom
        among = close if zoomed else [index for index in range(len(self.views)) if index not in close]
        return among[self._below(len(among))]

    def _kept(self, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """Latents and text states of a sample at which the base's prediction is kept."""
        if self._chance() < recipe.ccr_unconditional:
            return self.views[self._view(recipe)].latents, self.null_states
        member = self._below(len(self.class_states))
        pictures = self.class_latents[member]
        return pictures[self._below(len(pictures))], self.class_states[member]

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def _text(self, template: str, view: View) -> str:
        return template.replace("{}", " and ".join(self.phrases[i] for i in view.shown))


def token_phrase(recipe: Recipe, class_name: str) -> str:
    """What ``{}`` in a prompt becomes for an object, `TOKEN_MARK` standing for its learned token."""
    return recipe.phrase.replace("{token}", TOKEN_MARK).replace("{class}", class_name)


def _starting_embeddings(base: Base, scenes: Sequence[Scene], recipe: Recipe) -> list[Tensor]:
    """For each scene (objects, d): class word embeddings, prototypes or random identifiers, by the recipe."""
    objects = [(scene, o) for scene in scenes for o in scene.objects]
    if recipe.embedding_start == "random":
        # By place, not by id: an adapter depends on nothing that its digest does not hold.
        places = [f"{recipe.seed}:{scene.key}:{place}" for scene in scenes for place in range(len(scene.objects))]
        start = torch.stack([_random_embedding(base, place) for place in places])
    else:
        start = torch.stack([base.class_embedding(o.class_name) for _, o in objects])
    if recipe.embedding_start == "prototype":
        whole = to_pixels(base, [main_picture(base, scene, recipe) for scene, _ in objects])
        alone = to_pixels(base, [object_alone(scene.image, o.mask, base.resolution) for scene, o in objects])
        targets = prototype_targets(base, whole, alone, [o.class_name for _, o in objects])
        start = optimise_prototypes(base, start, targets, steps=recipe.prototype_steps, lr=recipe.prototype_lr)
    return list(start.split([len(scene.objects) for scene in scenes]))


def _random_embedding(base: Base, text: str) -> Tensor:
    """(d,): an identifier without meaning, as DreamBooth's rare tokens, of the vocabulary's own mean and spread."""
    table: Tensor = base.text_encoder.get_input_embeddings().weight.float()
    generator = torch.Generator().manual_seed(seed_of(text))
    return table.mean(dim=0) + table.std(dim=0) * torch.randn(table.shape[1], generator=generator).to(table.device)


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


def fitting_group_size(base: Base, recipe: Recipe) -> int:
    """Scenes that can be fine-tuned together in half of the device's free memory, from 1 to `LARGEST_GROUP`."""
    if base.device.type == "cuda":
        free = torch.cuda.mem_get_info(base.device)[0]
    else:
        # There is a worker on every core, and they share the memory.
        free = psutil.virtual_memory().available // (os.cpu_count() or 1)
    return int(max(1, min(LARGEST_GROUP, free // 2 // _bytes_per_scene(base, recipe))))


def _bytes_per_scene(base: Base, recipe: Recipe) -> int:
    """What one scene's forward pass keeps for the backward pass."""
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
    states, _ = base.encode_text([base.tokenize("")] * samples)
    with (
        AdapterBank(base.unet, slots=1, rank=recipe.rank) as bank,
        bank.active([0]),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        timesteps = torch.zeros(samples, dtype=torch.long, device=base.device)
        output = base.predict(latents.to(base.device), timesteps, states.detach().requires_grad_(True))
    del output
    return sum(kept.values())
