"""AdapterBank: many LoRAs in one forward pass of one frozen network, for training and for sampling."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from objdrive.errors import ObjdriveError


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
    """

    def __init__(self, network: nn.Module, targets: Sequence[str], *, slots: int, rank: int) -> None:
        weight = next(network.parameters())
        self.slots = slots
        self.rank = rank
        self.down: dict[str, nn.Parameter] = {}
        self.up: dict[str, nn.Parameter] = {}
        self._varying: dict[int, tuple[int, int]] = {}
        """Slots whose rank depends on the timestep: all of their rank, and its least."""
        self._runs: _Runs | slice | None = None
        self._hooks: list[RemovableHandle] = []
        for name, layer in _target_layers(network, targets):
            out, *inside = layer.weight.shape
            self.down[name] = nn.Parameter(torch.zeros(slots, rank, *inside, device=weight.device))
            self.up[name] = nn.Parameter(torch.zeros(slots, out, rank, device=weight.device))
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

    def initialise(self, slot: int, generator: torch.Generator, *, least_rank: int | None = None) -> None:
        """Start a slot as LoRA does: A uniform in ±1/sqrt(in), B zero, from the CPU `generator` alone.

        Args:
            slot: which.
            generator: of the values.
            least_rank: see `load`.
        """
        self._set_least_rank(slot, self.rank, least_rank)
        with torch.no_grad():
            for down, up in zip(self.down.values(), self.up.values(), strict=True):
                bound = 1 / math.sqrt(math.prod(down.shape[2:]))
                start = torch.rand(down.shape[1:], generator=generator) * 2 * bound - bound
                down[slot] = start.to(down.device)
                up[slot] = 0

    def check(self, lora: Mapping[str, Tensor]) -> None:
        """Raise ObjdriveError if `load` would: a layer that the network lacks, or shapes that do not fit it."""
        unknown = {key.rsplit(".lora_", 1)[0] for key in lora} - self.down.keys()
        if unknown:
            raise ObjdriveError(f"the adapter has layers that the base lacks, such as {sorted(unknown)[0]!r}")
        for name, down in self.down.items():
            if f"{name}.lora_A.weight" in lora:
                _check_fits(down[0], lora[f"{name}.lora_A.weight"], name)
                _check_fits(self.up[name][0].T, _as_matrix(lora[f"{name}.lora_B.weight"]).T, name)

    def load(self, slot: int, lora: Mapping[str, Tensor], *, least_rank: int | None = None) -> None:
        """Put an adapter's layers into a slot; a smaller rank is padded with zeros.

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
        with torch.no_grad():
            for name, down in self.down.items():
                _fill(down[slot], lora.get(f"{name}.lora_A.weight"))
                up = lora.get(f"{name}.lora_B.weight")
                _fill(self.up[name][slot].T, None if up is None else _as_matrix(up).T)

    def export(self, slot: int) -> dict[str, Tensor]:
        """Copy a slot out, in the naming of `load`, on the CPU."""
        lora = {}
        for name, down in self.down.items():
            lora[f"{name}.lora_A.weight"] = down[slot].detach().cpu().clone()
            up = self.up[name][slot].detach().cpu().clone()
            # A convolution's is one with a kernel of one place.
            lora[f"{name}.lora_B.weight"] = up[..., None, None] if down[slot].dim() == 4 else up
        return lora

    @contextmanager
    def active(
        self, runs: Sequence[int | Mapping[int, float]], timesteps: tuple[Sequence[int], int] | None = None
    ) -> Iterator[None]:
        """Let the network's batches be ``len(runs)`` equal contiguous runs, each adapted as it says.

        Args:
            runs: for each run a slot, or any number of slots with their scales, whose deltas are summed.
            timesteps: of each run, and how many there are at all; slots with a least rank need them.

        Raises:
            ValueError: there are none, and a slot needs them.
        """
        with self._adapting(self._index(runs, timesteps)):
            yield

    def as_now(self) -> AbstractContextManager[None]:
        """Adapt, whenever the context is entered, as at the time of this call."""
        return self._adapting(self._runs)

    @contextmanager
    def _adapting(self, runs: "_Runs | slice | None") -> Iterator[None]:
        previous, self._runs = self._runs, runs
        try:
            yield
        finally:
            self._runs = previous

    def rank_varies(self, slots: Iterable[int]) -> bool:
        """Whether the rank of some of these slots depends on the timestep."""
        return not self._varying.keys().isdisjoint(slots)

    def _set_least_rank(self, slot: int, rank: int, least_rank: int | None) -> None:
        self._varying.pop(slot, None)
        if least_rank is not None:
            self._varying[slot] = rank, least_rank

    def _index(
        self, runs: Sequence[int | Mapping[int, float]], timesteps: tuple[Sequence[int], int] | None
    ) -> "_Runs | slice | None":
        mixes = [{run: 1.0} if isinstance(run, int) else run for run in runs]
        varies = self.rank_varies(slot for mix in mixes for slot in mix)
        # The whole bank in order is what training uses; a slice spares it a copy of every layer.
        if list(runs) == list(range(self.slots)) and not varies:
            return slice(None)
        if not any(mixes):
            return None
        kept = None
        if varies:
            if timesteps is None:
                raise ValueError("the rank of some slots depends on the timestep: pass timesteps")
            each, count = timesteps
            kept = [self._kept_ranks(mix, timestep, count) for mix, timestep in zip(mixes, each, strict=True)]
        return _Runs.of(mixes, kept, self.rank, next(iter(self.down.values())).device)

    def _kept_ranks(self, slots: Iterable[int], timestep: int, count: int) -> list[int]:
        return [
            kept_rank(*self._varying[slot], timestep, count) if slot in self._varying else self.rank for slot in slots
        ]

    def _adding(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._runs is None or self.rank == 0:
                return output
            down: Tensor = self.down[name]
            up: Tensor = self.up[name]
            if isinstance(self._runs, _Runs):
                down, up = self._runs.select(down, up)
            x = inputs[0]
            if len(x) % len(down):
                raise ValueError(f"a batch of {len(x)} does not split into {len(down)} equal runs")
            if isinstance(layer, nn.Conv2d):
                return _add_conv_lora(layer, output, x, down, up)
            return _add_lora(output, x, down, up)

        return add


def kept_rank(rank: int, least: int, timestep: int, count: int) -> int:
    """``floor((r - r_min) (T - t) / T) + r_min``: how much of a LoRA's rank acts at a timestep (arXiv 2507.05964).

    Args:
        rank: all of it, r.
        least: what acts at the noisiest timestep, r_min.
        timestep: t.
        count: of all timesteps, T.
    """
    return (rank - least) * (count - timestep) // count + least


@dataclass(frozen=True)
class _Runs:
    """Which slots adapt each of R runs, K the most that any run has.

    Attributes:
        slots: (R, K).
        scales: (R, K, r or 1), by which their ranks count.
    """

    slots: Tensor
    scales: Tensor

    @classmethod
    def of(
        cls,
        mixes: Sequence[Mapping[int, float]],
        kept_ranks: Sequence[Sequence[int]] | None,
        rank: int,
        device: torch.device,
    ) -> "_Runs":
        most = max(len(mix) for mix in mixes)
        padded = [[*mix.items(), *[(0, 0.0)] * (most - len(mix))] for mix in mixes]
        slots = torch.tensor([[slot for slot, _ in row] for row in padded], device=device)
        scales = torch.tensor([[[scale] for _, scale in row] for row in padded], device=device)
        if kept_ranks is not None:
            kept = torch.tensor([[*row, *[0] * (most - len(row))] for row in kept_ranks], device=device)
            scales = scales * (torch.arange(rank, device=device) < kept[..., None])
        return cls(slots, scales)

    def select(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The runs' own (R, K r, in) and (R, out, K r) of all slots' `down` and `up`: deltas are summed by stacking."""
        runs = len(self.slots)
        a = down[self.slots].flatten(3) * self.scales[..., None]
        b = up[self.slots].transpose(1, 2)
        return a.reshape(runs, -1, *down.shape[2:]), b.reshape(runs, b.shape[1], -1)


def _add_lora(output: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`output` (N, ..., out) + LoRA of x (N, ..., in) by `down` (G, r, in) and `up` (G, out, r), N a multiple of G."""
    runs = down.shape[0]
    hidden = torch.bmm(x.reshape(runs, -1, x.shape[-1]), down.to(x.dtype).transpose(1, 2))
    flat = output.reshape(runs, -1, output.shape[-1])
    return torch.baddbmm(flat, hidden, up.to(x.dtype).transpose(1, 2)).view_as(output)


def _add_conv_lora(layer: nn.Conv2d, output: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """As `_add_lora`, of maps (N, in, h, w) by `down` (G, r, in, kh, kw), at the layer's stride and padding."""
    runs, rank = down.shape[:2]
    # Side by side as channels, each run meets its own kernels.
    side = x.unflatten(0, (runs, -1)).transpose(0, 1).flatten(1, 2)
    hidden = F.conv2d(side, down.to(x.dtype).flatten(0, 1), stride=layer.stride, padding=layer.padding, groups=runs)
    hidden = hidden.unflatten(1, (runs, rank)).transpose(0, 1).flatten(3)
    delta: Tensor = up.to(x.dtype)[:, None] @ hidden
    return output + delta.flatten(0, 1).view_as(output)


def _as_matrix(up: Tensor) -> Tensor:
    return up.flatten(1) if up.dim() == 4 and up.shape[2:].numel() == 1 else up


def _target_layers(network: nn.Module, targets: Sequence[str]) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    ends = tuple(f".{target}" for target in targets)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(ends):
            yield name, layer


def _check_fits(place: Tensor, weight: Tensor, name: str) -> None:
    rank, *inside = place.shape
    if list(weight.shape[1:]) != inside or weight.shape[0] > rank:
        raise ObjdriveError(
            f"layer {name!r}: weights of shape {tuple(weight.shape)} do not fit rank {rank} and width "
            + "x".join(map(str, inside))
        )


def _fill(place: Tensor, weight: Tensor | None) -> None:
    """Copy `weight` (r, ...) into the first r rows of `place` (rank, ...), zeros below."""
    rank = 0 if weight is None else weight.shape[0]
    if weight is not None:
        place[:rank] = weight
    place[rank:] = 0
