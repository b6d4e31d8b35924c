"""The ruler: fidelity, generalization, identity and context of drawn pictures, by one encoder.

Fidelity and generalization are what DreamBooth (arXiv 2208.12242) and arXiv 2401.15708 report: cosines of CLIP or
DINO features between picture and reference, and between picture and text. Cosines say little about small pictures of
drawn things, so that two recognitions come beside them: is the object the nearest of all designs, and is the prompt
the nearest of its kind.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from objdrive.evaluation.encoders import Encoder
from objdrive.evaluation.prompts import EvaluationPrompt
from objdrive.evaluation.reference import Gallery, Reference
from objdrive.evaluation.scores import Array, best_match, unit
from objdrive.pictures import as_pixels

WINDOWS = ((0.0, 0.0, 1.0), (0.1, 0.1, 0.8), (0.2, 0.2, 0.6), (0.0, 0.2, 0.6), (0.4, 0.2, 0.6))
"""Where an object may be in a drawn picture: (left, top, side) in parts of its edge; the first is all of it."""
_SIDES = {"left": 3, "right": 4}
"""Of `WINDOWS`, those that show the two sides."""
_CHUNK = 8
"""Inputs of an encoder at once: on a processor the maps of 64 pictures take twice the time of eight times eight."""


@dataclass(frozen=True)
class Asked:
    """What a picture was drawn for."""

    object_id: str
    prompt_id: str


@dataclass(frozen=True)
class Score:
    """One picture, measured; what cannot be told is None.

    Attributes:
        whole: fidelity, cosine of the picture and the object's photo.
        object: fidelity, cosine of the part of the picture and the view of the object that agree most.
        text: generalization, cosine of the picture and the prompt with the class word (encoders that read text).
        identity_class: 1 if the nearest of all designs of the object's class is the object, else 0.
        identity_all: 1 if the nearest of all objects is the object, else 0.
        context: 1 if the nearest of all prompts of its kind is the picture's own, else 0; of a prompt that asks for a
            side, 1 if the object's views agree more with that side of the picture than with the other, else 0.
        features: (D,) of the whole picture, of unit length, which tell objects.
    """

    whole: float
    object: float
    text: float | None
    identity_class: float | None
    identity_all: float | None
    context: float | None
    features: Array


METRICS = tuple(field.name for field in fields(Score) if field.name != "features")


@dataclass(frozen=True)
class _Known:
    """What an encoder makes of a reference; unit length."""

    class_name: str
    whole: Array
    views: Array
    alone: Array


class Ruler:
    """Measures pictures by one encoder; holds features only, so that it can be sent to where the pictures are."""

    def __init__(
        self,
        encoder: Encoder,
        references: Iterable[Reference],
        prompts: Sequence[EvaluationPrompt],
        gallery: Gallery | None = None,
    ) -> None:
        """Look at the references once.

        Args:
            encoder: what to measure by.
            references: the objects, with ids of their own.
            prompts: what pictures are asked for.
            gallery: designs to tell objects from; without one they are told from each other, by their photos.

        Raises:
            ObjdriveError: the gallery lacks an object or a prompt.
        """
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._kinds = {p.id: [q.id for q in prompts if q.kind == p.kind] for p in prompts}
        self._known = {one.object_id: _know(encoder, one) for one in references}
        self._texts: dict[tuple[str, str], Array] = {}
        if encoder.reads_text:
            self._texts = _read(encoder, {one.class_name for one in self._known.values()}, prompts)
        self._gallery = gallery
        if gallery is not None:
            gallery.check(self._known, self._prompts)

    def measure(self, encoder: Encoder, pixels: Tensor, asked: Sequence[Asked]) -> list[Score]:
        """Score pictures (N, 3, R, R) in [0, 1], by the encoder that the ruler was made with."""
        objects, backdrops = embed(encoder, cut_windows(pixels))
        windows = objects.reshape(len(pixels), len(WINDOWS), -1)
        wholes = backdrops[:: len(WINDOWS)]
        return [self._score(parts, whole, one) for parts, whole, one in zip(windows, wholes, asked, strict=True)]

    def _score(self, windows: Array, backdrop: Array, asked: Asked) -> Score:
        known = self._known[asked.object_id]
        text = self._texts.get((known.class_name, asked.prompt_id))
        return Score(
            whole=float(windows[0] @ known.whole),
            object=float(best_match(windows, known.views)),
            text=None if text is None else float(windows[0] @ text),
            identity_class=_is_nearest(asked.object_id, self._rivals(windows, asked, known.class_name)),
            identity_all=_is_nearest(asked.object_id, self._rivals(windows, asked)),
            context=self._context(windows, backdrop, asked),
            features=windows[0],
        )

    def _context(self, windows: Array, backdrop: Array, asked: Asked) -> float | None:
        shows = self._prompts[asked.prompt_id].shows
        if not (shows and shows.side):
            return _is_nearest(asked.prompt_id, self._contexts(backdrop, asked))
        views = self._known[asked.object_id].views
        sides = {side: float(best_match(windows[[index]], views)) for side, index in _SIDES.items()}
        return _is_nearest(shows.side, sides)

    def _rivals(self, windows: Array, asked: Asked, class_name: str | None = None) -> dict[str, float]:
        """How near the designs of a class are, or all objects, by object id or, for what is no object, by name."""
        if self._gallery is None:
            return {
                one: float(best_match(windows, known.alone))
                for one, known in self._known.items()
                if class_name in (None, known.class_name)
            }
        column = self._gallery.prompts.index(asked.prompt_id)
        nearness = self._gallery.objects[:, column] @ windows[0]
        return {
            design.object_id or f"design:{design.name}": float(value)
            for design, value in zip(self._gallery.designs, nearness, strict=True)
            if (design.object_id if class_name is None else design.class_name == class_name)
        }

    def _contexts(self, backdrop: Array, asked: Asked) -> dict[str, float]:
        """How near the prompts of the asked one's kind are: as texts if the encoder reads them, else as pictures."""
        kind = self._kinds[asked.prompt_id]
        if self._texts:
            word = self._known[asked.object_id].class_name
            return {prompt: float(backdrop @ self._texts[word, prompt]) for prompt in kind}
        if self._gallery is None:
            return {}
        row = self._gallery.backdrops[self._gallery.row(asked.object_id)]
        return {prompt: float(backdrop @ row[self._gallery.prompts.index(prompt)]) for prompt in kind}


def _is_nearest(right: str, nearness: Mapping[str, float]) -> float | None:
    """Whether the right one is nearest: 1 or 0, and None where there is nothing to choose from."""
    if len(nearness) < 2:
        return None
    return float(max(nearness, key=lambda one: nearness[one]) == right)


def cut_windows(pixels: Tensor, windows: Sequence[tuple[float, float, float]] = WINDOWS) -> Tensor:
    """(N * W, 3, R, R): W windows (left, top, side) of pictures (N, 3, R, R), at their size."""
    edge = pixels.shape[-1]
    cuts = []
    for left, top, side in windows:
        x, y, size = (round(value * edge) for value in (left, top, side))
        part = pixels[..., y : y + size, x : x + size]
        cuts.append(part if size == edge else F.interpolate(part, size=(edge, edge), mode="bicubic").clamp(0, 1))
    return torch.stack(cuts, dim=1).flatten(0, 1)


def embed(encoder: Encoder, pixels: Tensor) -> tuple[Array, Array]:
    """Features of pictures (N, 3, R, R) in [0, 1], of unit length.

    Returns:
        (N, W), which tell objects, and (N, V), which tell backdrops and styles; the same if the encoder has but one
        kind.
    """
    features: Array = torch.cat([encoder.images(some) for some in pixels.split(_CHUNK)]).float().cpu().numpy()
    width = encoder.object_width
    if width is None:
        whole = unit(features)
        return whole, whole
    return unit(features[:, :width]), unit(features[:, width:])


def _know(encoder: Encoder, reference: Reference) -> _Known:
    views = np.stack([reference.whole, reference.crop, *reference.alone])
    features, _ = embed(encoder, as_pixels(views))
    return _Known(reference.class_name, features[0], features[1:], features[2:])


def _read(
    encoder: Encoder, class_names: Iterable[str], prompts: Sequence[EvaluationPrompt]
) -> dict[tuple[str, str], Array]:
    """Features of every prompt with every class word, by class word and prompt id."""
    keys = [(word, prompt.id) for word in sorted(class_names) for prompt in prompts]
    texts = [prompt.naming(word) for word in sorted(class_names) for prompt in prompts]
    parts = [
        encoder.texts(texts[first : first + _CHUNK]).float().cpu().numpy() for first in range(0, len(texts), _CHUNK)
    ]
    return dict(zip(keys, unit(np.concatenate(parts)), strict=True))
