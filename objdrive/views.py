"""Training views: squares cut from a scene's one picture, encoded once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from objdrive.base import Base
from objdrive.images import close_window, cut
from objdrive.losses import latent_mask
from objdrive.recipe import Recipe


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: its mask is (H, W), float32 in [0, 1]."""

    object_id: str
    class_name: str
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """Objects that share one image (H, W, 3) uint8 and are implanted together; usually one.

    `key` seeds everything random about the scene (the artifact's digest is a good one), so that its adapter depends
    neither on its place in a group nor on its neighbours.
    """

    key: str
    image: np.ndarray
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class View:
    """A square cut of the picture, encoded.

    Attributes:
        shown: indices of the objects that it shows.
        latents: (C, h, h).
        weights: (1, h, h), how much each place counts in the object-specific loss.
    """

    shown: tuple[int, ...]
    latents: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Cut:
    """A view before encoding: pixels (R, R, 3) uint8, weights (h, h)."""

    shown: tuple[int, ...]
    picture: np.ndarray
    weights: Tensor


def make_views(base: Base, scene: Scene, recipe: Recipe) -> list[View]:
    """Cut and encode views of a scene: first its picture, then with `zoom` each of several objects close up.

    Objects that are small in the photo are shown at a size that the latents can hold (`least_fill`), and those of one
    picture apart.
    """
    cuts = list(_cuts(base, scene, recipe))
    # Large pictures go through the autoencoder one by one: its activations are the largest of all.
    batch = max(1, 512**2 // base.resolution**2)
    pixels = to_pixels(base, [one.picture for one in cuts])
    latents = torch.cat([base.encode_latents(part) for part in pixels.split(batch)])
    return [View(one.shown, z, one.weights[None].to(base.device)) for one, z in zip(cuts, latents, strict=True)]


def main_picture(base: Base, scene: Scene, recipe: Recipe) -> np.ndarray:
    """(R, R, 3) uint8: the picture, as a square with all objects in it, cropped if they are small (`least_fill`)."""
    together = _union(scene)
    return cut(scene.image, together, close_window(together, recipe.least_fill), base.resolution)[0]


def to_pixels(base: Base, pictures: Sequence[np.ndarray]) -> Tensor:
    """(N, 3, R, R) in [0, 1] on the base's device, of N pictures (R, R, 3) uint8."""
    return as_pixels(np.stack(pictures)).to(base.device)


def as_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, 3, H, W) in [0, 1] of pictures (N, H, W, 3) uint8."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def _cuts(base: Base, scene: Scene, recipe: Recipe) -> Iterator[_Cut]:
    together = _union(scene)
    picture, mask, inside = cut(scene.image, together, close_window(together, recipe.least_fill), base.resolution)
    yield _Cut(tuple(range(len(scene.objects))), picture, _loss_weights(base, mask, inside, recipe))
    if recipe.zoom == 0 or len(scene.objects) == 1:
        return
    for index, one in enumerate(scene.objects):
        window = close_window(one.mask, recipe.least_fill)
        picture, mask, inside = cut(scene.image, one.mask, window, base.resolution)
        # A prompt that names this object alone must not be taught what the others look like.
        others = cut(scene.image, _union(scene, without=one), window, base.resolution)[1]
        yield _Cut((index,), picture, _loss_weights(base, mask, inside * (1 - others), recipe))


def _union(scene: Scene, without: SceneObject | None = None) -> np.ndarray:
    """(H, W): the masks of a scene's objects in one, empty if there are none."""
    union = np.zeros_like(scene.objects[0].mask)
    for one in scene.objects:
        if one is not without:
            union = np.maximum(union, one.mask)
    return union


def _loss_weights(base: Base, mask: np.ndarray, inside: np.ndarray, recipe: Recipe) -> Tensor:
    """(h, h) weights of one view's loss; nothing is learned from outside of the picture."""
    size = base.latent_size
    within = latent_mask(torch.from_numpy(inside)[None], size)[0]
    if not recipe.masked:
        return within
    return latent_mask(torch.from_numpy(mask)[None], size, soft=recipe.soft_mask)[0] * within
