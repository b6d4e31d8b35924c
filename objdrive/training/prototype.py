"""The prototypical embedding: a token embedding between the object's picture and its class (arXiv 2401.15708)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from objdrive.base.prompts import TOKEN_MARK, class_prompt
from objdrive.base.stable_diffusion import Base
from objdrive.training.losses import prototype_loss


def prototype_targets(base: Base, whole: Tensor, alone: Tensor, class_names: Sequence[str]) -> Tensor:
    """(N, 3, D): CLIP embeddings of the pictures, of the objects alone and of the class prompts.

    Args:
        base: whose towers embed.
        whole: (N, 3, R, R) pixels in [0, 1], the picture x.
        alone: (N, 3, R, R) pixels in [0, 1], the masked crop x_m.
        class_names: N class words.
    """
    prompts = [base.tokenize(class_prompt(name)) for name in class_names]
    with torch.no_grad():
        text = base.embed_text(prompts)
    return torch.stack([base.encode_images(whole), base.encode_images(alone), text], dim=1)


def optimise_prototypes(
    base: Base, start: Mapping[str, Tensor], targets: Tensor, *, steps: int, lr: float
) -> dict[str, Tensor]:
    """Minimise L_PE over the token embeddings of N objects at once with Adam; each moves as it would alone.

    Args:
        base: whose text tower embeds the prompt with the token.
        start: (N, d) by text encoder, the class words' embeddings.
        targets: (N, 3, D), see `prototype_targets`.
        steps: of Adam.
        lr: its learning rate.

    Returns:
        (N, d) by text encoder.
    """
    embeddings = {encoder: rows.clone().requires_grad_(True) for encoder, rows in start.items()}
    optimizer = torch.optim.Adam(embeddings.values(), lr=lr)
    prompts = [base.tokenize(class_prompt(TOKEN_MARK))] * len(targets)
    for _ in range(steps):
        each = [dict(zip(embeddings, one, strict=True)) for one in zip(*embeddings.values(), strict=True)]
        text = base.embed_text(prompts, each)
        loss = prototype_loss(text, targets).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {encoder: rows.detach() for encoder, rows in embeddings.items()}
