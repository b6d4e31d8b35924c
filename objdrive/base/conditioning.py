"""Conditioning: what a text encoding is on its way from text encoder to network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """How a picture came about, as bases that were trained on crops are told (arXiv 2307.01952, section 2.2).

    Attributes:
        original: height and width of the picture before it was scaled: what is small was blurred by that.
        corner: top and left of what was cut out of the scaled picture; (0, 0): nothing was cut off there.
        target: height and width of what was cut out, and is drawn.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]

    @classmethod
    def whole(cls, height: int, width: int) -> "Frame":
        """Of a picture that is neither scaled nor cropped."""
        return cls((height, width), (0, 0), (height, width))

    @property
    def ids(self) -> tuple[int, ...]:
        """The six numbers, in the network's order."""
        return (*self.original, *self.corner, *self.target)


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, as a base's network takes them. Nothing outside of `objdrive.base` looks into it.

    It is handled like a tensor of prompts: whatever is before a prompt's own axes are batch axes, and all parts share
    them. Indexing, stacking and the like act on batch axes alone.

    Attributes:
        states: (..., L, d), hidden states for cross-attention.
        pooled: (..., D), pooled states, where a family's network takes them.
        time_ids: (..., 6), sizes and crop of the picture, where a family's network takes them (arXiv 2307.01952).
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    @classmethod
    def stack(cls, parts: "Sequence[Conditioning]") -> "Conditioning":
        """One more batch axis, in front."""
        return cls._joined(parts, torch.stack)

    @classmethod
    def cat(cls, parts: "Sequence[Conditioning]", dim: int = 0) -> "Conditioning":
        """One after the other along the batch axis `dim`, counted from the front."""
        return cls._joined(parts, lambda tensors: torch.cat(tensors, dim=dim))

    def __len__(self) -> int:
        """Size of the first batch axis."""
        return len(self.states)

    def __getitem__(self, index: Any) -> "Conditioning":
        """Some of the prompts, by anything that indexes a tensor's batch axes."""
        return self._mapped(lambda part: part[index])

    def expand(self, count: int) -> "Conditioning":
        """A batch of one prompt, `count` times, without a copy."""
        return self._mapped(lambda part: part.expand(count, *part.shape[1:]))

    def flatten(self) -> "Conditioning":
        """The first two batch axes as one."""
        return self._mapped(lambda part: part.flatten(0, 1))

    def to(self, target: torch.device | torch.dtype | str) -> "Conditioning":
        """The same on another device or in another type."""
        return self._mapped(lambda part: part.to(target))

    @property
    def told(self) -> dict[str, Tensor]:
        """What the network is told besides the states, by diffusers' names; nothing in most families."""
        if self.pooled is None or self.time_ids is None:
            return {}
        return {"text_embeds": self.pooled, "time_ids": self.time_ids}

    def framed(self, frames: Sequence[Frame]) -> "Conditioning":
        """The same prompts for pictures of these frames, one for each along all batch axes, where frames count."""
        if self.time_ids is None:
            return self
        ids = torch.tensor([frame.ids for frame in frames], dtype=torch.float32, device=self.time_ids.device)
        return replace(self, time_ids=ids.view_as(self.time_ids))

    def framed_as(self, other: "Conditioning") -> "Conditioning":
        """The same prompts for the pictures that those of `other` are for."""
        return replace(self, time_ids=other.time_ids)

    def as_leaf(self) -> "Conditioning":
        """The same values, cut off from how they were computed, with gradients of their own."""
        return self._mapped(lambda part: part.detach().requires_grad_(True))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        pooled, time_ids = (None if part is None else change(part) for part in (self.pooled, self.time_ids))
        return Conditioning(change(self.states), pooled, time_ids)

    @classmethod
    def _joined(cls, parts: "Sequence[Conditioning]", join: Callable[[list[Tensor]], Tensor]) -> "Conditioning":
        def joined(tensors: list[Tensor | None]) -> Tensor | None:
            there = [tensor for tensor in tensors if tensor is not None]
            if len(there) not in (0, len(tensors)):
                raise ValueError("conditionings of different families do not go together")
            return join(there) if there else None

        return cls(
            join([part.states for part in parts]),
            joined([part.pooled for part in parts]),
            joined([part.time_ids for part in parts]),
        )
