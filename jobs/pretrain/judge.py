"""Figures of a base, by a judge that knows nothing of it: a classifier on ImageNet features of composed scenes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from jobs.pretrain.augment import varied
from jobs.pretrain.clip import retrieval
from jobs.pretrain.contexts import CONTEXTS
from jobs.pretrain.pictures import grid
from jobs.pretrain.scenes import ComposedScene, Composer, Mix, with_article
from jobs.pretrain.sprites import Sprites
from jobs.pretrain.vae import psnr
from objdrive.base.stable_diffusion import Base
from objdrive.evaluation.imagenet import ImageNetEncoder
from objdrive.pictures import as_pixels
from objdrive.sampling.sampler import SampleSpec, draw_pictures

GUIDANCE = 4.0
_TAUGHT = Mix(pair=0, style=0, tint=0, word_alone=0, no_context=0, stretched=0.5)
_RETRIEVED_AMONG = 128
_CHUNK = 64
_GRID = (20, 10)
_ALIKE = 6


@dataclass(frozen=True)
class SampleSizes:
    """How much is composed and drawn.

    Attributes:
        taught: scenes of each class that the classifier learns from.
        judged: scenes of held-out drawings, for the autoencoder and CLIP, and as many for the classifier.
        drawn: pictures of each class, each in another context.
        steps: DDIM steps of each picture.
    """

    taught: int = 180
    judged: int = 1024
    drawn: int = 12
    steps: int = 25

    @property
    def drawing(self) -> dict[str, Any]:
        """How every request is drawn."""
        return {"steps": self.steps, "guidance_scale": GUIDANCE}


class BaseJudge:
    """Tells class and context of a picture, by two linear layers on ImageNet features.

    It learns from scenes of the training drawings, stretched and varied (`augment`): what a base draws is neither as
    sharp as what a composer pastes nor of one drawing's proportions. No base has a part in it.
    """

    def __init__(self, sprites: Sprites, resolution: int, sizes: SampleSizes, *, seed: int = 0) -> None:
        """Compose the scenes and learn from them."""
        self._encoder = ImageNetEncoder()
        rng = np.random.default_rng((seed, 0))
        composer = Composer(sprites.only("train"), resolution, _TAUGHT)
        scenes = _balanced(composer, rng, range(len(sprites.classes)), sizes.taught)
        features = self.features(as_pixels(np.stack([varied(scene.pixels, rng) for scene in scenes])))
        self._mean, self._deviation = features.mean(dim=0), features.std(dim=0) + 1e-3
        known = self._scaled(features)
        self._class = _fit(known, torch.tensor([scene.label for scene in scenes]), len(sprites.classes))
        self._context = _fit(known, torch.tensor([scene.context for scene in scenes]), len(CONTEXTS))

    def features(self, pictures: Tensor) -> Tensor:
        """(N, 2464) ImageNet features of pictures (N, 3, n, n) in [0, 1]."""
        return torch.cat([self._encoder.of_all_depths(some) for some in pictures.split(_CHUNK)])

    def accuracy(self, features: Tensor, labels: Sequence[int], contexts: Sequence[int]) -> tuple[float, float]:
        """Part of some pictures, by their features, whose class and whose context are recognised."""
        known = self._scaled(features)
        right = self._class(known).argmax(dim=1) == torch.tensor(labels)
        placed = self._context(known).argmax(dim=1) == torch.tensor(contexts)
        return float(right.float().mean()), float(placed.float().mean())

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self._mean) / self._deviation


def _balanced(composer: Composer, rng: np.random.Generator, labels: Sequence[int], each: int) -> list[ComposedScene]:
    """`each` scenes of every class, over all contexts in turn."""
    wanted = [(label, (label + turn) % len(CONTEXTS)) for turn in range(each) for label in labels]
    return [composer.compose(rng, label=label, context=context) for label, context in wanted]


def _fit(features: Tensor, labels: Tensor, count: int) -> nn.Linear:
    """Multinomial logistic regression with a little weight decay."""
    layer = nn.Linear(features.shape[1], count)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(features), labels) + 2e-3 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer.requires_grad_(False)


def diversity(features: Tensor) -> float:
    """Mean cosine distance between features (G, K, d) of K pictures of each of G prompts."""
    unit = F.normalize(features, dim=2)
    alike = unit @ unit.transpose(1, 2)
    count = features.shape[1]
    others = alike.sum(dim=(1, 2)) - count
    return float(1 - (others / (count * (count - 1))).mean())


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures of every class in some contexts, by prompts or as composed scenes."""

    pictures: Tensor
    labels: list[int]
    contexts: list[int]


def draw(base: Base, classes: Sequence[str], sizes: SampleSizes) -> LabelledPictures:
    """Pictures that a base draws: each class in some contexts, by turns."""
    names = list(CONTEXTS)
    # Steps of a few contexts, so that the contexts come up equally often over all classes.
    wanted = [
        (label, (5 * label + 7 * turn) % len(names)) for turn in range(sizes.drawn) for label in range(len(classes))
    ]
    requests = [
        SampleSpec(f"a photo of {with_article(classes[label])} {names[context]}", seed, **sizes.drawing)
        for seed, (label, context) in enumerate(wanted)
    ]
    labels, contexts = zip(*wanted, strict=True)
    return LabelledPictures(_draw(base, requests), list(labels), list(contexts))


def draw_alike(base: Base, classes: Sequence[str], sizes: SampleSizes) -> Tensor:
    """(G, K, 3, n, n): several pictures of each of a dozen prompts, which differ in their noise alone."""
    words = classes[:: max(1, len(classes) // 12)][:12]
    names = list(CONTEXTS)
    requests = [
        SampleSpec(f"a photo of {with_article(word)} {names[(3 * turn) % len(names)]}", 1000 + seed, **sizes.drawing)
        for turn, word in enumerate(words)
        for seed in range(_ALIKE)
    ]
    pictures = _draw(base, requests)
    return pictures.view(len(words), _ALIKE, *pictures.shape[1:])


def _draw(base: Base, requests: list[SampleSpec]) -> Tensor:
    return as_pixels(np.stack([np.asarray(picture) for picture in draw_pictures(base, requests)]))


@dataclass(frozen=True)
class SceneSet:
    """Scenes, the same for every base."""

    pixels: Tensor
    captions: list[str]
    labels: list[int]
    contexts: list[int]
    plain: list[bool]

    @classmethod
    def compose(cls, sprites: Sprites, use: str, resolution: int, count: int, *, seed: int = 1) -> "SceneSet":
        """Mixed as the training scenes are, but of the drawings of another use, or of another seed."""
        composer = Composer(sprites.only(use), resolution)
        scenes = [composer.compose(np.random.default_rng((seed, number))) for number in range(count)]
        return cls(
            as_pixels(np.stack([scene.pixels for scene in scenes])),
            [scene.caption for scene in scenes],
            [scene.label for scene in scenes],
            [scene.context for scene in scenes],
            [scene.plain for scene in scenes],
        )


def reconstruction(base: Base, pixels: Tensor) -> float:
    """PSNR in dB of pictures through the base's autoencoder and back, the mean over pictures."""
    made = [base.decode_latents(base.encode_latents(some)) for some in pixels.split(_CHUNK)]
    return float(psnr(torch.cat(made), pixels).mean())


def matched(base: Base, held: SceneSet) -> float:
    """Part of the held-out scenes whose own caption is the nearest among 128 in the base's CLIP space."""
    texts = [base.embed_text([base.tokenize(caption)]) for caption in held.captions]
    images = [base.encode_images(some) for some in held.pixels.split(_CHUNK)]
    unit = F.normalize(torch.cat(images), dim=1), F.normalize(torch.cat(texts), dim=1)
    return retrieval(*unit, _RETRIEVED_AMONG)


def sheet(drawn: LabelledPictures, zoom: int = 2) -> Image.Image:
    """The first 200 pictures, 10 rows of 20."""
    columns, rows = _GRID
    return grid(drawn.pictures[: columns * rows], columns, zoom=zoom)
