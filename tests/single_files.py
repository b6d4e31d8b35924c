"""Snapshots in diffusers' layout as single files, by the names of the original code (CompVis, Stability AI)."""

import re

import torch
from safetensors.torch import load_file, save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_NETWORK = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_MIDDLE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def network_names(blocks, layers, attended):
    """Names of the UNet's modules: diffusers' to the original ones."""
    names, index = dict(_NETWORK), 1
    for level in range(blocks):
        for layer in range(layers):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{index}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{index}.1"
            index += 1
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
        index += level < blocks - 1
    for level in range(blocks):
        for layer in range(layers + 1):
            at = f"output_blocks.{level * (layers + 1) + layer}"
            names[f"up_blocks.{level}.resnets.{layer}"] = f"{at}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"{at}.1"
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"{at}.{1 + attended[level]}.conv"
    return names


def autoencoder_names(blocks, layers):
    names = {}
    for side, count in (("encoder", layers), ("decoder", layers + 1)):
        names |= {f"{side}.{ours}": f"{side}.{theirs}" for ours, theirs in _MIDDLE.items()}
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for level in range(blocks):
            theirs = f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{blocks - 1 - level}"
            ours = f"encoder.down_blocks.{level}" if side == "encoder" else f"decoder.up_blocks.{level}"
            for layer in range(count):
                names[f"{ours}.resnets.{layer}"] = f"{theirs}.block.{layer}"
            sampler = "downsample" if side == "encoder" else "upsample"
            names[f"{ours}.{sampler}rs.0.conv"] = f"{theirs}.{sampler}.conv"
    return names


def renamed(tensors, names, inside):
    """Tensors under the original names: a module's by the longest of its beginnings that has one."""
    found = {}
    for key, tensor in tensors.items():
        start = max((ours for ours in names if key.startswith(f"{ours}.")), key=len, default="")
        rest = key.removeprefix(start)
        if ".resnets." in start:
            for ours, theirs in inside.items():
                rest = re.sub(rf"^\.{ours}\.", f".{theirs}.", rest)
        attention = ".attn_1." in names.get(start, "") and tensor.dim() == 2
        found[names.get(start, "") + rest if start else key] = tensor[..., None, None] if attention else tensor
    return found


def open_clip(tensors):
    """A text encoder with its projection, as OpenCLIP names it."""
    found = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("text_model.")
        layer = re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)$", name)
        if layer and "_proj" in layer[2] and "out_proj" not in layer[2]:
            continue
        if layer:
            name = f"transformer.resblocks.{layer[1]}.{_OPEN_CLIP[layer[2]]}.{layer[3]}"
        name = {
            "embeddings.position_embedding.weight": "positional_embedding",
            "embeddings.token_embedding.weight": "token_embedding.weight",
            "text_projection.weight": "text_projection",
        }.get(name, name.replace("final_layer_norm", "ln_final"))
        found[name] = tensor.T.contiguous() if name == "text_projection" else tensor
    start = "text_model." if any(key.startswith("text_model.") for key in tensors) else ""
    for layer in {key.split(".layers.")[1].split(".")[0] for key in tensors if ".layers." in key}:
        for kind in ("weight", "bias"):
            parts = [tensors[f"{start}encoder.layers.{layer}.self_attn.{q}_proj.{kind}"] for q in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return found


def write_single(snapshot, path, kind, *, metadata=None, extra=()):
    """A snapshot of two blocks of one layer as a single file."""
    unet, vae, text = (
        load_file(next((snapshot / part).glob("*.safetensors"))) for part in ("unet", "vae", "text_encoder")
    )
    network = network_names(2, 1, attended=(True, False) if kind == "sdxl" else (False, True))
    parts = {
        "model.diffusion_model.": renamed(unet, network, _RESNET),
        "first_stage_model.": renamed(vae, autoencoder_names(2, 1), {"conv_shortcut": "nin_shortcut"}),
    }
    if kind == "sdxl":
        parts["conditioner.embedders.0.transformer.text_model."] = text
        second = load_file(snapshot / "text_encoder_2" / "model.safetensors")
        parts["conditioner.embedders.1.model."] = open_clip(second)
    elif kind == "sd21":
        # The whole tower: its last layer is left out when it is read, and so is the projection.
        parts["cond_stage_model.model."] = open_clip(text) | {"text_projection": torch.zeros(32, 32)}
    else:
        parts["cond_stage_model.transformer.text_model."] = text
    tensors = {start + name: tensor.contiguous() for start, some in parts.items() for name, tensor in some.items()}
    save_file(tensors | {name: torch.zeros(1) for name in extra}, path, metadata=metadata or {})
    return path
