"""AdapterBank: many LoRAs in one forward pass of one frozen network, for training and for sampling."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from objdrive.errors import ObjdriveError

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""Linear layers of a diffusers transformer block that get LoRA: attention and feed-forward."""


class AdapterBank:
    """Stacked LoRA layers: slot k of every stack belongs to one adapter (LoRA: arXiv 2106.09685).

    While `active`, a batch is taken as equal contiguous runs of samples, one slot a run, and each target layer adds
    ``B[slot] A[slot] x`` as one batched matrix product. Outside of `active` the network is the plain base.

    Args:
        network: the frozen network; its weights and state dict stay untouched.
        slots: how many adapters it holds.
        rank: rank of each.
    """

    def __init__(self, network: nn.Module, *, slots: int, rank: int) -> None:
        weight = next(network.parameters())
        self.slots = slots
        self.rank = rank
        self.down: dict[str, nn.Parameter] = {}
        self.up: dict[str, nn.Parameter] = {}
        self._runs: Tensor | slice | None = None
        self._hooks: list[RemovableHandle] = []
        for name, layer in _target_layers(network):
            self.down[name] = nn.Parameter(torch.zeros(slots, rank, layer.in_features, device=weight.device))
            self.up[name] = nn.Parameter(torch.zeros(slots, layer.out_features, rank, device=weight.device))
            self._hooks.append(layer.register_forward_hook(self._adding(name)))

    def close(self) -> None:
        """Take the bank off the network."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> "AdapterBank":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def parameters(self) -> list[nn.Parameter]:
        """All stacks, each (slots, ...), in a fixed order."""
        return [*self.down.values(), *self.up.values()]

    def initialise(self, slot: int, generator: torch.Generator) -> None:
        """Start a slot as LoRA does: A uniform in ±1/sqrt(in), B zero, from the CPU `generator` alone."""
        with torch.no_grad():
            for down, up in zip(self.down.values(), self.up.values(), strict=True):
                bound = 1 / math.sqrt(down.shape[-1])
                start = torch.rand(down.shape[1:], generator=generator) * 2 * bound - bound
                down[slot] = start.to(down.device)
                up[slot] = 0

    def load(self, slot: int, lora: Mapping[str, Tensor]) -> None:
        """Put an adapter's layers into a slot; a smaller rank is padded with zeros.

        Args:
            slot: where.
            lora: ``<layer>.lora_A.weight`` (rank, in) and ``<layer>.lora_B.weight`` (out, rank); layers that the
                adapter does not have add nothing.

        Raises:
            ObjdriveError: a layer that this network lacks, or shapes that do not fit it.
        """
        unknown = {key.rsplit(".lora_", 1)[0] for key in lora} - self.down.keys()
        if unknown:
            raise ObjdriveError(f"the adapter has layers that the base lacks, such as {sorted(unknown)[0]!r}")
        with torch.no_grad():
            for name, down in self.down.items():
                up = self.up[name]
                down[slot], up[slot] = 0, 0
                if f"{name}.lora_A.weight" in lora:
                    _copy_padded(down[slot], lora[f"{name}.lora_A.weight"], name)
                    _copy_padded(up[slot].T, lora[f"{name}.lora_B.weight"].T, name)

    def export(self, slot: int) -> dict[str, Tensor]:
        """Copy a slot out, in the naming of `load`, on the CPU."""
        lora = {}
        for name, down in self.down.items():
            lora[f"{name}.lora_A.weight"] = down[slot].detach().cpu().clone()
            lora[f"{name}.lora_B.weight"] = self.up[name][slot].detach().cpu().clone()
        return lora

    @contextmanager
    def active(self, slots: Sequence[int]) -> Iterator[None]:
        """Let the network's batches be ``len(slots)`` equal contiguous runs, adapted by these slots in this order."""
        previous, self._runs = self._runs, self._index(slots)
        try:
            yield
        finally:
            self._runs = previous

    def _index(self, slots: Sequence[int]) -> Tensor | slice:
        # The whole bank in order is what training uses; a slice spares it a copy of every layer.
        if list(slots) == list(range(self.slots)):
            return slice(None)
        return torch.tensor(list(slots), device=next(iter(self.down.values())).device)

    def _adding(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._runs is None:
                return output
            return _add_lora(output, inputs[0], self.down[name][self._runs], self.up[name][self._runs])

        return add


def _add_lora(output: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`output` (N, ..., out) + LoRA of x (N, ..., in) by `down` (G, r, in) and `up` (G, out, r), N a multiple of G."""
    runs = down.shape[0]
    if x.shape[0] % runs:
        raise ValueError(f"a batch of {x.shape[0]} does not split into {runs} equal runs")
    hidden = torch.bmm(x.reshape(runs, -1, x.shape[-1]), down.to(x.dtype).transpose(1, 2))
    flat = output.reshape(runs, -1, output.shape[-1])
    return torch.baddbmm(flat, hidden, up.to(x.dtype).transpose(1, 2)).view_as(output)


def _target_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(tuple(f".{target}" for target in LORA_TARGETS)):
            yield name, layer


def _copy_padded(place: Tensor, weight: Tensor, name: str) -> None:
    """Copy `weight` (r, width) into the first r rows of `place` (rank, width)."""
    rank, width = place.shape
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] > rank:
        raise ObjdriveError(
            f"layer {name!r}: weights of shape {tuple(weight.shape)} do not fit rank {rank} and width {width}"
        )
    place[: weight.shape[0]] = weight
