"""The denoiser's training, on latents that Ray Data encodes once."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from jobs.pretrain.clip import tokenize
from jobs.pretrain.config import Config
from jobs.pretrain.data import as_array, check_columns, pool, read_share
from jobs.pretrain.folders import Folders
from jobs.pretrain.loop import load_matching
from jobs.pretrain.pictures import grid
from jobs.pretrain.scenes import with_article
from jobs.pretrain.sprites import Sprites
from objdrive.base.files import find_base
from objdrive.base.noise import add_noise, timestep_odds, velocity_weight
from objdrive.training.losses import latent_mask, object_loss

SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Stable Diffusion's."""
_COMPOSED = ("pixels", "mask", "caption")
_ENCODED = ("latent", "mask", "ids")
_DROPPED = 0.1
_SHOWN_STEPS = 25
_SHOWN_GUIDANCE = 4.0
_SHOWN_COLUMNS = 8
_SHOWN_CONTEXTS = ("on grass", "on a white background", "on a wooden table", "in the snow", "under water")
_JUDGED = 512


class Encode:
    """Ray Data's worker that turns scenes into latents and token ids."""

    def __init__(self, snapshot: Path) -> None:
        """Load the autoencoder and the tokenizer."""
        torch.set_num_threads(1)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vae = AutoencoderKL.from_pretrained(snapshot / "vae", torch_dtype=torch.float32)
        self._vae = vae.to(self._device, memory_format=torch.channels_last).eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(snapshot / "tokenizer")

    @torch.inference_mode()
    def __call__(self, batch: pa.Table) -> pa.Table:
        """Columns ``latent`` (half precision), ``mask`` (uint8, at the latents' size) and ``ids`` of some scenes."""
        edge = int(self._vae.config["sample_size"])
        pixels = torch.from_numpy(as_array(batch["pixels"], np.uint8)).view(-1, edge, edge, 3).permute(0, 3, 1, 2)
        pixels = (pixels.to(self._device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        latents = self._vae.encode(pixels).latent_dist.mode() * self._vae.config["scaling_factor"]
        masks = torch.from_numpy(as_array(batch["mask"], np.uint8)).view(-1, edge, edge).float()
        masks = latent_mask(masks, latents.shape[-1]).round().to(torch.uint8)
        captions: list[Any] = batch["caption"].to_pylist()
        ids = tokenize(self._tokenizer, captions).short()
        return pa.table(
            {
                "latent": [latent.tobytes() for latent in latents.half().cpu().contiguous().numpy()],
                "mask": [mask.tobytes() for mask in masks.numpy()],
                "ids": [row.tobytes() for row in ids.numpy()],
            }
        )


def make_latents(folders: Folders) -> None:
    """Encode the scenes, unless this autoencoder has done so already.

    Raises:
        ObjdriveError: scenes or latents are there, but of an earlier version.
    """
    for scenes in (folders.scenes, folders.judged):
        folder = latents_folder(folders, scenes)
        if folder.exists():
            check_columns(folder, _ENCODED)
        else:
            check_columns(scenes, _COMPOSED)
            partial = folder.with_suffix(".partial")
            encoded = ray.data.read_parquet(str(scenes), columns=list(_COMPOSED)).map_batches(
                Encode,
                fn_constructor_args=(folders.snapshot,),
                batch_size=64,
                batch_format="pyarrow",
                compute=pool(len(list(scenes.glob("*.parquet")))),
            )
            encoded.write_parquet(str(partial), mode=ray.data.SaveMode.OVERWRITE)
            partial.rename(folder)


def latents_folder(folders: Folders, scenes: Path) -> Path:
    """Where the latents of some scenes lie: one place for each encoder, whatever decoder goes with it."""
    weights = load_file(folders.snapshot / "vae" / "diffusion_pytorch_model.safetensors")
    encoder = {name: value for name, value in weights.items() if name.startswith(("encoder.", "quant_conv."))}
    return folders.latents / f"{scenes.name}-{hashlib.sha256(save(encoder)).hexdigest()[:12]}"


def build_unet(config: Config) -> UNet2DConditionModel:
    """The untrained denoiser."""
    model = dict(config.unet.model)
    return UNet2DConditionModel(
        sample_size=config.resolution >> (len(config.vae.model["block_out_channels"]) - 1),
        in_channels=config.vae.model["latent_channels"],
        out_channels=config.vae.model["latent_channels"],
        cross_attention_dim=config.clip.model["text"]["hidden_size"],
        **model,
    )


class UnetObjective(nn.Module):
    """Noise prediction, each timestep weighted as Karras et al. weight it, which is as v-prediction does.

    The object-specific loss (arXiv 2401.15708) is added as it is, so that it counts where shapes are there and details
    are drawn: most of a picture is backdrop, which outweighs thin objects. At strong noise, where an object might be
    anywhere, a loss by its mask would draw it larger.
    """

    alphas: Tensor

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("alphas", DDIMScheduler(**SCHEDULE).alphas_cumprod)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses: ``latents``, ``noise`` (B, C, h, h), ``masks`` (B, 1, h, h), ``states`` (B, L, d), ``timesteps``."""
        alphas = self.alphas[batch["timesteps"]]
        noised = add_noise(batch["latents"], batch["noise"], alphas)
        noised = noised.contiguous(memory_format=torch.channels_last)
        predicted = self.unet(noised, batch["timesteps"], batch["states"]).sample.float()
        error = (predicted - batch["noise"]).square().mean(dim=(1, 2, 3))
        whole = (velocity_weight(alphas, velocity=False) * error).mean()
        of_objects = object_loss(predicted, batch["noise"], batch["masks"]).mean()
        return {"loss": whole + of_objects, "whole": whole, "objects": of_objects}


@dataclass(frozen=True)
class EncodedScenes:
    """Scenes as the denoiser sees them.

    Attributes:
        latents: (N, C, h, h).
        masks: (N, 1, h, h), how much of each place the objects cover.
        ids: (N, L), the captions.
    """

    latents: Tensor
    masks: Tensor
    ids: Tensor

    def of(self, rows: Tensor) -> "EncodedScenes":
        """Some scenes, no longer in the types that they are kept in: float32, masks in [0, 1], int64."""
        return EncodedScenes(self.latents[rows].float(), self.masks[rows].float() / 255, self.ids[rows].long())


class UnetStage:
    """The denoiser in training."""

    def __init__(self, config: Config, folders: Folders, device: torch.device, rank: int, world: int) -> None:
        torch.manual_seed(config.seed)
        self._device = device
        self._text = CLIPTextModel.from_pretrained(folders.snapshot / "text_encoder", dtype=torch.float32)
        self._text.to(device).eval().requires_grad_(False)
        self._tokenizer = CLIPTokenizer.from_pretrained(folders.snapshot / "tokenizer")
        vae = AutoencoderKL.from_pretrained(folders.snapshot / "vae", torch_dtype=torch.float32)
        self._vae = vae.to(device).eval().requires_grad_(False)
        self._generator = torch.Generator().manual_seed(config.seed + 1 + rank)
        self.part = build_unet(config)
        if config.start:
            started = UNet2DConditionModel.from_pretrained(find_base(config.start).snapshot / "unet")
            load_matching(self.part, started.state_dict())
        self.part.to(device, memory_format=torch.channels_last)
        if device.type == "cpu":
            # Attention over so few cells is quick as plain products; torch's flash kernel for CPUs is not, backwards.
            self.part.set_attn_processor(AttnProcessor())
        self.objective = UnetObjective(self.part).to(device)
        self._odds = timestep_odds(self.objective.alphas.cpu())
        self._scenes = self._read(folders, folders.scenes, rank, world)
        self._judged = self._fixed(self._read(folders, folders.judged, 0, 1))
        self._words = Sprites.load(folders.sprites).classes
        self._null = tokenize(self._tokenizer, [""])

    def batch(self, size: int) -> dict[str, Tensor]:
        """Random scenes, noise and timesteps; some captions dropped, for guidance."""
        rows = torch.randint(len(self._scenes.ids), (size,), generator=self._generator)
        dropped = torch.rand(size, generator=self._generator) < _DROPPED
        scenes = self._scenes.of(rows)
        scenes = replace(scenes, ids=torch.where(dropped[:, None], self._null, scenes.ids))
        return self._with_noise(scenes, self._generator)

    @torch.inference_mode()
    def judge(self, part: UNet2DConditionModel) -> tuple[dict[str, float], Image.Image]:
        """Losses on held-out scenes with fixed noise; and samples of some classes in some contexts."""
        objective = UnetObjective(part).to(self._device)
        losses = [objective(batch) for batch in self._judged]
        figures = {
            f"held_{name}": float(torch.stack([each[name] for each in losses]).mean()) for name in ("whole", "objects")
        }
        every = max(1, len(self._words) // 40)
        words = self._words[::every][:40]
        prompts = [
            f"a photo of {with_article(word)} {_SHOWN_CONTEXTS[i % len(_SHOWN_CONTEXTS)]}"
            for i, word in enumerate(words)
        ]
        return figures, grid(self.sample(part, prompts), _SHOWN_COLUMNS, zoom=2)

    @torch.inference_mode()
    def sample(self, part: UNet2DConditionModel, prompts: list[str]) -> Tensor:
        """(N, 3, n, n) pictures in [0, 1] of prompts."""
        scheduler = DDIMScheduler(**SCHEDULE)
        scheduler.set_timesteps(_SHOWN_STEPS)
        edge, channels = part.config["sample_size"], part.config["in_channels"]
        states = self._encode(tokenize(self._tokenizer, prompts + [""] * len(prompts)))
        latents = torch.randn(len(prompts), channels, edge, edge, generator=torch.Generator().manual_seed(0))
        latents = latents.to(self._device)
        for timestep in scheduler.timesteps:
            given, free = part(torch.cat([latents] * 2), timestep, states).sample.chunk(2)
            latents = scheduler.step(free + _SHOWN_GUIDANCE * (given - free), timestep, latents).prev_sample
        pictures = self._vae.decode(latents / self._vae.config["scaling_factor"]).sample
        shown: Tensor = (pictures / 2 + 0.5).clamp(0, 1)
        return shown

    def _read(self, folders: Folders, scenes: Path, rank: int, world: int) -> EncodedScenes:
        table = read_share(latents_folder(folders, scenes), _ENCODED, rank, world)
        edge, channels = self.part.config["sample_size"], self.part.config["in_channels"]
        return EncodedScenes(
            torch.from_numpy(as_array(table["latent"], np.float16)).view(-1, channels, edge, edge),
            torch.from_numpy(as_array(table["mask"], np.uint8)).view(-1, 1, edge, edge),
            torch.from_numpy(as_array(table["ids"], np.int16)),
        )

    def _fixed(self, scenes: EncodedScenes) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        few = torch.arange(min(_JUDGED, len(scenes.ids)))
        return [self._with_noise(scenes.of(rows), generator) for rows in few.split(64)]

    def _with_noise(self, scenes: EncodedScenes, generator: torch.Generator) -> dict[str, Tensor]:
        timesteps = stratified(self._odds, len(scenes.ids), generator)
        noise = torch.randn(scenes.latents.shape, generator=generator)
        return {
            "latents": scenes.latents.to(self._device),
            "masks": scenes.masks.to(self._device),
            "states": self._encode(scenes.ids),
            "noise": noise.to(self._device),
            "timesteps": timesteps.to(self._device),
        }

    @torch.no_grad()
    def _encode(self, ids: Tensor) -> Tensor:
        states: Tensor = self._text(input_ids=ids.to(self._device)).last_hidden_state
        return states


def stratified(odds: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws from odds that are spread evenly, so that a batch's gradient varies less (arXiv 2107.00630, appendix I.1).

    Each draw alone follows the odds; together they take one of each of `count` equal parts of the distribution.

    Args:
        odds: (T,), with a sum of 1.
        count: how many, B.
        generator: source of the one offset that all draws share.

    Returns:
        (B,) indices into `odds`, in rising order but for where they wrap around.
    """
    levels = (torch.arange(count) / count + torch.rand(1, generator=generator)) % 1
    return torch.searchsorted(odds.cumsum(0), levels.to(odds.dtype)).clamp(max=len(odds) - 1)


def export_unet(config: Config, folders: Folders, weights: dict[str, Tensor]) -> None:
    """Write the denoiser into the snapshot, in half precision."""
    unet = build_unet(config)
    unet.load_state_dict(weights)
    unet.half().save_pretrained(folders.snapshot / "unet")
