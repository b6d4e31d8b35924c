"""The prototypical embedding: a token embedding between the object's picture and its class (arXiv 2401.15708)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from objdrive.base.prompts import TOKEN_MARK, class_prompt
from objdrive.base.stable_diffusion import Base
from objdrive.training.losses import prototype_loss


def prototype_targets(
    base: Base, whole: Tensor, alone: Tensor, class_names: Sequence[str], *, encoder: str = ""
) -> Tensor:
    """(N, 3, D): CLIP embeddings of the pictures, of the objects alone and of the class prompts.

    Args:
        base: whose towers embed.
        whole: (N, 3, R, R) pixels in [0, 1], the picture x.
        alone: (N, 3, R, R) pixels in [0, 1], the masked crop x_m.
        class_names: N class words.
        encoder: the text encoder with whose image tower (see `Base.encode_images`).
    """
    prompts = [base.tokenize(class_prompt(name)) for name in class_names]
    with torch.no_grad():
        text = base.embed_text(prompts, encoder=encoder)
    seen = [base.encode_images(pictures, encoder=encoder) for pictures in (whole, alone)]
    return torch.stack([*seen, text], dim=1)


def optimise_prototypes(
    base: Base, start: Tensor, targets: Tensor, *, steps: int, lr: float, encoder: str = ""
) -> Tensor:
    """Minimise L_PE over the token embeddings of N objects at once with Adam; each moves as it would alone.

    Args:
        base: whose text tower embeds the prompt with the token.
        start: (N, d), the class words' embeddings.
        targets: (N, 3, D), see `prototype_targets`.
        steps: of Adam.
        lr: its learning rate.
        encoder: the text encoder whose embeddings they are.

    Returns:
        (N, d).
    """
    embeddings = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([embeddings], lr=lr)
    prompts = [base.tokenize(class_prompt(TOKEN_MARK))] * len(targets)
    for _ in range(steps):
        text = base.embed_text(prompts, list(embeddings), encoder=encoder)
        loss = prototype_loss(text, targets).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return embeddings.detach()
