"""Encoders to judge pictures by, each under a name: CLIP, DINO, a network of ImageNet, or the base's own CLIP."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModel, CLIPModel, CLIPTokenizer
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from objdrive.base.stable_diffusion import Base, prepare_pixels
from objdrive.errors import ObjdriveError
from objdrive.evaluation.imagenet import ImageNetEncoder

KINDS = ("clip", "clip:ID", "dino:ID", "imagenet")
"""The names that `load_encoder` knows; ID is a hub id or a folder."""

_DINO_EDGE = 224


class Encoder(Protocol):
    """Turns pictures, and texts if it reads any, into features that are alike where their meanings are.

    Attributes:
        reads_text: whether it does.
        object_width: how many of its features, the first ones, tell objects; the others tell backdrops and styles.
            None: all of them tell both.
    """

    reads_text: bool
    object_width: int | None

    def images(self, pixels: Tensor) -> Tensor:
        """(N, D) features of pictures (N, 3, H, H) in [0, 1]."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) features of texts, in the space of the pictures'."""


def load_encoder(name: str, *, base: str, clip: str | None = None, device: str = "cpu") -> Encoder:
    """Load an encoder by name.

    Args:
        name: ``clip``, the base's own CLIP; ``clip:ID`` or ``dino:ID``, a model of transformers by its hub id or
            folder; ``imagenet``, see `objdrive.imagenet`, which has a part in no base.
        base: the base that ``clip`` means.
        clip: see `objdrive.base.files.find_base`.
        device: where to put it.

    Raises:
        ObjdriveError: no such kind of encoder, or the model cannot be had.
    """
    kind, _, source = name.partition(":")
    if name == "clip":
        return BaseClip(Base.load(base, clip=clip, device=device, dtype=torch.float32))
    if name == "imagenet":
        return _ImageNet(device)
    makers: dict[str, Callable[[str, str], Encoder]] = {"clip": _Clip, "dino": _Dino}
    if kind not in makers or not source:
        raise ObjdriveError(f"no encoder {name!r}: name one of {', '.join(KINDS)}, ID being a hub id or a folder")
    try:
        return makers[kind](source, device)
    except (OSError, ValueError) as error:
        raise ObjdriveError(f"the encoder {name!r} cannot be had: {error}") from error


def identify(name: str, base_fingerprint: str) -> str:
    """What tells two encoders apart: the name, and the base's fingerprint where the name means the base's CLIP."""
    return f"{name}@{base_fingerprint}" if name == "clip" else name


class _WithoutText:
    reads_text = False
    object_width: int | None = None

    def texts(self, texts: Sequence[str]) -> Tensor:
        raise ObjdriveError(f"this encoder reads no text: {texts[0]!r}")


class BaseClip:
    """A base's own CLIP as an encoder; see `Encoder`."""

    reads_text = True
    object_width: int | None = None

    def __init__(self, base: Base) -> None:
        self._base = base

    def images(self, pixels: Tensor) -> Tensor:
        """See `Encoder.images`."""
        return self._base.encode_images(pixels.to(self._base.device))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """See `Encoder.texts`."""
        return self._base.embed_text([self._base.tokenize(text) for text in texts])


class _ImageNet(_WithoutText):
    object_width: int | None = ImageNetEncoder.width

    def __init__(self, device: str) -> None:
        self._network = ImageNetEncoder(device)

    def images(self, pixels: Tensor) -> Tensor:
        return self._network.of_all_depths(pixels)


class _Clip:
    reads_text = True
    object_width: int | None = None

    def __init__(self, source: str, device: str) -> None:
        self._device = device
        self._model: Any = CLIPModel.from_pretrained(source).to(device).eval().requires_grad_(False)
        self._tokenizer = CLIPTokenizer.from_pretrained(source)
        self._edge = int(self._model.config.vision_config.image_size)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        prepared = prepare_pixels(pixels.to(self._device), self._edge, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        pooled = self._model.vision_model(prepared).pooler_output
        features: Tensor = self._model.visual_projection(pooled)
        return features

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        longest = self._model.config.text_config.max_position_embeddings
        read = self._tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        pooled = self._model.text_model(**read.to(self._device)).pooler_output
        features: Tensor = self._model.text_projection(pooled)
        return features


class _Dino(_WithoutText):
    """The class token of the last layer, as DreamBooth's DINO score takes it (arXiv 2208.12242)."""

    def __init__(self, source: str, device: str) -> None:
        self._device = device
        self._model: Any = AutoModel.from_pretrained(source).to(device).eval().requires_grad_(False)
        # DINOv2's configs name 518 pixels, but it is used at 224 as the first version is.
        self._edge = min(int(self._model.config.image_size), _DINO_EDGE)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        prepared = prepare_pixels(pixels.to(self._device), self._edge, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        features: Tensor = self._model(pixel_values=prepared).last_hidden_state[:, 0]
        return features
