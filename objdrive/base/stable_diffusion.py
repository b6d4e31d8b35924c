"""Stable Diffusion 1.x, 2.x and XL: the frozen network, and text, image and latent encoding."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from objdrive.base import stable_diffusion_xl
from objdrive.base.conditioning import Conditioning, Frame
from objdrive.base.family import Family
from objdrive.base.files import BaseFiles, find_base
from objdrive.base.loading import load_towers, load_vae
from objdrive.base.noise import NoiseProcess
from objdrive.base.prompts import TokenizedPrompt, token_ids
from objdrive.base.sizes import Size, Sizes
from objdrive.base.towers import Tower, padded_ids


@dataclass
class Base:
    """A frozen base on one device. Make one with `Base.load`.

    Attributes:
        files: where its files lie.
        fingerprint: of all its weights, see `BaseFiles.fingerprint`.
        towers: its text encoders, in the order of the family's.
        noise: how it adds noise and takes it away.
    """

    files: BaseFiles
    fingerprint: str
    towers: tuple[Tower, ...]
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise: NoiseProcess

    @classmethod
    def load(
        cls,
        name: str,
        *,
        clip: str | None = None,
        vae: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Base":
        """Load a base (see `find_base`), frozen, in evaluation mode.

        Args:
            name: embedded base, folder, single file or hub id.
            clip: see `find_base`.
            vae: see `find_base`.
            device: default ``cuda`` where there is one, else ``cpu``.
            dtype: of the UNet and the text encoders; default bfloat16 on CUDA, float32 elsewhere. The image towers,
                used a few times per object, stay in float32, and so does the autoencoder, unless `vae` names one
                that bears less (see `load_vae`).
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        files = find_base(name, clip=clip, vae=vae)
        scheduler = DDIMScheduler.from_pretrained(files.snapshot / "scheduler", clip_sample=False)
        unet = UNet2DConditionModel.from_pretrained(
            files.snapshot / "unet", torch_dtype=dtype, variant=files.variant("unet"), use_safetensors=True
        )
        if device == "cpu":
            # On a processor, convolutions spare themselves two copies each that way.
            unet.to(memory_format=torch.channels_last)
        return cls(
            files=files,
            fingerprint=files.fingerprint(),
            towers=load_towers(files, device, dtype),
            vae=load_vae(files, dtype).to(device).eval().requires_grad_(False),
            unet=unet.to(device).eval().requires_grad_(False),
            noise=NoiseProcess.of(scheduler, device),
        )

    @property
    def family(self) -> Family:
        """What it sets for its adapters."""
        return self.files.family

    @property
    def name(self) -> str:
        """The name that it was loaded by."""
        return self.files.name

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.noise.alphas.device

    @property
    def latent_size(self) -> int:
        """Edge of the latents of the native square."""
        return int(self.unet.config["sample_size"])

    @property
    def resolution(self) -> int:
        """Edge of the native square in pixels, which fine-tunes take, and which is drawn where no size is named."""
        return self.latent_size * self._pixels

    @property
    def sizes(self) -> Sizes:
        """The sizes of the pictures that it draws."""
        return Sizes(self.resolution, max(self.family.size_step, self._pixels))

    @property
    def _pixels(self) -> int:
        """Pixels along the edge of a latent."""
        return 1 << (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """Of its prompts. Text encoders of one base differ in how they pad, and in nothing else."""
        return self.towers[0].tokenizer

    @property
    def joint_encoders(self) -> tuple[str, ...]:
        """The text encoders that share a space with an image tower at hand."""
        return tuple(tower.name for tower in self.towers if tower.joint is not None)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of this size."""
        width, height = size
        return int(self.unet.config["in_channels"]), height // self._pixels, width // self._pixels

    def tokenize(self, text: str, *, negative: bool = False) -> TokenizedPrompt:
        """Tokenize a text in which `TOKEN_MARK` stands for each learned token.

        Args:
            text: the prompt.
            negative: whether guidance leads away from it. An empty one then is what the base was trained to see
                without a prompt: some see zeros.

        Raises:
            InvalidPrompt: the text is longer than the text encoder reads.
        """
        ids, places = token_ids(self.tokenizer, text)
        return TokenizedPrompt(tuple(ids), tuple(places), absent=negative and not text and self.files.zeros_no_prompt)

    def knows(self, class_name: str) -> bool:
        """Whether the base has probably learned this class word.

        A base that lists its classes (``classes.json``) decides by the list; for others, a word that the vocabulary
        can only spell in pieces counts as unknown.
        """
        listed = self.files.classes
        if listed:
            return class_name.lower() in listed
        return all(len(self.tokenizer.tokenize(word)) == 1 for word in re.findall(r"[^\W\d_]+", class_name))

    @property
    def vocabularies(self) -> dict[str, Tensor]:
        """(V, d) by text encoder: the input embeddings of all tokens."""
        return {tower.name: tower.vocabulary for tower in self.towers}

    def class_embeddings(self, class_name: str) -> dict[str, Tensor]:
        """(d,) by text encoder: the mean of the class word's token embeddings."""
        ids = torch.tensor(self.tokenizer(class_name, add_special_tokens=False).input_ids, device=self.device)
        return {encoder: vectors[ids].mean(dim=0).float() for encoder, vectors in self.vocabularies.items()}

    def encode_text(
        self, prompts: Sequence[TokenizedPrompt], embeddings: Sequence[Mapping[str, Tensor]] = ()
    ) -> Conditioning:
        """Encode prompts for `predict`, for whole pictures of the native size (see `Conditioning.framed`).

        Args:
            prompts: N tokenized prompts.
            embeddings: (d,) by text encoder for each learned token's place, over all the prompts in order. They are
                put in at the text encoders' input; vocabularies are not touched.

        Returns:
            One batch axis, of N.
        """
        sized = self.family.sized
        outputs = [
            tower.encode(prompts, [one[tower.name] for one in embeddings], hidden=sized) for tower in self.towers
        ]
        return self._condition(outputs, [prompt.absent for prompt in prompts])

    def encode_tokens(self, ids: Tensor, learned: Tensor, embeddings: Mapping[str, Tensor]) -> Conditioning:
        """Encode prompts as `encode_text` does, of shapes that depend on nothing but how many there are.

        Args:
            ids: (N, L) on the base's device, as `padded` has them.
            learned: (N, L), which of the embeddings stands in each place; -1: none.
            embeddings: (E, d) by text encoder.

        Returns:
            One batch axis, of N.
        """
        sized = self.family.sized
        outputs = [tower.encode_tokens(ids, learned, embeddings[tower.name], hidden=sized) for tower in self.towers]
        return self._condition(outputs, [False] * len(ids))

    def padded(self, prompts: Sequence[TokenizedPrompt]) -> Tensor:
        """(N, L) token ids of N prompts, on the CPU; -1 beyond a prompt's end."""
        return padded_ids(prompts, self.tokenizer.model_max_length)

    def _condition(self, outputs: Sequence[Any], absent: Sequence[bool]) -> Conditioning:
        if not self.family.sized:
            return Conditioning(outputs[0].last_hidden_state)
        return stable_diffusion_xl.condition(outputs, Frame.whole(self.resolution, self.resolution), absent)

    def embed_text(
        self, prompts: Sequence[TokenizedPrompt], vectors: Sequence[Tensor] = (), *, encoder: str = ""
    ) -> Tensor:
        """(N, D) projected text embeddings, comparable with `encode_images`.

        Args:
            prompts: N tokenized prompts.
            vectors: (d,) for each learned token's place, over all the prompts in order.
            encoder: which text encoder's, one of `joint_encoders`; default: the first.
        """
        return self._tower(encoder).embed(prompts, vectors)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, *, encoder: str = "") -> Tensor:
        """(N, D) projected image embeddings of pixels (N, 3, R, R) in [0, 1], in the space of a text encoder."""
        joint = self._tower(encoder).joint
        assert joint is not None
        prepared = prepare_pixels(pixels, joint.image.config.image_size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        embedded: Tensor = joint.image(prepared).image_embeds
        return embedded

    def _tower(self, encoder: str) -> Tower:
        return next(tower for tower in self.towers if tower.name == (encoder or self.towers[0].name))

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor) -> Tensor:
        """(N, C, h, h) scaled latents (the posterior's mean) of pixels (N, 3, R, R) in [0, 1]."""
        latents: Tensor = self.vae.encode((pixels * 2 - 1).to(self.vae.dtype)).latent_dist.mode().float()
        return latents * float(self.vae.config["scaling_factor"])

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) pixels in [0, 1] of scaled latents (N, C, h, w)."""
        scaled = latents.float() / self.vae.config["scaling_factor"]
        pixels: Tensor = self.vae.decode(scaled.to(self.vae.dtype)).sample.float()
        return (pixels / 2 + 0.5).clamp(0, 1)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output (N, C, h, w), float32, for noised latents, timesteps (N,) and N encoded prompts."""
        dtype = self.unet.dtype
        told = {name: part.to(dtype) for name, part in conditioning.told.items()}
        states = conditioning.states.to(dtype)
        output: Tensor = self.unet(latents.to(dtype), timesteps, states, added_cond_kwargs=told).sample
        return output.float()


def prepare_pixels(pixels: Tensor, edge: int, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """(N, 3, edge, edge) as an image encoder takes them, of pictures (N, 3, H, W) in [0, 1].

    Args:
        pixels: the pictures.
        edge: what the encoder looks at.
        mean: of each colour, where the encoder was trained.
        deviation: of each colour, there.
    """
    if pixels.shape[-2:] != (edge, edge):
        pixels = F.interpolate(pixels, size=(edge, edge), mode="bicubic", antialias=True).clamp(0, 1)
    shape = (3, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(deviation).view(shape)
