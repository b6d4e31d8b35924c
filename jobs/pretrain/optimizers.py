"""The optimisers of training: AdamW, and Muon for the matrices inside a network."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from jobs.pretrain.config import Training

_ENDS = ("conv_in", "conv_out")


def make_optimizers(part: nn.Module, training: Training) -> list[Optimizer]:
    """What steps all trainable weights of a part, each once."""
    trained = {name: weight for name, weight in part.named_parameters() if weight.requires_grad}
    hidden = hidden_weights(part) & trained.keys() if training.optimizer == "muon" else set()
    rest = [weight for name, weight in trained.items() if name not in hidden]
    optimizers: list[Optimizer] = [
        AdamW(rest, lr=training.lr, betas=(0.9, 0.99), weight_decay=training.weight_decay, fused=True)
    ]
    if hidden:
        weights = [weight for name, weight in trained.items() if name in hidden]
        optimizers.append(KernelMuon(weights, lr=training.lr, weight_decay=training.weight_decay))
    return optimizers


def hidden_weights(part: nn.Module) -> set[str]:
    """Names of the weights of linear and convolutional layers, but for the first and the last convolution."""
    return {
        f"{name}.weight"
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in _ENDS
    }


class KernelMuon(Muon):
    """PyTorch's Muon (https://kellerjordan.github.io/posts/muon), for convolutions too.

    A kernel (out, in, h, w) is stepped as the matrix (out, in * h * w). Steps are as large as AdamW's would be
    (arXiv 2502.16982, section 2.2), so that both take the same learning rate.
    """

    def __init__(self, weights: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        self._weights = list(weights)
        # PyTorch's takes matrices only, and a kernel in another memory layout than the usual has no view as one.
        matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in self._weights]
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the weights by their gradients."""
        pairs = list(zip(self.param_groups[0]["params"], self._weights, strict=True))
        for matrix, weight in pairs:
            matrix.copy_(weight.flatten(1))
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step(closure)  # type: ignore[no-untyped-call]
        for matrix, weight in pairs:
            weight.copy_(matrix.view(weight.shape))
