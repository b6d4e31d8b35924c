"""Gradient checkpointing of a network whose adapters are in a bank (arXiv 1604.06174)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from objdrive.adapters.bank import AdapterBank
from objdrive.base.stable_diffusion import Base


@contextmanager
def checkpointed(base: Base, bank: AdapterBank) -> Iterator[None]:
    """Have the network's blocks compute activations anew in the backward pass, where the family asks for it.

    The bank then adapts them as it did in the forward pass, whatever it does by that time.
    """
    if not base.family.checkpointing:
        yield
        return

    def run(block: nn.Module, *inputs: Any) -> Any:
        def contexts() -> tuple[Any, Any]:
            return nullcontext(), bank.as_now()

        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    base.unet.enable_gradient_checkpointing(run)
    try:
        yield
    finally:
        base.unet.disable_gradient_checkpointing()
