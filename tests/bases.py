"""Bases of real families' classes, configs and file layouts, with few and random weights."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from objdrive.base.files import EMBEDDED
from objdrive.base.single_file import CONFIGS

_SMALL_UNET = {
    "sd15": {"block_out_channels": [16, 16], "attention_head_dim": 2, "cross_attention_dim": 32},
    "sd21": {"block_out_channels": [16, 16], "attention_head_dim": [2, 2], "cross_attention_dim": 32},
    "sdxl": {
        "block_out_channels": [16, 32],
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 56,
        "transformer_layers_per_block": [1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
}
_BLOCKS = {
    "sd15": (["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]),
    "sd21": (["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]),
    "sdxl": (["DownBlock2D", "CrossAttnDownBlock2D"], ["CrossAttnUpBlock2D", "UpBlock2D"]),
}


def full_config(kind, part):
    """A part's config at its full size."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return json.loads((CONFIGS / kind / part / name).read_text())


def small_unet_config(kind, sample_size=8):
    down, up = _BLOCKS[kind]
    small = {"sample_size": sample_size, "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": down, "up_block_types": up}
    return full_config(kind, "unet") | small | blocks | _SMALL_UNET[kind]


def small_vae_config(kind):
    small = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return full_config(kind, "vae") | small | blocks


def small_text_config(kind, part="text_encoder", **changes):
    tokens = tokenizer()
    second = part == "text_encoder_2"
    small = {
        "vocab_size": len(tokens),
        "hidden_size": 24 if second else 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3 if second else 2,
        "num_attention_heads": 4,
        "projection_dim": 24,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
    }
    return CLIPTextConfig(**full_config(kind, part) | small | changes)


def tokenizer(**changes):
    return CLIPTokenizer.from_pretrained(EMBEDDED / "tiny64" / "tokenizer", model_max_length=77, **changes)


def vision_config():
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        projection_dim=24,
    )


def write_clip(folder, text):
    """A CLIP of which `text` is the text tower's config; returns it."""
    joint = CLIPConfig(text_config=text.to_dict(), vision_config=vision_config().to_dict(), projection_dim=24)
    clip = CLIPModel(joint)
    clip.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return clip


def scheduler(kind, **changes):
    return DDIMScheduler.from_config(full_config(kind, "scheduler") | changes)


def write_sd15(snapshot, clip):
    whole = write_clip(clip, small_text_config("sd15", projection_dim=24))
    encoder = CLIPTextModel(small_text_config("sd15"))
    encoder.load_state_dict(whole.text_model.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(small_vae_config("sd15")),
        text_encoder=encoder,
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel.from_config(small_unet_config("sd15")),
        scheduler=scheduler("sd15"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(snapshot)


def write_sd21(snapshot, clip):
    """As SD 2.1 ships: its text encoder is the CLIP's without the last layer, and it predicts the velocity."""
    whole = write_clip(clip, small_text_config("sd21", num_hidden_layers=3, projection_dim=24))
    encoder = CLIPTextModel(small_text_config("sd21"))
    encoder.load_state_dict(whole.text_model.state_dict(), strict=False)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(small_vae_config("sd21")),
        text_encoder=encoder,
        tokenizer=tokenizer(pad_token="!"),
        unet=UNet2DConditionModel.from_config(small_unet_config("sd21")),
        scheduler=scheduler("sd21"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(snapshot)


def write_sdxl(snapshot, clip, *, seeing=False, eos=None, **scheduling):
    """As SDXL ships; with `seeing` there is an image tower for its second text encoder too."""
    whole = write_clip(clip, small_text_config("sdxl"))
    first = CLIPTextModel(small_text_config("sdxl"))
    first.load_state_dict(whole.text_model.state_dict())
    second = small_text_config("sdxl", "text_encoder_2", **({} if eos is None else {"eos_token_id": eos}))
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_config(small_vae_config("sdxl")),
        text_encoder=first,
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(pad_token="!"),
        unet=UNet2DConditionModel.from_config(small_unet_config("sdxl", 32)),
        scheduler=scheduler("sdxl", **scheduling),
    )
    pipeline.save_pretrained(snapshot)
    if seeing:
        CLIPVisionModelWithProjection(vision_config()).save_pretrained(snapshot / "image_encoder_2")


def written(folder, write, **options):
    """(snapshot, CLIP) folders, written with weights of one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        write(folder / "snapshot", folder / "clip", **options)
    return folder / "snapshot", folder / "clip"
