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


def starting_embeddings(base: Base, scenes: Sequence[Scene], recipe: Recipe) -> list[Tensor]:
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
