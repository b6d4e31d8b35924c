"""personalize: one photo, masks and class words in; LoRA weights and token embeddings out (arXiv 2401.15708)."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from objdrive.adapters.adapter import Adapter
from objdrive.adapters.bank import AdapterBank
from objdrive.base.stable_diffusion import Base
from objdrive.training.checkpointing import checkpointed
from objdrive.training.class_pictures import ClassPictures
from objdrive.training.embeddings import starting_embeddings
from objdrive.training.inputs import GroupMaterial
from objdrive.training.loop import Course, train
from objdrive.training.material import SceneMaterial
from objdrive.training.recipe import Recipe
from objdrive.training.views import Scene, with_mended_masks


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tune yields.

    Attributes:
        adapters: one for each object.
        prototypes: for each object (d,) by text encoder, what it started from.
        masks: (H, W) for each object, what it was learned by: the scene's own mask, or another one in its place.
        metrics: losses, steps and seconds.
    """

    adapters: tuple[Adapter, ...]
    prototypes: tuple[dict[str, Tensor], ...]
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
    if recipe.keeps_classes:
        class_pictures.draw({o.class_name for scene in scenes for o in scene.objects}, on_step=on_step)
    materials = []
    for scene in scenes:
        materials.append(SceneMaterial.prepare(base, scene, recipe, class_pictures))
        on_step()
    # A scene with fewer objects than others leaves the last rows of its embeddings unused.
    embeddings = {
        encoder: nn.Parameter(pad_sequence([one[encoder] for one in prototypes], batch_first=True))
        for encoder in base.vocabularies
    }
    with AdapterBank(base.unet, base.family.lora_targets, slots=len(scenes), rank=recipe.rank) as bank:
        for slot, material in enumerate(materials):
            bank.initialise(slot, material.generator, least_rank=recipe.least_rank)
        group = GroupMaterial(base, materials, max(len(scene.objects) for scene in scenes), recipe)
        with checkpointed(base, bank):
            course = train(base, bank, embeddings, group, recipe, on_step)
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


def _result(
    bank: AdapterBank,
    slot: int,
    scene: Scene,
    embeddings: Mapping[str, Tensor],
    prototypes: Mapping[str, Tensor],
    course: Course,
    recipe: Recipe,
    seconds: float,
) -> FineTuned | Diverged:
    diverged_at = int(course.diverged_at[slot])
    if diverged_at >= 0:
        return Diverged(
            diverged_at, f"the loss stopped being finite at step {diverged_at}: lower lora_lr or embedding_lr"
        )
    lora = bank.export(slot) if recipe.rank else {}
    learned = {encoder: stack[slot] for encoder, stack in embeddings.items()}
    steps = max(1, recipe.steps)
    metrics = {
        "loss_object": float(course.object_losses[slot]) / steps,
        "loss_class": float(course.class_losses[slot]) / steps,
        "steps": float(recipe.steps),
        "seconds": seconds,
    }
    return FineTuned(
        adapters=tuple(Adapter(lora, _copied(learned, place)) for place in range(len(scene.objects))),
        prototypes=tuple(_copied(prototypes, place) for place in range(len(scene.objects))),
        masks=tuple(o.mask for o in scene.objects),
        metrics=metrics,
    )


def _copied(rows: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    return {encoder: vectors[place].detach().cpu().clone() for encoder, vectors in rows.items()}
