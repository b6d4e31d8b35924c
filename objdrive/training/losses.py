"""The losses of arXiv 2401.15708 as pure functions of predictions.

The paper's three are `prototype_loss` (L_PE), which finds the embedding that a fine-tune starts from (`prototype.py`),
and `object_loss` (L_obj) and `class_loss` (L_ccr), whose sum a fine-tune minimises (`objective.py`).
`background_loss` is beyond the paper.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Channels and places; what is before them are samples.
_SAMPLE = (-3, -2, -1)


def prototype_loss(text: Tensor, targets: Tensor) -> Tensor:
    """Prototypical embedding loss L_PE, ``1 - cos(T(c_p), mean(I(x), I(x_m), T(c_c)))``.

    CLIP compares directions, so each target is normalised before the mean; otherwise the tower with the longer
    vectors would decide alone.

    Args:
        text: (N, D), the embedded prompts with the learned token.
        targets: (N, 3, D), embeddings of the image, the object alone and the class prompt.

    Returns:
        (N,) losses in [0, 2].
    """
    prototype = F.normalize(targets, dim=-1).mean(dim=1)
    return 1 - F.cosine_similarity(text, prototype, dim=-1)


def object_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Object-specific loss L_obj, ``sum M (eps - eps_theta)^2 / sum M`` for each sample.

    With masks of zeros and ones this is the paper's ``||M * (eps - eps_theta)||^2 / sum M``. With soft ones the paper's
    would count a cell that is a quarter object as a sixteenth, and thin parts would hardly learn.

    Each sample is normalised by its own mask, so that small objects learn as fast as large ones and no sample's
    loss depends on its neighbours in the batch.

    Args:
        prediction: (..., C, H, W), the network's output.
        target: (..., C, H, W), the noise, or the velocity for v-prediction bases.
        mask: (..., 1, H, W), weights in [0, 1]; for several objects the sum of their masks. An empty mask yields NaN.

    Returns:
        (...) losses, averaged over channels.
    """
    return _weighted_squares(prediction, target, mask) / (mask.sum(dim=_SAMPLE) * prediction.shape[-3])


def class_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Class-characterizing regularization L_ccr, ``||eps_theta(z', t, T(c_c)) - eps_base(z', t, T(c_c))||^2``.

    Args:
        prediction: (..., C, H, W), the adapted network on what is kept: class pictures with the class prompt, or views
            without a prompt.
        target: (..., C, H, W), the base's prediction for the same input.

    Returns:
        (...) mean squared errors.
    """
    return (prediction - target).square().mean(dim=_SAMPLE)


def background_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error around objects, ``sum (1 - M) (eps_theta - eps_base)^2 / sum (1 - M)`` for each sample.

    Args:
        prediction: (..., C, H, W), the adapted network on views, with prompts that name the object.
        target: (..., C, H, W), the base's prediction for the same input, with the class word in the object's place.
        mask: (..., 1, H, W), weights in [0, 1].

    Returns:
        (...) losses, averaged over channels; 0 where an object fills its view.
    """
    around = 1 - mask
    weight = around.sum(dim=_SAMPLE).clamp(min=1)
    return _weighted_squares(prediction, target, around) / (weight * prediction.shape[-3])


def latent_mask(mask: Tensor, size: int, *, soft: bool = True) -> Tensor:
    """Bring masks to the latents' size by area averaging, so that thin and tiny objects keep a weight.

    Args:
        mask: (..., H, W) in [0, 1], H and W multiples of `size`.
        size: edge of the latents.
        soft: keep the averaged edge; False cuts at one half (an object smaller than that keeps its maximum).

    Returns:
        (..., size, size) in [0, 1].
    """
    area = F.adaptive_avg_pool2d(mask, size)
    if soft:
        return area
    peak = area.amax(dim=(-2, -1), keepdim=True)
    return ((area >= torch.clamp(peak, max=0.5)) & (area > 0)).to(mask.dtype)


def _weighted_squares(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return (mask * (prediction - target).square()).sum(dim=_SAMPLE)
