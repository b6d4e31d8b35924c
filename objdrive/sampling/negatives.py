"""What guidance leads away from, encoded once for all pictures that share it."""

from collections import OrderedDict

import torch

from objdrive.base.conditioning import Conditioning
from objdrive.base.prompts import TokenizedPrompt
from objdrive.base.stable_diffusion import Base

_MOST = 64


class NegativePrompts:
    """The last few negative prompts, encoded: most requests have the same one, which is often empty.

    Args:
        base: whose text encoders.
        most: how many are kept; the one that was asked for longest ago goes first.
    """

    def __init__(self, base: Base, most: int = _MOST) -> None:
        self._base = base
        self._most = most
        self._encoded: OrderedDict[TokenizedPrompt, Conditioning] = OrderedDict()

    @torch.no_grad()
    def encode(self, prompt: TokenizedPrompt) -> Conditioning:
        """A prompt without learned tokens, without a batch axis, for whole pictures of the native size."""
        if prompt not in self._encoded:
            # By itself: what a request is led away from does not depend on what it is encoded beside.
            self._encoded[prompt] = self._base.encode_text([prompt])[0]
            if len(self._encoded) > self._most:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(prompt)
        return self._encoded[prompt]
