"""The embeddings that a fine-tune starts from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from objdrive.base.stable_diffusion import Base
from objdrive.catalog.geometry import object_alone
from objdrive.seeds import seed_of
from objdrive.training.prototype import optimise_prototypes, prototype_targets
from objdrive.training.recipe import Recipe
from objdrive.training.views import Scene, main_picture, to_pixels


def starting_embeddings(base: Base, scenes: Sequence[Scene], recipe: Recipe) -> list[dict[str, Tensor]]:
    """The embeddings of each scene's objects before the first step, by the recipe's `embedding_start`.

    Returns:
        For each scene (objects, d) by text encoder: embeddings of the class words, prototypes or random identifiers.
    """
    objects = [(scene, o) for scene in scenes for o in scene.objects]
    if recipe.embedding_start == "random":
        # By place, not by id: an adapter depends on nothing that its digest does not hold.
        places = [f"{recipe.seed}:{scene.key}:{place}" for scene in scenes for place in range(len(scene.objects))]
        vectors = [_random_embeddings(base, place) for place in places]
    else:
        vectors = [base.class_embeddings(o.class_name) for _, o in objects]
    start = {encoder: torch.stack([one[encoder] for one in vectors]) for encoder in base.vocabularies}
    if recipe.embedding_start == "prototype":
        whole = to_pixels(base, [main_picture(base, scene, recipe) for scene, _ in objects])
        alone = to_pixels(base, [object_alone(scene.image, o.mask, base.resolution) for scene, o in objects])
        names, steps, lr = [o.class_name for _, o in objects], recipe.prototype_steps, recipe.prototype_lr
        # Others start from the class word: nothing compares their texts with pictures.
        for encoder in base.joint_encoders:
            targets = prototype_targets(base, whole, alone, names, encoder=encoder)
            start[encoder] = optimise_prototypes(base, start[encoder], targets, encoder=encoder, steps=steps, lr=lr)
    counts = [len(scene.objects) for scene in scenes]
    parts = zip(*(rows.split(counts) for rows in start.values()), strict=True)
    return [dict(zip(start, part, strict=True)) for part in parts]


def _random_embeddings(base: Base, seed: str) -> dict[str, Tensor]:
    """(d,) by text encoder: an identifier without meaning, as DreamBooth's rare tokens (arXiv 2208.12242).

    It has the vocabulary's own mean and spread.
    """
    generator = torch.Generator().manual_seed(seed_of(seed))
    return {encoder: _like_any(table.float(), generator) for encoder, table in base.vocabularies.items()}


def _like_any(table: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(table.shape[1], generator=generator).to(table.device)
    return table.mean(dim=0) + table.std(dim=0) * noise
