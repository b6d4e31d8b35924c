"""Training views: squares cut from a scene's one picture, encoded once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from objdrive.base.conditioning import Frame
from objdrive.base.stable_diffusion import Base
from objdrive.catalog.geometry import Window, close_window, cut, object_alone, object_window, placed_window
from objdrive.catalog.masks import mend_mask
from objdrive.pictures import as_pixels
from objdrive.seeds import seed_of
from objdrive.training.losses import latent_mask
from objdrive.training.recipe import Recipe

# As large as things usually are in pictures of them: what is shown larger here is drawn larger than prompts ask for.
_USUAL_FILL = 0.6
# A network that normalises over the whole picture learns colours relative to the ground's, so it is grey; and what is
# as grey as one of these stands out from the other.
_GROUNDS = (64, 192)
# Not to the very edge of a view, where a picture's border is learned with the object.
_REACH = 0.8


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
    mended: bool = False
    """Whether its masks have been mended (`with_mended_masks`)."""


@dataclass(frozen=True)
class View:
    """A square cut of the picture, encoded.

    Attributes:
        shown: indices of the objects that it shows.
        latents: (C, h, h).
        weights: (1, h, h), how much each place counts in the object-specific loss.
        frame: how it came about.
    """

    shown: tuple[int, ...]
    latents: Tensor
    weights: Tensor
    frame: Frame


@dataclass(frozen=True)
class _Cut:
    """A view before encoding: pixels (R, R, 3) uint8, weights (h, h)."""

    shown: tuple[int, ...]
    picture: np.ndarray
    weights: Tensor
    frame: Frame


def with_mended_masks(scene: Scene) -> Scene:
    """The scene with masks that follow its picture. A mask that does so already stays as it is (`mend_mask`)."""
    if scene.mended:
        return scene
    objects = []
    for one in scene.objects:
        others = [other for other in scene.objects if other is not one]
        mask = mend_mask(scene.image, one.mask, _together(others) if others else None)
        objects.append(replace(one, mask=mask))
    return replace(scene, objects=tuple(objects), mended=True)


def make_views(base: Base, scene: Scene, recipe: Recipe) -> list[View]:
    """Cut and encode views of a scene: its picture, and with `zoom` each of several objects close up and alone.

    The picture is cropped if the objects are small in it (`least_fill`): they are shown at a size that the latents can
    hold. With `plain_ground`, and in close-ups, what is around them is grey: a view on dark grey, and one on light.
    With `placements` they are shown at so many places and sizes, so that no one layout is learned with them; every
    other pair of these views is `mirrored`.
    """
    cuts = list(_cuts(base, scene, recipe))
    # Large pictures go through the autoencoder one by one: its activations are the largest of all.
    batch = max(1, 512**2 // base.resolution**2)
    pixels = to_pixels(base, [one.picture for one in cuts])
    latents = torch.cat([base.encode_latents(part) for part in pixels.split(batch)])
    return [
        View(one.shown, z, one.weights[None].to(base.device), one.frame) for one, z in zip(cuts, latents, strict=True)
    ]


def main_picture(base: Base, scene: Scene, recipe: Recipe) -> np.ndarray:
    """(R, R, 3) uint8: the photo, as a square with all objects in it, cropped if they are small (`least_fill`)."""
    together = _together(scene.objects)
    return cut(scene.image, together, close_window(together, recipe.least_fill), base.resolution)[0]


def to_pixels(base: Base, pictures: Sequence[np.ndarray]) -> Tensor:
    """(N, 3, R, R) in [0, 1] on the base's device, of N pictures (R, R, 3) uint8."""
    return as_pixels(np.stack(pictures)).to(base.device)


def _cuts(base: Base, scene: Scene, recipe: Recipe) -> Iterator[_Cut]:
    everything = tuple(range(len(scene.objects)))
    if recipe.placements > 1:
        yield from _placed_views(base, scene, everything, recipe)
    else:
        window = close_window(_together(scene.objects), recipe.least_fill)
        yield from _cut_views(base, scene, everything, window, recipe, _GROUNDS if recipe.plain_ground else ())
    if recipe.zoom == 0 or len(scene.objects) == 1:
        return
    for index in everything:
        # On a plain ground in any case: a prompt that names this object alone must not be taught what the others look
        # like, and it is enough that they are seen, whatever their weight in the loss.
        if recipe.placements > 1:
            yield from _placed_views(base, scene, (index,), recipe)
        else:
            close = object_window(scene.objects[index].mask, _USUAL_FILL)
            yield from _cut_views(base, scene, (index,), close, recipe, _GROUNDS)


def _placed_views(base: Base, scene: Scene, shown: tuple[int, ...], recipe: Recipe) -> Iterator[_Cut]:
    """Views of some objects on greys, by turns, each at a place and size of its own."""
    mask = _alone(scene, shown)
    rng = np.random.default_rng(seed_of(f"{recipe.seed}:{scene.key}:{shown}"))
    for number in range(recipe.placements):
        fill = rng.uniform(recipe.least_placed_fill, recipe.most_placed_fill)
        across, down = _REACH * rng.uniform(-1, 1, size=2)
        window = placed_window(mask, fill, across, down)
        turned = recipe.mirrored and number // len(_GROUNDS) % 2
        for view in _cut_views(base, scene, shown, window, recipe, [_GROUNDS[number % len(_GROUNDS)]]):
            yield _mirrored(view) if turned else view


def _mirrored(view: _Cut) -> _Cut:
    return replace(view, picture=view.picture[:, ::-1], weights=view.weights.flip(-1))


def _cut_views(
    base: Base, scene: Scene, shown: tuple[int, ...], window: Window, recipe: Recipe, grounds: Sequence[int]
) -> Iterator[_Cut]:
    """A view on each of the greys `grounds`; on the photo's own ground if there are none."""
    mask = _alone(scene, shown)
    picture, seen, inside = cut(scene.image, mask, window, base.resolution)
    weights = _loss_weights(base, seen, inside, recipe)
    on_grey = [object_alone(scene.image, mask, base.resolution, ground, window=window) for ground in grounds]
    frame = cut_frame(window, mask.shape, base.resolution, whole=bool(grounds))
    for view in on_grey or [picture]:
        yield _Cut(shown, view, weights, frame)


def cut_frame(window: Window, photo: tuple[int, ...], edge: int, *, whole: bool) -> Frame:
    """How a view came about, so that a crop is not learned as a photo, nor what is small in its photo as sharp.

    Args:
        window: what it shows of the photo.
        photo: height and width of that.
        edge: of the view in pixels.
        whole: nothing is cut off: the object stands on a plain ground as in a picture of its own, of which the window's
            pixels are the original. Else the photo is the original, and the view a crop of it.
    """
    if whole:
        side = max(1, round(window.side))
        return Frame((side, side), (0, 0), (edge, edge))
    scale = edge / window.side
    top, left = (max(0, round(start * scale)) for start in (window.top, window.left))
    return Frame((photo[0], photo[1]), (top, left), (edge, edge))


def _alone(scene: Scene, shown: tuple[int, ...]) -> np.ndarray:
    """(H, W): the mask of some objects, without what others cover."""
    mask = _together([scene.objects[index] for index in shown])
    others = [one for index, one in enumerate(scene.objects) if index not in shown]
    return mask * (1 - _together(others)) if others else mask


def _together(objects: Sequence[SceneObject]) -> np.ndarray:
    """(H, W): the masks of objects in one."""
    union: np.ndarray = np.maximum.reduce([one.mask for one in objects])
    return union


def _loss_weights(base: Base, mask: np.ndarray, inside: np.ndarray, recipe: Recipe) -> Tensor:
    """(h, h) weights of one view's loss; nothing is learned from outside of the picture."""
    size = base.latent_size
    within = latent_mask(torch.from_numpy(inside)[None], size)[0]
    if not recipe.masked:
        return within
    return latent_mask(torch.from_numpy(mask)[None], size, soft=recipe.soft_mask)[0] * within
