"""The autoencoder's training: sharp pictures from small latents."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from jobs.pretrain.config import Config
from jobs.pretrain.data import read_rows
from jobs.pretrain.folders import Folders
from jobs.pretrain.pictures import grid
from objdrive.base.files import find_base
from objdrive.errors import ObjdriveError

_KL = 1e-5
_SHOWN = 16
_CHUNK = 64


def build_vae(config: Config) -> AutoencoderKL:
    """The untrained autoencoder."""
    model: dict[str, Any] = dict(config.vae.model)
    levels = len(model["block_out_channels"])
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=config.resolution,
        **model,
    )


def take_over(vae: AutoencoderKL, base: str) -> None:
    """Take over the autoencoder of another base, and leave its encoder for good.

    What the denoiser of that base was trained on stays what it is: only the decoder has anything to learn.

    Raises:
        ObjdriveError: it is of other sizes.
    """
    started = AutoencoderKL.from_pretrained(find_base(base).snapshot / "vae", torch_dtype=torch.float32)
    try:
        vae.load_state_dict(started.state_dict())
    except RuntimeError as error:
        raise ObjdriveError(
            f"the autoencoder of {base} is of other sizes than the configuration's: give it the same, or no `start`"
        ) from error
    vae.register_to_config(scaling_factor=started.config["scaling_factor"])
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


def edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbours, across and down."""
    return pixels.diff(dim=3), pixels.diff(dim=2)


def psnr(made: Tensor, real: Tensor) -> Tensor:
    """(N,): peak signal-to-noise ratio in dB of pictures (N, 3, n, n) in [0, 1]."""
    error = (made - real).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


class VaeObjective(nn.Module):
    """Squared error (what PSNR measures), a little absolute error and error of edges (against blur), and a light KL."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of ``pixels`` (B, 3, n, n) in [0, 1]."""
        real = batch["pixels"] * 2 - 1
        posterior = self.vae.encode(real).latent_dist
        made = self.vae.decode(posterior.sample()).sample
        square = (made - real).square().mean()
        absolute = (made - real).abs().mean()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(made), edges(real), strict=True))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = 4 * square + 0.3 * absolute + 0.3 * edge + _KL * kl
        return {"loss": loss, "square": square, "edge": edge, "kl": kl}


class VaeStage:
    """The autoencoder in training."""

    def __init__(self, config: Config, folders: Folders, device: torch.device, rank: int, world: int) -> None:
        torch.manual_seed(config.seed)
        self._device = device
        self._rows = read_rows(folders.scenes, config.resolution, rank=rank, world=world)
        self._judged = read_rows(folders.judged, config.resolution)
        self._generator = torch.Generator().manual_seed(config.seed + 1 + rank)
        vae = build_vae(config)
        if config.start:
            take_over(vae, config.start)
        self.part = vae.to(device, memory_format=torch.channels_last)
        self.objective = VaeObjective(self.part)

    def batch(self, size: int) -> dict[str, Tensor]:
        """Random scenes."""
        rows = torch.randint(len(self._rows.captions), (size,), generator=self._generator)
        pixels = self._rows.images(rows).to(self._device)
        return {"pixels": pixels.contiguous(memory_format=torch.channels_last)}

    @torch.inference_mode()
    def judge(self, part: AutoencoderKL) -> tuple[dict[str, float], Image.Image]:
        """PSNR on held-out scenes; and some of them, above what the autoencoder makes of them."""
        real = self._judged.images(torch.arange(min(256, len(self._judged.captions)))).to(self._device)
        made = reconstruct(part, real)
        spread = part.encode(real[:_CHUNK] * 2 - 1).latent_dist.mode().std()
        pair = torch.stack([real[:_SHOWN], made[:_SHOWN]], dim=1).transpose(0, 1).flatten(0, 1)
        return {"psnr": float(psnr(made, real).mean()), "spread": float(spread)}, grid(pair, _SHOWN, zoom=2)


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(N, 3, n, n) in [0, 1]: pictures through the autoencoder and back."""
    made = [vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in pixels.split(_CHUNK)]
    return (torch.cat(made) / 2 + 0.5).clamp(0, 1)


def normalise_latents(vae: AutoencoderKL, means: Tensor, deviations: Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1 by the layers next to the latents; pictures stay the same.

    Channels of unequal spread would drown in the denoiser's noise at unequal times; a scaling factor is one for all.

    Args:
        vae: changed in place.
        means: (C,) of its latents.
        deviations: (C,) of its latents.
    """
    channels = len(means)
    with torch.no_grad():
        # Rows of the first layer: the means of all channels, then their logarithmic variances.
        vae.quant_conv.weight[:channels] /= deviations.view(-1, 1, 1, 1)
        vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - means) / deviations
        vae.quant_conv.bias[channels:] -= 2 * deviations.log()
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ means
        vae.post_quant_conv.weight *= deviations.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def export_vae(config: Config, folders: Folders, weights: dict[str, Tensor]) -> AutoencoderKL:
    """Write the autoencoder into the snapshot, in half precision; latents made from nothing get unit deviation."""
    vae = build_vae(config)
    if config.start:
        take_over(vae, config.start)
    vae.load_state_dict(weights)
    vae.eval()
    if not config.start:
        rows = read_rows(folders.judged, config.resolution)
        with torch.inference_mode():
            latents = vae.encode(rows.images(torch.arange(min(256, len(rows.captions)))) * 2 - 1).latent_dist.mode()
        normalise_latents(vae, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    folder: Path = folders.snapshot / "vae"
    vae.half().save_pretrained(folder)
    return vae.float()
