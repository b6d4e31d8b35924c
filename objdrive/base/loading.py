"""A base's towers and autoencoder, from its files."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from objdrive.base.files import BaseFiles
from objdrive.base.towers import JointSpace, Tower


def load_towers(files: BaseFiles, device: str, dtype: torch.dtype) -> tuple[Tower, ...]:
    """The text encoders in the order of the family's, frozen on a device, and the image towers at hand."""
    towers = [_load_first(files, dtype)]
    if len(files.family.text_encoders) > 1:
        towers.append(_load_second(files, dtype))
    for tower in towers:
        parts = [tower.encoder, *((tower.joint.text, tower.joint.projection) if tower.joint else ())]
        for part in filter(None, parts):
            part.to(device, dtype).eval().requires_grad_(False)
        if tower.joint is not None:
            tower.joint.image.to(device, torch.float32).eval().requires_grad_(False)
    return tuple(towers)


def load_vae(files: BaseFiles, dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder, in float32: most overflow in less.

    One that a user named (see `find_base`), and whose config says ``force_upcast: false``, is in `dtype`.
    """
    if files.vae is None:
        folder, variant = files.snapshot / "vae", files.variant("vae")
        return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, variant=variant, use_safetensors=True)
    vae = AutoencoderKL.from_pretrained(files.vae, torch_dtype=torch.float32, use_safetensors=True)
    return vae.float() if vae.config["force_upcast"] else vae.to(dtype)


def _load_first(files: BaseFiles, dtype: torch.dtype) -> Tower:
    name, folder = files.family.text_encoders[0], files.snapshot / "text_encoder"
    encoder = CLIPTextModel.from_pretrained(
        folder, dtype=dtype, variant=files.variant("text_encoder"), use_safetensors=True
    )
    tokenizer = CLIPTokenizer.from_pretrained(files.snapshot / "tokenizer")
    if files.clip is None:
        weight = load_file(files.snapshot / "text_projection" / "model.safetensors")["weight"]
        image = CLIPVisionModelWithProjection.from_pretrained(files.snapshot / "image_encoder", use_safetensors=True)
        return Tower(name, tokenizer, encoder, JointSpace(encoder, _projection(weight), image))
    clip: Any = CLIPModel.from_pretrained(files.clip, use_safetensors=True)
    image = CLIPVisionModelWithProjection(clip.config.vision_config)
    image.vision_model.load_state_dict(clip.vision_model.state_dict())
    image.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    # SD 2.x conditions on a tower without its last layer, whose output the projection does not take.
    shorter = encoder.config.num_hidden_layers < clip.config.text_config.num_hidden_layers
    text = clip.text_model if shorter else encoder
    return Tower(name, tokenizer, encoder, JointSpace(text, _projection(clip.text_projection.weight.detach()), image))


def _load_second(files: BaseFiles, dtype: torch.dtype) -> Tower:
    """Its projection is its own; its image tower is large, and at hand only where a snapshot has it."""
    folder = files.snapshot / "text_encoder_2"
    encoder = CLIPTextModelWithProjection.from_pretrained(
        folder, dtype=dtype, variant=files.variant(folder.name), use_safetensors=True
    )
    tokenizer = CLIPTokenizer.from_pretrained(files.snapshot / "tokenizer_2")
    seeing = files.snapshot / "image_encoder_2"
    joint = None
    if seeing.is_dir():
        joint = JointSpace(encoder, None, CLIPVisionModelWithProjection.from_pretrained(seeing, use_safetensors=True))
    return Tower(files.family.text_encoders[1], tokenizer, encoder, joint)


def _projection(weight: torch.Tensor) -> nn.Linear:
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.weight = nn.Parameter(weight)
    return projection
