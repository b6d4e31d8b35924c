"""One layer with LoRA: how its weights lie in a bank, and what they add to the layer's output (arXiv 2106.09685)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objdrive.errors import ObjdriveError


@dataclass(frozen=True)
class LoraLayer:
    """A target layer and the shapes of its LoRA.

    A bank keeps weights in the order in which products take them and gradients leave them, so that neither is copied:
    A (rank, in) of a linear layer as (in, rank), of a convolution (rank, in, kh, kw) as (rank, kh, kw, in) with the
    kernel turned by half a circle (`_add_to_maps` says why), and B (out, rank) as (rank, out).

    Attributes:
        name: of the layer in its network.
        layer: itself.
        rank: of its LoRA.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    rank: int

    @property
    def out(self) -> int:
        """Width of the output."""
        return int(self.layer.weight.shape[0])

    @property
    def inside(self) -> tuple[int, ...]:
        """(in,), of a convolution (in, kh, kw)."""
        return tuple(self.layer.weight.shape[1:])

    @property
    def sizes(self) -> tuple[int, int]:
        """How many values A and B have."""
        return self.rank * self.layer.weight[0].numel(), self.rank * self.out

    @property
    def is_convolution(self) -> bool:
        """Whether it takes maps (N, in, h, w), else (N, ..., in)."""
        return isinstance(self.layer, nn.Conv2d)

    def check(self, down: Tensor, up: Tensor) -> None:
        """Raise ObjdriveError if A (r, in, ...) and B (out, r, ...) do not fit the layer."""
        _check_fits(self.rank, self.inside, down, self.name)
        _check_fits(self.rank, (self.out,), _as_matrix(up).T, self.name)

    def write(self, down_at: Tensor, up_at: Tensor, down: Tensor | None, up: Tensor | None) -> None:
        """Put A and B of a rank up to its own in their places in a bank; what is left of the rank becomes zero."""
        down_at.zero_()
        up_at.zero_()
        if down is not None:
            turned = down.movedim(1, -1).flip(1, 2) if self.is_convolution else down
            self._down_rows(down_at)[: len(down)] = turned.to(down_at.device)
        if up is not None:
            matrix = _as_matrix(up).T
            up_at.view(self.rank, self.out)[: len(matrix)] = matrix.to(up_at.device)

    def read(self, down_at: Tensor, up_at: Tensor) -> tuple[Tensor, Tensor]:
        """A and B on the CPU, copied from their places in a bank, in the shapes of files."""
        down, up = self._down_rows(down_at.detach().cpu()), up_at.detach().cpu().view(self.rank, self.out).T
        if self.is_convolution:
            # A convolution's B is one with a kernel of one place.
            return down.flip(1, 2).movedim(-1, 1).contiguous(), up[..., None, None].clone()
        return down.clone(), up.clone()

    def add(self, output: Tensor, x: Tensor, down: Tensor, up: Tensor, acts: Tensor | None = None) -> Tensor:
        """The layer's output, with LoRA.

        Args:
            output: of the layer for x, N of them.
            x: N inputs, equal contiguous runs of samples.
            down: (runs, K, A's values) in a bank's order; the deltas of a run's K adapters are summed. A convolution
                takes every sample for a run.
            up: (runs, K, B's values).
            acts: (N, K rank), by what each sample's ranks count; None: all by 1.
        """
        up = up.unflatten(2, (self.rank, self.out)).flatten(1, 2)
        if isinstance(self.layer, nn.Conv2d):
            return _add_to_maps(self.layer, output, x, down.unflatten(2, (self.rank, -1)).flatten(1, 2), up, acts)
        down = down.unflatten(2, (-1, self.rank)).transpose(1, 2).flatten(2)
        runs = len(down)
        hidden = torch.bmm(x.reshape(runs, -1, x.shape[-1]), down)
        if acts is not None:
            # A weight that does not act would be copied for every sample; what it yields is r numbers a place.
            hidden = (hidden.view(len(x), -1, acts.shape[1]) * acts[:, None]).view_as(hidden)
        return torch.baddbmm(output.reshape(runs, -1, self.out), hidden, up).view_as(output)

    def _down_rows(self, down_at: Tensor) -> Tensor:
        """A's place as (rank, in), of a convolution (rank, kh, kw, in), without a copy."""
        if self.is_convolution:
            inside, *kernel = self.inside
            return down_at.view(self.rank, *kernel, inside)
        return down_at.view(self.inside[0], self.rank).T


def find_layers(network: nn.Module, targets: Sequence[str], rank: int) -> list[LoraLayer]:
    """The linear and convolution layers whose names end as one of `targets`."""
    ends = tuple(f".{target}" for target in targets)
    return [
        LoraLayer(name, layer, rank)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(ends)
    ]


def _add_to_maps(layer: nn.Conv2d, output: Tensor, x: Tensor, down: Tensor, up: Tensor, acts: Tensor | None) -> Tensor:
    """`output` (N, out, ...) + LoRA of maps x (N, in, h, w), by `down` (N, r, kh kw in), `up` (N, r, out), `acts`.

    First every place is multiplied by the kernel of every offset, then products are summed where they belong: the
    adjoint of unfolding, which takes the kernel turned. Only r channels are unfolded that way, not all that come in.
    """
    kernel, padding = layer.kernel_size, [int(pad) for pad in layer.padding]
    a, places = down.unflatten(2, (-1, layer.in_channels)).flatten(1, 2), x.flatten(2)
    # By the maps' own layout: neither they nor their sum are copied, and gradients have it too.
    last = x.is_contiguous(memory_format=torch.channels_last)
    hidden = torch.bmm(places.mT, a.mT).mT if last else torch.bmm(a, places)
    if max(kernel) > 1:
        size = tuple(edge + 2 * pad - width + 1 for edge, pad, width in zip(x.shape[2:], padding, kernel, strict=True))
        turned = tuple(width - 1 - pad for width, pad in zip(kernel, padding, strict=True))
        down_stride, across_stride = layer.stride
        hidden = F.fold(hidden, size, kernel, padding=turned)[:, :, ::down_stride, ::across_stride].flatten(2)
    if acts is not None:
        hidden = hidden * acts[:, :, None]
    flat = output.flatten(2)
    if output.is_contiguous(memory_format=torch.channels_last):
        added: Tensor = torch.baddbmm(flat.mT, hidden.mT, up).mT
    else:
        added = torch.baddbmm(flat, up.mT, hidden)
    shaped: Tensor = added.unflatten(2, output.shape[2:])
    return shaped


def _as_matrix(up: Tensor) -> Tensor:
    return up.flatten(1) if up.dim() == 4 and up.shape[2:].numel() == 1 else up


def _check_fits(rank: int, inside: tuple[int, ...], weight: Tensor, name: str) -> None:
    if tuple(weight.shape[1:]) != inside or weight.shape[0] > rank:
        raise ObjdriveError(
            f"layer {name!r}: weights of shape {tuple(weight.shape)} do not fit rank {rank} and width "
            + "x".join(map(str, inside))
        )
