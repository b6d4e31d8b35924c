"""What the steps of a group take, some steps ahead: drawn and uploaded together, with the base's own predictions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from objdrive.base.conditioning import Conditioning
from objdrive.base.stable_diffusion import Base
from objdrive.training.material import SceneMaterial, StepSamples
from objdrive.training.recipe import Recipe

_AT_ONCE = 24
"""Samples that the base alone predicts in one forward pass, unless one step has more: enough to keep a device busy."""
_USUAL_EDGE = 512
"""Of larger pictures there are as many fewer as they have more pixels."""


@dataclass(frozen=True)
class StepInputs:
    """What one step of K scenes takes, on the base's device: S samples of each, first V views, then the kept ones.

    Attributes:
        noised: (K, S, C, h, h), what the network sees.
        timesteps: (K, S).
        target: (K, S, C, h, h), what it should predict for the object-specific loss.
        expected: (K, S, C, h, h), what it should predict for the regularization.
        importance: (K, S), what each sample's loss counts.
        weights: (K, V, 1, h, h), what each place counts in the object-specific loss.
        ids: (N, L), the views' distinct prompts.
        learned: (N, L), which learned embedding, of all scenes' in order, stands in each place; -1: none.
        prompt_rows: (K, V), each view's prompt.
        asked: encoded prompts that the base was asked with, on batch axes (K, S), for the samples' pictures.
    """

    noised: Tensor
    timesteps: Tensor
    target: Tensor
    expected: Tensor
    importance: Tensor
    weights: Tensor
    ids: Tensor
    learned: Tensor
    prompt_rows: Tensor
    asked: Conditioning


class GroupMaterial:
    """The material of K scenes in common tables on the base's device.

    Args:
        base: the frozen base.
        scenes: their material.
        objects: places for learned embeddings that each scene has.
        recipe: which samples there are.
    """

    def __init__(self, base: Base, scenes: Sequence[SceneMaterial], objects: int, recipe: Recipe) -> None:
        self._base = base
        self._scenes = scenes
        self._objects = objects
        self._recipe = recipe
        self._at_once = _AT_ONCE * _USUAL_EDGE**2 // max(_USUAL_EDGE, base.resolution) ** 2
        self._latents, self._first_latents = _table([scene.latents for scene in scenes])
        self._weights, self._first_weights = _table([scene.weights for scene in scenes])
        self._prompts = Conditioning.cat([scene.prompts for scene in scenes])
        self._first_prompts = _starts([len(scene.prompts) for scene in scenes])
        # Views of one object all have the step's one prompt.
        self._prompts_each = 1 if all(len(scene.phrases) == 1 for scene in scenes) else recipe.views

    def steps(self) -> Iterator[StepInputs]:
        """The inputs of all steps. Scenes draw from their own generators alone, so it matters not how far ahead."""
        per_step = len(self._scenes) * (self._recipe.views + self._kept)
        ahead = max(1, self._at_once // per_step)
        for first in range(0, self._recipe.steps, ahead):
            yield from self._draw(min(ahead, self._recipe.steps - first))

    @property
    def _kept(self) -> int:
        return self._recipe.class_samples if self._recipe.ccr_weight else 0

    def _draw(self, steps: int) -> Iterator[StepInputs]:
        by_scene = [[scene.next_samples(self._recipe) for _ in range(steps)] for scene in self._scenes]
        drawn = list(zip(*by_scene, strict=True))
        views = slice(None, self._recipe.views)
        samples = self._rows([[one.samples for one in step] for step in drawn], self._first_latents)
        seen = self._rows([[one.samples[views] for one in step] for step in drawn], self._first_weights)
        asked = self._rows([[one.prompts for one in step] for step in drawn], self._first_prompts)
        noise = self._upload(torch.stack([torch.stack([one.noise for one in step]) for step in drawn]))
        timesteps = self._upload(torch.stack([torch.stack([one.timesteps for one in step]) for step in drawn]))
        ids, learned = (self._upload(part) for part in self._tokens(drawn))
        rows = self._upload(torch.arange(len(self._scenes) * self._prompts_each).view(-1, self._prompts_each))
        rows = rows.expand(-1, self._recipe.views)
        process = self._base.noise
        frames = [
            scene.frames[row]
            for step in drawn
            for scene, one in zip(self._scenes, step, strict=True)
            for row in one.samples
        ]
        clean, prompts = self._latents[samples], self._prompts[asked].framed(frames)
        noised, target = process.add_noise(clean, noise, timesteps), process.target(clean, noise, timesteps)
        expected = self._expected(noised, timesteps, prompts, target)
        importance = process.loss_weights(timesteps, self._recipe.timesteps)
        weights = self._weights[seen]
        for step in range(steps):
            yield StepInputs(
                noised[step], timesteps[step], target[step], expected[step], importance[step], weights[step],
                ids[step], learned[step], rows, prompts[step],
            )  # fmt: skip

    @torch.no_grad()
    def _expected(self, noised: Tensor, timesteps: Tensor, prompts: Conditioning, target: Tensor) -> Tensor:
        """What the regularization keeps: the base's own predictions, of as many samples at once as suit a device."""
        recipe = self._recipe
        if recipe.ccr_weight == 0 or recipe.ccr_target == "noise":
            return target
        # Without the background, what the base makes of the views is of no use.
        asked = (slice(None), slice(None), slice(None if recipe.ccr_background else recipe.views, None))
        flat, times = noised[asked].flatten(0, 2), timesteps[asked].flatten()
        texts = prompts[asked].flatten().flatten()
        predicted = [
            self._base.predict(flat[part], times[part], texts[part])
            for part in _parts(len(flat), max(self._at_once, noised.shape[1] * noised.shape[2]))
        ]
        expected = target.clone()
        expected[asked] = torch.cat(predicted).view_as(expected[asked])
        return expected

    def _tokens(self, drawn: Sequence[Sequence[StepSamples]]) -> tuple[Tensor, Tensor]:
        """(steps, N, L) ids, and which learned embedding stands in each place."""
        prompts, learned = [], []
        for step in drawn:
            for slot, (scene, one) in enumerate(zip(self._scenes, step, strict=True)):
                for text, shown in list(zip(one.texts, one.shown, strict=True))[: self._prompts_each]:
                    prompt = scene.tokenized(self._base, text)
                    places = torch.full((self._base.tokenizer.model_max_length,), -1)
                    places[list(prompt.places)] = torch.tensor([slot * self._objects + index for index in shown])
                    prompts.append(prompt)
                    learned.append(places)
        ids = self._base.padded(prompts)
        return ids.unflatten(0, (len(drawn), -1)), torch.stack(learned).unflatten(0, (len(drawn), -1))

    def _rows(self, rows: Sequence[Sequence[Sequence[int]]], first: Tensor) -> Tensor:
        """(steps, K, ...) rows of a common table, of each scene's rows in its own."""
        return self._upload(torch.tensor(rows) + first[:, None])

    def _upload(self, tensor: Tensor) -> Tensor:
        """The same on the device. Work that runs there is not waited for."""
        if self._base.device.type != "cuda":
            return tensor.to(self._base.device)
        return tensor.pin_memory().to(self._base.device, non_blocking=True)


def _table(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All rows, and where each part begins."""
    return torch.cat(list(parts)), _starts([len(part) for part in parts])


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0))[:-1])


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))
