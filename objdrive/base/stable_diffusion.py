"""Stable Diffusion 1.x and 2.x: the frozen network, and text, image and latent encoding."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from objdrive.base.conditioning import Conditioning
from objdrive.base.family import STABLE_DIFFUSION, Family
from objdrive.base.files import BaseFiles, find_base
from objdrive.base.noise import NoiseProcess
from objdrive.base.prompts import TokenizedPrompt, token_ids


@dataclass
class Base:
    """A frozen base on one device. Make one with `Base.load`.

    Attributes:
        family: what it sets for its adapters.
        files: where its files lie.
        fingerprint: of all its weights, see `BaseFiles.fingerprint`.
        noise: how it adds noise and takes it away.
    """

    family: ClassVar[Family] = STABLE_DIFFUSION

    files: BaseFiles
    fingerprint: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    text_projection: nn.Linear
    image_encoder: CLIPVisionModelWithProjection
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise: NoiseProcess

    @classmethod
    def load(
        cls,
        name: str,
        *,
        clip: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Base":
        """Load a base (see `find_base`), frozen, in evaluation mode.

        Args:
            name: embedded base, folder or hub id.
            clip: see `find_base`.
            device: default ``cuda`` where there is one, else ``cpu``.
            dtype: of the UNet and the text encoder; default bfloat16 on CUDA, float32 elsewhere. The autoencoder
                and the image tower, each used a few times per object, stay in float32.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        files = find_base(name, clip=clip)
        image_encoder, text_projection = _load_towers(files)
        scheduler = DDIMScheduler.from_pretrained(files.snapshot / "scheduler", clip_sample=False)
        frozen = {
            "text_encoder": CLIPTextModel.from_pretrained(files.snapshot / "text_encoder", dtype=dtype),
            "unet": UNet2DConditionModel.from_pretrained(files.snapshot / "unet", torch_dtype=dtype),
            "vae": AutoencoderKL.from_pretrained(files.snapshot / "vae", torch_dtype=torch.float32),
            "image_encoder": image_encoder.float(),
            "text_projection": text_projection.to(dtype),
        }
        for part in frozen.values():
            part.to(device).eval().requires_grad_(False)
        if device == "cpu":
            # On a processor, convolutions spare themselves two copies each that way.
            frozen["unet"].to(memory_format=torch.channels_last)
        return cls(
            files=files,
            fingerprint=files.fingerprint(),
            tokenizer=CLIPTokenizer.from_pretrained(files.snapshot / "tokenizer"),
            noise=NoiseProcess.of(scheduler, device),
            **frozen,
        )

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
        """Edge of the latents."""
        return int(self.unet.config["sample_size"])

    @property
    def resolution(self) -> int:
        """Edge of the pictures in pixels."""
        return self.latent_size << (len(self.vae.config["block_out_channels"]) - 1)

    def tokenize(self, text: str) -> TokenizedPrompt:
        """Tokenize a text in which `TOKEN_MARK` stands for each learned token.

        Raises:
            InvalidPrompt: the text is longer than the text encoder reads.
        """
        ids, places = token_ids(self.tokenizer, text)
        ids += [self.tokenizer.pad_token_id] * (self.tokenizer.model_max_length - len(ids))
        return TokenizedPrompt(torch.tensor(ids), tuple(places))

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
        return {self.family.text_encoder: self.text_encoder.get_input_embeddings().weight}

    def class_embeddings(self, class_name: str) -> dict[str, Tensor]:
        """(d,) by text encoder: the mean of the class word's token embeddings."""
        ids = torch.tensor(self.tokenizer(class_name, add_special_tokens=False).input_ids, device=self.device)
        return {encoder: vectors[ids].mean(dim=0).float() for encoder, vectors in self.vocabularies.items()}

    def encode_text(
        self, prompts: Sequence[TokenizedPrompt], embeddings: Sequence[Mapping[str, Tensor]] = ()
    ) -> Conditioning:
        """Encode prompts for `predict`.

        Args:
            prompts: N tokenized prompts.
            embeddings: (d,) by text encoder for each learned token's place, over all the prompts in order. They are
                put in at the text encoders' input; vocabularies are not touched.

        Returns:
            One batch axis, of N.
        """
        return Conditioning(self._encode(prompts, embeddings).last_hidden_state)

    def encode_tokens(self, ids: Tensor, learned: Tensor, embeddings: Mapping[str, Tensor]) -> Conditioning:
        """Encode prompts as `encode_text` does, of shapes that depend on nothing but how many there are.

        Args:
            ids: (N, L) on the base's device, padded.
            learned: (N, L), which of the embeddings stands in each place; -1: none.
            embeddings: (E, d) by text encoder.

        Returns:
            One batch axis, of N.
        """
        return Conditioning(self._encode_with(ids, learned, embeddings[self.family.text_encoder]).last_hidden_state)

    def embed_text(self, prompts: Sequence[TokenizedPrompt], embeddings: Sequence[Mapping[str, Tensor]] = ()) -> Tensor:
        """(N, D) projected text embeddings, comparable with `encode_images`; arguments as for `encode_text`."""
        embedded: Tensor = self.text_projection(self._encode(prompts, embeddings).pooler_output)
        return embedded.float()

    def _encode(self, prompts: Sequence[TokenizedPrompt], embeddings: Sequence[Mapping[str, Tensor]]) -> Any:
        ids = torch.stack([prompt.ids for prompt in prompts]).to(self.device)
        places = [(row, place) for row, prompt in enumerate(prompts) for place in prompt.places]
        if len(places) != len(embeddings):
            raise ValueError(
                f"the prompts have {len(places)} places for learned tokens, got {len(embeddings)} embeddings"
            )
        if not places:
            return self.text_encoder(ids)
        learned = torch.full(ids.shape, -1)
        learned[tuple(zip(*places, strict=True))] = torch.arange(len(places))
        return self._encode_with(
            ids, learned.to(self.device), torch.stack([one[self.family.text_encoder] for one in embeddings])
        )

    def _encode_with(self, ids: Tensor, learned: Tensor, vectors: Tensor) -> Any:
        def put_in(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.where(learned[..., None] >= 0, vectors.to(output)[learned.clamp(min=0)], output)

        hook = self.text_encoder.get_input_embeddings().register_forward_hook(put_in)
        try:
            return self.text_encoder(ids)
        finally:
            hook.remove()

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(N, D) projected image embeddings of pixels (N, 3, R, R) in [0, 1]."""
        prepared = prepare_pixels(pixels, self.image_encoder.config.image_size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        embedded: Tensor = self.image_encoder(prepared).image_embeds
        return embedded

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor) -> Tensor:
        """(N, C, h, h) scaled latents (the posterior's mean) of pixels (N, 3, R, R) in [0, 1]."""
        latents: Tensor = self.vae.encode(pixels * 2 - 1).latent_dist.mode() * self.vae.config["scaling_factor"]
        return latents

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """(N, 3, R, R) pixels in [0, 1] of scaled latents (N, C, h, h)."""
        pixels: Tensor = self.vae.decode(latents.float() / self.vae.config["scaling_factor"]).sample
        return (pixels / 2 + 0.5).clamp(0, 1)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output (N, C, h, h), float32, for noised latents, timesteps (N,) and N encoded prompts."""
        dtype = self.unet.dtype
        output: Tensor = self.unet(latents.to(dtype), timesteps, conditioning.states.to(dtype)).sample
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


def _load_towers(files: BaseFiles) -> tuple[CLIPVisionModelWithProjection, nn.Linear]:
    """The image tower with its projection, and the text tower's projection."""
    if files.clip is None:
        weight = load_file(files.snapshot / "text_projection" / "model.safetensors")["weight"]
        image_encoder = CLIPVisionModelWithProjection.from_pretrained(files.snapshot / "image_encoder")
    else:
        clip = CLIPModel.from_pretrained(files.clip)
        weight = clip.text_projection.weight.detach()
        image_encoder = CLIPVisionModelWithProjection(clip.config.vision_config)
        image_encoder.vision_model.load_state_dict(clip.vision_model.state_dict())
        image_encoder.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    text_projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    text_projection.weight = nn.Parameter(weight)
    return image_encoder, text_projection
