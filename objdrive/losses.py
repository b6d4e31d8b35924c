"""The losses of arXiv 2401.15708 as pure functions of predictions."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Channels and places; what is before them are samples.
_SAMPLE = (-3, -2, -1)
# The middle and the width of the noise levels' logarithms.
_LEVEL_MEAN, _LEVEL_DEVIATION = 0.5, 1.0


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


def object_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Object-specific loss, ``||M * (eps - eps_theta)||^2 / sum M`` for each sample (arXiv 2401.15708).

    Each sample is normalised by its own mask, so that small objects learn as fast as large ones and no sample's
    loss depends on its neighbours in the batch.

    Args:
        prediction: (..., C, H, W), the network's output.
        target: (..., C, H, W), the noise, or the velocity for v-prediction bases.
        mask: (..., 1, H, W), weights in [0, 1]; for several objects the sum of their masks. An empty mask yields NaN.

    Returns:
        (...) losses, averaged over channels.
    """
    return _masked_square(prediction, target, mask) / (mask.sum(dim=_SAMPLE) * prediction.shape[-3])


def class_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Class-characterizing regularization, ``||eps_theta(z', t, T(c_c)) - eps_base(z', t, T(c_c))||^2``.

    Args:
        prediction: (..., C, H, W), the adapted network on class pictures with the class prompt.
        target: (..., C, H, W), the base's prediction for the same input.

    Returns:
        (...) mean squared errors.
    """
    return (prediction - target).square().mean(dim=_SAMPLE)


def background_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error around objects, ``||(1 - M) * (eps_theta - eps_base)||^2 / sum (1 - M)`` for each sample.

    Args:
        prediction: (..., C, H, W), the adapted network on views, with prompts that name the object.
        target: (..., C, H, W), the base's prediction for the same input, with the class word in the object's place.
        mask: (..., 1, H, W), weights in [0, 1].

    Returns:
        (...) losses, averaged over channels; 0 where an object fills its view.
    """
    around = 1 - mask
    weight = around.sum(dim=_SAMPLE).clamp(min=1)
    return _masked_square(prediction, target, around) / (weight * prediction.shape[-3])


def _masked_square(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return (mask * (prediction - target)).square().sum(dim=_SAMPLE)


def prototype_loss(text: Tensor, targets: Tensor) -> Tensor:
    """Prototypical embedding loss, ``1 - cos(T(c_p), mean(I(x), I(x_m), T(c_c)))`` (arXiv 2401.15708).

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


def timestep_odds(alphas: Tensor) -> Tensor:
    """How often each timestep is trained on, so that noise levels are log-normal (arXiv 2206.00364, table 1).

    Levels are in parts of the latents' deviation; their logarithms have a mean of 0.5 and a deviation of 1. It is
    strong noise that decides what a picture shows, and all timesteps alike hardly learn there.

    Args:
        alphas: (T,), the cumulative products of alpha at all timesteps.

    Returns:
        (T,), with a sum of 1.
    """
    level = ((1 - alphas) / alphas.clamp(min=1e-8)).log() / 2
    density = torch.exp(-(((level - _LEVEL_MEAN) / _LEVEL_DEVIATION) ** 2) / 2) * torch.gradient(level)[0]
    return density / density.sum()


def velocity_weight(alphas: Tensor, *, velocity: bool) -> Tensor:
    """What makes a loss one of the velocity (arXiv 2202.00512): ``1 / a_t`` for predicted noise, 1 for the velocity.

    An error of the noise is ``sqrt(a_t)`` times the velocity's: a plain loss of it counts strong noise as nothing.

    Args:
        alphas: (...), the cumulative products of alpha at each sample's timestep.
        velocity: whether the network predicts the velocity.

    Returns:
        (...).
    """
    return torch.ones_like(alphas) if velocity else 1 / alphas


def add_noise(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """``z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps`` (arXiv 2006.11239, equation 4).

    Args:
        latents: (..., C, H, W), `noise` the same.
        alphas: (...), the cumulative products of alpha at each sample's timestep.
    """
    a = alphas[..., None, None, None]
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def velocity(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """``v = sqrt(a_t) eps - sqrt(1 - a_t) z_0`` (arXiv 2202.00512), the target of v-prediction bases."""
    a = alphas[..., None, None, None]
    return a.sqrt() * noise - (1 - a).sqrt() * latents
