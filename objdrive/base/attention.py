"""Where a network looks for each word of a prompt: maps of cross-attention."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WIDEST = 16
"""Edge of the maps that tell things apart best (arXiv 2208.01626, 2301.13826); wider ones show texture."""


class AttentionMaps:
    """What `watch_attention` has seen: queries and keys of each cross-attention layer of one forward pass."""

    def __init__(self) -> None:
        self._latents: tuple[int, int] = (0, 0)
        self._queries: dict[str, Tensor] = {}
        self._keys: dict[str, tuple[Tensor, int]] = {}

    def of_row(self, row: int) -> Tensor:
        """(L, e, f): where a row of the batch attends to each of its L tokens; a place's shares add up to 1.

        The mean over heads and over the layers with the widest maps of at most 16 x 16 places, or as many.
        """
        places = {name: query.shape[1] for name, query in self._queries.items()}
        widest = max((count for count in places.values() if count <= _WIDEST**2), default=min(places.values()))
        maps = [self._shares(name, row) for name, count in places.items() if count == widest]
        found: Tensor = torch.stack(maps).mean(dim=0).T.unflatten(1, _grid(widest, *self._latents))
        return found

    def _shares(self, name: str, row: int) -> Tensor:
        """(places, L), the mean over heads."""
        keys, heads = self._keys[name]
        query, key = (x[row].float().unflatten(-1, (heads, -1)).transpose(0, 1) for x in (self._queries[name], keys))
        shares: Tensor = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=0)
        return shares

    def watch(self, name: str, layer: Any) -> Iterator[Any]:
        """Hooks on one layer, as `watch_attention` holds them."""
        yield layer.to_q.register_forward_hook(self._keep_queries(name))
        yield layer.to_k.register_forward_hook(self._keep_keys(name, layer.heads))

    def note_latents(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A hook before the network's forward pass."""
        self._latents = inputs[0].shape[-2:]

    def _keep_queries(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._queries[name] = output

        return keep

    def _keep_keys(self, name: str, heads: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._keys[name] = output, heads

        return keep


def _grid(places: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a map of so many places of latents that a network halves, rounding up."""
    while height * width > places:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return height, width


@contextmanager
def watch_attention(network: nn.Module) -> Iterator[AttentionMaps]:
    """Note the cross-attention of the forward pass inside of the block, in diffusers' layers ``attn2``."""
    maps = AttentionMaps()
    hooks = [network.register_forward_pre_hook(maps.note_latents)]
    hooks += [
        hook for name, layer in network.named_modules() if name.endswith(".attn2") for hook in maps.watch(name, layer)
    ]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
