"""Training views: squares cut from a scene's one picture, encoded once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from objdrive.base import Base
from objdrive.images import close_window, cut, object_window
from objdrive.losses import latent_mask
from objdrive.recipe import Recipe

# As large as things usually are in pictures of them: what is shown larger here is drawn larger than prompts ask for.
_USUAL_FILL = 0.6


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
    """Cut and encode views of a scene: first its picture, then with `zoom` each of several objects close up and alone.

    The picture is cropped if the objects are small in it (`least_fill`): they are shown at a size that the latents can
    hold. In a close-up the others, and what is outside of the photo, have the colour of the photo's ground.
    """
    cuts = list(_cuts(base, scene, recipe))
    # Large pictures go through the autoencoder one by one: its activations are the largest of all.
    batch = max(1, 512**2 // base.resolution**2)
    pixels = to_pixels(base, [one.picture for one in cuts])
    latents = torch.cat([base.encode_latents(part) for part in pixels.split(batch)])
    return [View(one.shown, z, one.weights[None].to(base.device)) for one, z in zip(cuts, latents, strict=True)]


def main_picture(base: Base, scene: Scene, recipe: Recipe) -> np.ndarray:
    """(R, R, 3) uint8: the picture, as a square with all objects in it, cropped if they are small (`least_fill`)."""
    return _main_cut(base, scene, recipe)[0]


def to_pixels(base: Base, pictures: Sequence[np.ndarray]) -> Tensor:
    """(N, 3, R, R) in [0, 1] on the base's device, of N pictures (R, R, 3) uint8."""
    return as_pixels(np.stack(pictures)).to(base.device)


def as_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, 3, H, W) in [0, 1] of pictures (N, H, W, 3) uint8."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def _main_cut(base: Base, scene: Scene, recipe: Recipe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, mask and inside of the picture, as `cut` returns them."""
    together = _union(scene)
    return cut(scene.image, together, close_window(together, recipe.least_fill), base.resolution)


def _cuts(base: Base, scene: Scene, recipe: Recipe) -> Iterator[_Cut]:
    picture, mask, inside = _main_cut(base, scene, recipe)
    yield _Cut(tuple(range(len(scene.objects))), picture, _loss_weights(base, mask, inside, recipe))
    if recipe.zoom == 0 or len(scene.objects) == 1:
        return
    around = mask < 0.5
    ground = np.median(picture[around if around.any() else ...].reshape(-1, 3), axis=0)
    for index in range(len(scene.objects)):
        yield _close_up(base, scene, index, ground, recipe)


def _close_up(base: Base, scene: Scene, index: int, ground: np.ndarray, recipe: Recipe) -> _Cut:
    one = scene.objects[index]
    window = object_window(one.mask, _USUAL_FILL)
    picture, mask, inside = cut(scene.image, one.mask, window, base.resolution)
    others = cut(scene.image, _union(scene, without=one), window, base.resolution)[1]
    # A prompt that names this object alone must not be taught what the others look like: it is enough that they are
    # seen, whatever their weight in the loss.
    painted = (np.maximum(_grown(others), 1 - inside) * (1 - mask))[..., None]
    alone = np.round(picture * (1 - painted) + ground * painted).astype(np.uint8)
    return _Cut((index,), alone, _loss_weights(base, mask, inside * (1 - others), recipe))


def _grown(mask: np.ndarray) -> np.ndarray:
    """(R, R): the mask, larger by a 32nd of its edge on every side, so that no rim of what it covers is left."""
    reach = max(1, len(mask) // 32)
    grown = F.max_pool2d(torch.from_numpy(mask)[None], 2 * reach + 1, stride=1, padding=reach)
    return grown[0].numpy()


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
