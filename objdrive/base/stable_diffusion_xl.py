"""Stable Diffusion XL (arXiv 2307.01952): what its network is conditioned on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from objdrive.base.conditioning import Conditioning, Frame


def condition(outputs: Sequence[Any], frame: Frame, absent: Sequence[bool]) -> Conditioning:
    """What two text encoders say of N prompts, for pictures of one frame.

    Args:
        outputs: of each encoder, with the states of all layers; the last one's pooled states are projected.
        frame: of the pictures.
        absent: for each prompt whether there is none: states and pooled states are then zeros.
    """
    # Not the last layer's: it was trained to be pooled.
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled: Tensor = outputs[-1].text_embeds
    there = torch.tensor([not one for one in absent], device=states.device)
    ids = torch.tensor([frame.ids] * len(states), dtype=torch.float32, device=states.device)
    return Conditioning(states * there[:, None, None], pooled * there[:, None], ids)
