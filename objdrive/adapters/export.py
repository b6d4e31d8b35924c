"""Adapters in the forms of other tools: kohya's names for LoRA, an embedding beside it, and what tools show of both.

Names follow kohya-ss/sd-scripts (``networks/lora.py``), which ComfyUI (``comfy/lora.py``), AUTOMATIC1111's web UI and
diffusers read; layers are named as in diffusers' UNet. Metadata follows Stability AI's model metadata standard 1.0.1
(https://github.com/Stability-AI/ModelSpec).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from objdrive.adapters.adapter import LORA_A, LORA_B, Adapter, adapter_files
from objdrive.adapters.artifact import ArtifactMetadata
from objdrive.adapters.formats import ExportFormat
from objdrive.base.family import Family
from objdrive.errors import ObjdriveError

_FOLDERS = {
    "kohya": ("lora", "embeddings"),
    "a1111": ("models/Lora", "embeddings"),
    "comfyui": ("models/loras", "models/embeddings"),
}
"""Where each tool looks for LoRA and for embeddings, below its own folder."""
_KOHYA_PREFIX = "lora_unet_"
_EMBEDDING_KEY = "emb_params"
_WIDTH_V1, _WIDTH_V2 = 768, 1024


@dataclass(frozen=True)
class Exported:
    """Files by path, and how a prompt names the object in the tool that they are for."""

    files: Mapping[str, bytes]
    prompt: str


def export_adapter(adapter: Adapter, metadata: ArtifactMetadata, format: ExportFormat, *, family: Family) -> Exported:
    """The adapter as files of another tool.

    The object's id names the files, and with them the embedding: AUTOMATIC1111's web UI and ComfyUI know an embedding
    by its file's name.

    Raises:
        ObjdriveError: the adapter can't be written in that form.
    """
    if format == "diffusers":
        files = adapter_files(adapter, token=metadata.token, family=family)
        return Exported(files, f"a photo of {metadata.phrase}")
    if len(family.text_encoders) > 1:
        raise ObjdriveError(
            f"{metadata.object_id!r} was made for {family.name}, whose adapters are not written as {format} yet: use "
            "--format diffusers"
        )
    lora, embeddings = (f"{folder}/{metadata.object_id}.safetensors" for folder in _FOLDERS[format])
    trigger = _trigger(metadata, format)
    (vector,) = adapter.embeddings.values()
    # (1, d): as many vectors as the token has.
    vectors = {_EMBEDDING_KEY: vector[None]}
    files = {embeddings: _save(vectors, _about(adapter, metadata, "textual-inversion", trigger))}
    if adapter.lora:
        files[lora] = _save(kohya_tensors(adapter.lora), _about(adapter, metadata, "lora", trigger))
    activation = f" <lora:{metadata.object_id}:1>" if format == "a1111" and adapter.lora else ""
    return Exported(files, f"a photo of {trigger}{activation}")


def kohya_tensors(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA under kohya's names; see `Adapter.lora`.

    A linear layer has (rank, in) down and (out, rank) up, a convolution (LoCon) (rank, in, kh, kw) down and
    (out, rank, 1, 1) up. Readers scale by alpha / rank; any alpha is folded in here, so that it is the rank.

    Raises:
        ObjdriveError: two layers would get one name.
    """
    tensors: dict[str, Tensor] = {}
    for key in (key for key in lora if key.endswith(LORA_A)):
        module = key.removesuffix(LORA_A)
        name = _KOHYA_PREFIX + module.replace(".", "_")
        if f"{name}.alpha" in tensors:
            raise ObjdriveError(f"the LoRA of {module!r} would be named {name!r}, as another layer's is")
        tensors[f"{name}.lora_down.weight"] = lora[key]
        tensors[f"{name}.lora_up.weight"] = lora[module + LORA_B]
        tensors[f"{name}.alpha"] = torch.tensor(float(len(lora[key])))
    return tensors


def _trigger(metadata: ArtifactMetadata, format: ExportFormat) -> str:
    name = f"embedding:{metadata.object_id}" if format == "comfyui" else metadata.object_id
    return metadata.phrase.replace(metadata.token, name)


def _about(adapter: Adapter, metadata: ArtifactMetadata, kind: str, trigger: str) -> dict[str, str]:
    """What a file says of itself; `kind` as the standard has it: ``lora`` or ``textual-inversion``."""
    (width,) = {len(vector) for vector in adapter.embeddings.values()}
    architecture, resolution = _architecture(metadata.base.id, width)
    about = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": metadata.object_id,
        "modelspec.resolution": resolution,
        "modelspec.description": f"one product: a {metadata.class_name}",
        "modelspec.date": metadata.created,
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": f"a photo of {trigger} on grass; load the LoRA and the embedding together",
        "objdrive.digest": metadata.digest,
        "objdrive.base": f"{metadata.base.id} {metadata.base.fingerprint}",
    }
    if kind == "lora":
        rank = str(adapter.rank)
        about |= {
            # By these the web UI tells what a LoRA is for.
            "ss_base_model_version": "sd_v2" if _is_v2(width) else "sd_v1",
            "ss_v2": str(_is_v2(width)),
            "ss_output_name": metadata.object_id,
            "ss_network_module": "networks.lora",
            "ss_network_dim": rank,
            "ss_network_alpha": rank,
            "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": rank}),
        }
    return {name: value for name, value in about.items() if value}


def _architecture(base: str, width: int) -> tuple[str, str]:
    """The standard's name for a base, told by the width of its text states, and its resolution; else the base's own."""
    if width == _WIDTH_V1:
        return "stable-diffusion-v1", "512x512"
    if not _is_v2(width):
        return base, ""
    small = base.rstrip("/").endswith("-base")
    return ("stable-diffusion-v2-512", "512x512") if small else ("stable-diffusion-v2-768-v", "768x768")


def _is_v2(width: int) -> bool:
    return width == _WIDTH_V2


def _save(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(own, metadata={"format": "pt", **about})
