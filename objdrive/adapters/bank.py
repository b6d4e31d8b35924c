"""AdapterBank: many LoRAs in one forward pass of one frozen network, for training and for sampling."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from objdrive.adapters.layers import LoraLayer, find_layers
from objdrive.errors import ObjdriveError


class _Kind:
    """The layers of one kind, linear ones or convolutions, and where their weights lie in a bank's rows.

    Args:
        layers: of that kind.
        start: of their weights: first every layer's A, then every layer's B.
    """

    def __init__(self, layers: Sequence[LoraLayer], start: int) -> None:
        self.layers = layers
        self._sizes = [layer.sizes[place] for place in (0, 1) for layer in layers]
        self.columns = slice(start, start + sum(self._sizes))

    def places(self, rows: Tensor) -> "Iterator[tuple[LoraLayer, tuple[Tensor, Tensor]]]":
        """Each layer, and where its A and B lie in its own columns of rows (..., P)."""
        parts = rows.split(self._sizes, dim=-1)
        return zip(self.layers, zip(parts[: len(self.layers)], parts[len(self.layers) :], strict=True), strict=True)

    def downs(self) -> Tensor:
        """For each column whether it belongs to an A."""
        count = sum(self._sizes[: len(self.layers)])
        return torch.arange(sum(self._sizes)) < count


class _Weights:
    """The weights of the runs of a batch, in the network's type.

    Args:
        rows: (runs, K, P).
        ranks: (runs, K, 2), all of the rank of each run's slots, and its least.
        linear: where those of linear layers are.
        convolutions: where those of convolutions are, which take them sample by sample.
    """

    def __init__(self, rows: Tensor, ranks: Tensor, linear: _Kind, convolutions: _Kind) -> None:
        self._runs = len(rows)
        self._ranks = ranks
        self._linear = {layer.name: places for layer, places in linear.places(rows[..., linear.columns])}
        self._rows = rows[..., convolutions.columns]
        self._kind = convolutions
        self._samples = 0
        self._maps: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, layer: LoraLayer, samples: int) -> tuple[Tensor, Tensor]:
        """A and B of a layer, as `LoraLayer.add` takes them for so many samples.

        Raises:
            ValueError: they are no multiple of the runs.
        """
        each = self._each(samples)
        if not layer.is_convolution:
            return self._linear[layer.name]
        if self._samples != samples:
            rows = self._rows if each == 1 else self._rows.repeat_interleave(each, dim=0)
            self._maps = {layer.name: places for layer, places in self._kind.places(rows)}
            self._samples = samples
        return self._maps[layer.name]

    def acting(self, rank: int, timesteps: Tensor, count: int) -> Tensor:
        """(N, K rank), 1 for what acts of each sample's ranks at its timestep (N,), else 0, in the weights' type."""
        ranks = self._ranks.repeat_interleave(self._each(len(timesteps)), dim=0)
        kept = kept_rank(ranks[..., 0], ranks[..., 1], timesteps[:, None], count)
        acts = torch.arange(rank, device=kept.device) < kept[..., None]
        return acts.flatten(1).to(self._rows.dtype)

    def _each(self, samples: int) -> int:
        if samples % self._runs:
            raise ValueError(f"a batch of {samples} does not split into {self._runs} equal runs")
        return samples // self._runs


@dataclass(frozen=True)
class _Adapted:
    """What a batch is adapted by: `acts` (N, K rank) says what acts of each sample's ranks; None: all of them."""

    weights: _Weights
    acts: Tensor | None


class AdapterBank:
    """Stacked LoRA layers: slot k of every stack belongs to one adapter (LoRA: arXiv 2106.09685).

    While `active`, a batch is taken as equal contiguous runs of samples, and each target layer adds
    ``sum_k scale_k B[slot_k] A[slot_k] x`` over the run's slots, for all runs as one batched matrix product. Outside
    of `active` the network is the plain base. A slot's rank may depend on the timestep (`kept_rank`).

    Args:
        network: the frozen network; its weights and state dict stay untouched.
        targets: ends of the names of the linear and convolution layers that get LoRA.
        slots: how many adapters it holds.
        rank: rank of each.

    Attributes:
        values: (slots, P), all weights of all layers in one float32 tensor, a slot a row (`LoraLayer` says in
            which order). What runs over all weights runs over it at once.
    """

    def __init__(self, network: nn.Module, targets: Sequence[str], *, slots: int, rank: int) -> None:
        weight = next(network.parameters())
        self.slots = slots
        self.rank = rank
        layers = find_layers(network, targets, rank)
        self._layers = {layer.name: layer for layer in layers}
        self._linear = _Kind([layer for layer in layers if not layer.is_convolution], 0)
        self._convolutions = _Kind([layer for layer in layers if layer.is_convolution], self._linear.columns.stop)
        self._dtype = weight.dtype
        self.values = nn.Parameter(torch.zeros(slots, self._convolutions.columns.stop, device=weight.device))
        self._varying: set[int] = set()
        """Slots whose rank depends on the timestep."""
        self._ranks = torch.full((slots, 2), rank, device=weight.device)
        """(slots, 2), all of each slot's rank, and its least. On the device, so that no step waits for an upload."""
        self._adapted: _Adapted | None = None
        self._last: tuple[object, _Weights] | None = None
        """What was last chosen to draw with, and what for."""
        self._hooks: list[RemovableHandle] = [
            layer.layer.register_forward_hook(self._adding(layer)) for layer in self._layers.values()
        ]

    def close(self) -> None:
        """Take the bank off the network."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> "AdapterBank":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def initialise(self, slot: int, generator: torch.Generator, *, least_rank: int | None = None) -> None:
        """Start a slot as LoRA does: A uniform in ±1/sqrt(in), B zero, from the CPU `generator` alone.

        Args:
            slot: which.
            generator: of the values.
            least_rank: see `load`.
        """
        lora = {}
        for name, layer in self._layers.items():
            bound = 1 / math.sqrt(math.prod(layer.inside))
            lora[f"{name}.lora_A.weight"] = (
                torch.rand(self.rank, *layer.inside, generator=generator) * 2 * bound - bound
            )
        self._set_least_rank(slot, self.rank, least_rank)
        self._write(slot, lora)

    def check(self, lora: Mapping[str, Tensor]) -> None:
        """Raise ObjdriveError if `load` would: a layer that the network lacks, or shapes that do not fit it."""
        unknown = {key.rsplit(".lora_", 1)[0] for key in lora} - self._layers.keys()
        if unknown:
            raise ObjdriveError(f"the adapter has layers that the base lacks, such as {sorted(unknown)[0]!r}")
        for name, layer in self._layers.items():
            if f"{name}.lora_A.weight" in lora:
                layer.check(lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"])

    def load(self, slot: int, lora: Mapping[str, Tensor], *, least_rank: int | None = None) -> None:
        """Put an adapter's layers into a slot, in one copy; a smaller rank is padded with zeros.

        Args:
            slot: where.
            lora: ``<layer>.lora_A.weight`` (rank, in) and ``<layer>.lora_B.weight`` (out, rank), of a convolution
                (rank, in, kh, kw) and (out, rank, 1, 1); layers that the adapter does not have add nothing.
            least_rank: how much of its rank acts at the noisiest timestep; None: all of it at all timesteps.

        Raises:
            ObjdriveError: a layer that this network lacks, or shapes that do not fit it.
        """
        self.check(lora)
        most = max((weight.shape[0] for name, weight in lora.items() if name.endswith(".lora_A.weight")), default=0)
        self._set_least_rank(slot, most, least_rank)
        self._write(slot, lora)

    def export(self, slot: int) -> dict[str, Tensor]:
        """Copy a slot out, in the naming of `load`, on the CPU."""
        places = dict(self._places(self.values[slot].detach().cpu()))
        lora: dict[str, Tensor] = {}
        for layer in self._layers.values():
            down, up = layer.read(*places[layer])
            lora |= {f"{layer.name}.lora_A.weight": down, f"{layer.name}.lora_B.weight": up}
        return lora

    @contextmanager
    def active(
        self, runs: Sequence[int | Mapping[int, float]], timesteps: tuple[Tensor, int] | None = None
    ) -> Iterator[None]:
        """Let the network's batches be ``len(runs)`` equal contiguous runs, each adapted as it says.

        Weights are brought into the network's type here, once for all its layers. Without gradients, the last choice is
        kept until another one is asked for or weights change.

        Args:
            runs: for each run a slot, or any number of slots with their scales, whose deltas are summed.
            timesteps: (N,) of each sample of the batch, on the network's device, and how many there are at all; slots
                with a least rank need them.

        Raises:
            ValueError: there are none, and a slot needs them; or they do not split into the runs.
        """
        with self._adapting(self._chosen(runs, timesteps)):
            yield

    def as_now(self) -> AbstractContextManager[None]:
        """Adapt, whenever the context is entered, as at the time of this call."""
        return self._adapting(self._adapted)

    @contextmanager
    def _adapting(self, adapted: _Adapted | None) -> Iterator[None]:
        previous, self._adapted = self._adapted, adapted
        try:
            yield
        finally:
            self._adapted = previous

    def rank_varies(self, slots: Iterable[int]) -> bool:
        """Whether the rank of some of these slots depends on the timestep."""
        return not self._varying.isdisjoint(slots)

    def _set_least_rank(self, slot: int, rank: int, least_rank: int | None) -> None:
        self._varying.discard(slot)
        kept = (self.rank, self.rank)
        if least_rank is not None:
            self._varying.add(slot)
            kept = (rank, least_rank)
        self._ranks[slot] = self._tensor(kept)

    def _write(self, slot: int, lora: Mapping[str, Tensor]) -> None:
        row = torch.zeros(self.values.shape[1])
        for layer, places in self._places(row):
            layer.write(*places, lora.get(f"{layer.name}.lora_A.weight"), lora.get(f"{layer.name}.lora_B.weight"))
        with torch.no_grad():
            self.values[slot] = row.to(self.values.device)

    def _places(self, row: Tensor) -> list[tuple[LoraLayer, tuple[Tensor, Tensor]]]:
        """Each layer, and where its A and B lie in a row (P,)."""
        return [each for kind in (self._linear, self._convolutions) for each in kind.places(row[kind.columns])]

    def _chosen(
        self, runs: Sequence[int | Mapping[int, float]], timesteps: tuple[Tensor, int] | None
    ) -> _Adapted | None:
        mixes = [{run: 1.0} if isinstance(run, int) else dict(run) for run in runs]
        if self.rank == 0 or not any(mixes):
            self._last = None
            return None
        varies = self.rank_varies(slot for mix in mixes for slot in mix)
        if varies and timesteps is None:
            raise ValueError("the rank of some slots depends on the timestep: pass timesteps")
        weights = self._selected(mixes)
        return _Adapted(weights, weights.acting(self.rank, *timesteps) if varies and timesteps else None)

    def _selected(self, mixes: Sequence[Mapping[int, float]]) -> _Weights:
        if torch.is_grad_enabled():
            return self._select(mixes)
        asked = ([list(mix.items()) for mix in mixes], self.values._version)
        if self._last is None or self._last[0] != asked:
            self._last = None
            self._last = asked, self._select(mixes)
        return self._last[1]

    def _select(self, mixes: Sequence[Mapping[int, float]]) -> _Weights:
        """The runs' weights, in the network's type."""
        if mixes == [{slot: 1.0} for slot in range(self.slots)]:
            # The whole bank in order is what training uses.
            rows, ranks = self.values[:, None], self._ranks[:, None]
        else:
            most = max(len(mix) for mix in mixes)
            padded = [[*mix.items(), *[(0, 0.0)] * (most - len(mix))] for mix in mixes]
            slots = self._tensor([[slot for slot, _ in row] for row in padded])
            rows, ranks = self.values[slots], self._ranks[slots]
            scales = [[scale for _, scale in row] for row in padded]
            if any(scale != 1 for row in scales for scale in row):
                downs = torch.cat([kind.downs() for kind in (self._linear, self._convolutions)]).to(rows.device)
                rows = rows * torch.where(downs, self._tensor(scales)[..., None], 1.0)
        return _Weights(rows.to(self._dtype), ranks, self._linear, self._convolutions)

    def _tensor(self, rows: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor(rows, device=self.values.device)

    def _adding(self, layer: LoraLayer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._adapted is None:
                return output
            down, up = self._adapted.weights.of(layer, len(inputs[0]))
            return layer.add(output, inputs[0], down, up, self._adapted.acts)

        return add


def kept_rank(rank: Tensor, least: Tensor, timestep: Tensor, count: int) -> Tensor:
    """``floor((r - r_min) (T - t) / T) + r_min``: how much of a LoRA's rank acts at a timestep (arXiv 2507.05964).

    Args:
        rank: all of it, r: whole numbers, as all of these, of shapes that broadcast.
        least: what acts at the noisiest timestep, r_min.
        timestep: t.
        count: of all timesteps, T.
    """
    return (rank - least) * (count - timestep) // count + least
