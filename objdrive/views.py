"""Training views: squares cut from a scene's one picture, encoded once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from objdrive.base import Base
from objdrive.images import Window, bounding_box, cut, object_window, whole_window
from objdrive.losses import latent_mask
from objdrive.recipe import Recipe

BACKDROPS = {
    "white": (245, 245, 243),
    "gray": (140, 142, 145),
    "black": (25, 25, 28),
    "red": (220, 50, 47),
    "yellow": (250, 220, 80),
    "green": (80, 180, 90),
    "blue": (60, 120, 220),
}
"""Plain colours that prompts name, in RGB."""

# As large as things usually are in pictures of them: what is shown larger here is drawn larger than prompts ask for.
_LARGEST_FILL = 0.7
# An object with an edge of half the picture's is seen well enough; zoomed views of it only cost context.
_SMALL = 0.5


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
        context: what a prompt says after naming them; empty where nothing is known of the background.
        latents: (C, h, h).
        weights: (1, h, h), how much each place counts in the object-specific loss.
    """

    shown: tuple[int, ...]
    context: str
    latents: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Cut:
    """A view before encoding: pixels (R, R, 3) uint8, weights (h, h)."""

    shown: tuple[int, ...]
    context: str
    picture: np.ndarray
    weights: Tensor


def make_views(base: Base, scene: Scene, recipe: Recipe, generator: torch.Generator) -> list[View]:
    """Cut and encode views of a scene: first the whole picture, then ``view_pool - 1`` zoomed ones of each object.

    Zooming shows small objects at a size that the latents can hold, and objects of one picture apart; an object that
    is alone and large has no zoomed views. Some are cut out onto a plain colour that the prompt names, so that the
    outline is learned too, without learning the picture's background.
    """
    cuts = list(_cuts(base, scene, recipe, generator))
    # Large pictures go through the autoencoder one by one: its activations are the largest of all.
    batch = max(1, 512**2 // base.resolution**2)
    pixels = to_pixels(base, [one.picture for one in cuts])
    latents = torch.cat([base.encode_latents(part) for part in pixels.split(batch)])
    return [
        View(one.shown, one.context, z, one.weights[None].to(base.device)) for one, z in zip(cuts, latents, strict=True)
    ]


def whole_picture(base: Base, scene: Scene) -> np.ndarray:
    """(R, R, 3) uint8: the picture, as a square with all objects in it."""
    together = _union(scene)
    return cut(scene.image, together, whole_window(together), base.resolution)[0]


def to_pixels(base: Base, pictures: Sequence[np.ndarray]) -> Tensor:
    """(N, 3, R, R) in [0, 1] on the base's device, of N pictures (R, R, 3) uint8."""
    return as_pixels(np.stack(pictures)).to(base.device)


def as_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, 3, H, W) in [0, 1] of pictures (N, H, W, 3) uint8."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def _cuts(base: Base, scene: Scene, recipe: Recipe, generator: torch.Generator) -> Iterator[_Cut]:
    together = _union(scene)
    whole = whole_window(together)
    picture, mask, inside = cut(scene.image, together, whole, base.resolution)
    yield _Cut(tuple(range(len(scene.objects))), "", picture, _loss_weights(base, mask, inside, recipe))
    for index, one in enumerate(scene.objects):
        natural = _natural_fill(one.mask, whole)
        helps = recipe.zoom > 0 and (natural < _SMALL or len(scene.objects) > 1)
        for _ in range(recipe.view_pool - 1 if helps else 0):
            window = _zoomed_window(one.mask, natural, generator)
            picture, mask, inside = cut(scene.image, one.mask, window, base.resolution)
            # A prompt that names this object alone must not be taught what the others look like.
            others = _union(scene, without=one)
            inside = inside * (1 - cut(scene.image, others, window, base.resolution)[1])
            context, outside = "", 0.0
            if float(torch.rand((), generator=generator)) < recipe.backdrop:
                colour = list(BACKDROPS)[int(torch.randint(len(BACKDROPS), (), generator=generator))]
                context, outside = f" on a {colour} background", recipe.outside_weight
                picture, inside = _on_backdrop(picture, mask, BACKDROPS[colour]), np.ones_like(inside)
            yield _Cut((index,), context, picture, _loss_weights(base, mask, inside, recipe, outside))


def _union(scene: Scene, without: SceneObject | None = None) -> np.ndarray:
    """(H, W): the masks of a scene's objects in one, empty if there are none."""
    union = np.zeros_like(scene.objects[0].mask)
    for one in scene.objects:
        if one is not without:
            union = np.maximum(union, one.mask)
    return union


def _natural_fill(mask: np.ndarray, whole: Window) -> float:
    """The object's longer edge in parts of the whole picture's."""
    left, top, right, bottom = bounding_box(mask)
    return max(right - left, bottom - top) / whole.side


def _zoomed_window(mask: np.ndarray, natural: float, generator: torch.Generator) -> Window:
    """A window on the object, from its size in the whole picture to the usual size of things in pictures."""
    natural = min(natural, _LARGEST_FILL)
    u, x, y = torch.rand(3, generator=generator).tolist()
    return object_window(mask, natural + (_LARGEST_FILL - natural) * u, (2 * x - 1, 2 * y - 1))


def _on_backdrop(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    share = mask[..., None]
    blended: np.ndarray = picture * share + np.array(colour, np.float32) * (1 - share)
    return np.round(blended).astype(np.uint8)


def _loss_weights(
    base: Base, mask: np.ndarray, inside: np.ndarray, recipe: Recipe, outside_weight: float = 0.0
) -> Tensor:
    """(h, h) weights of one view's loss; nothing is learned from outside of the picture."""
    size = base.latent_size
    within = latent_mask(torch.from_numpy(inside)[None], size)[0]
    if not recipe.masked:
        return within
    objects = latent_mask(torch.from_numpy(mask)[None], size, soft=recipe.soft_mask)[0]
    return objects.clamp(min=outside_weight) * within
