"""An adapter, and its files as stock diffusers loads them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from objdrive.adapters.artifact import EMBEDDING_FILE, LORA_FILE
from objdrive.base.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, Family
from objdrive.errors import ObjdriveError

LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """What a fine-tune yields for one object.

    `lora` maps ``"<module path in the network>.lora_A.weight"`` to a (rank, in) tensor and ``".lora_B.weight"`` to
    (out, rank), of convolutions (rank, in, kh, kw) and (out, rank, 1, 1); the scale is 1, any alpha is folded in. It is
    empty for methods that learn only embeddings. `embeddings` holds the (d,) input embedding of the object's token by
    text encoder, such as ``"clip_l"``.
    """

    lora: dict[str, Tensor]
    embeddings: dict[str, Tensor]

    def in_half_precision(self) -> "Adapter":
        """The same with LoRA in float16: half the bytes, and pictures that nobody can tell apart.

        Embeddings are few and stay as they are.
        """
        return Adapter({name: tensor.half() for name, tensor in self.lora.items()}, self.embeddings)

    @property
    def rank(self) -> int:
        """The highest rank of its layers; 0 without LoRA."""
        return max((len(tensor) for key, tensor in self.lora.items() if key.endswith(LORA_A)), default=0)


def adapter_files(adapter: Adapter, *, token: str, family: Family) -> dict[str, bytes]:
    """Return the adapter's files by name, as ``load_lora_weights`` and ``load_textual_inversion`` read them.

    An adapter without LoRA has no `LORA_FILE`: diffusers rejects an empty one. Raises ObjdriveError, naming
    the tensor, for an adapter that `parse_adapter` would refuse, such as one with NaNs after a diverged
    fine-tune.
    """
    _check_adapter(adapter)
    files = {EMBEDDING_FILE: _save(family.embedding_tensors(adapter.embeddings, token))}
    if adapter.lora:
        files[LORA_FILE] = _save({family.lora_prefix + key: tensor for key, tensor in adapter.lora.items()})
    return files


def family_of_files(files: Mapping[str, bytes]) -> Family:
    """The family of the base that an artifact's files were made for, by the text encoders that they name."""
    named = set(_load(EMBEDDING_FILE, files[EMBEDDING_FILE])) if EMBEDDING_FILE in files else set()
    return STABLE_DIFFUSION_XL if named == set(STABLE_DIFFUSION_XL.text_encoders) else STABLE_DIFFUSION


def parse_adapter(files: Mapping[str, bytes], *, token: str, family: Family) -> Adapter:
    """Return the adapter that `files` (an artifact's files by name; others are ignored) hold, on the CPU.

    Raises ObjdriveError, naming the file or tensor, for a missing or unreadable file, a foreign tensor name,
    shapes that do not pair up, and values that are not finite floating-point numbers.
    """
    if EMBEDDING_FILE not in files:
        raise ObjdriveError(f"the artifact has no {EMBEDDING_FILE}; fine-tune the object again")
    embeddings = family.read_embeddings(_load(EMBEDDING_FILE, files[EMBEDDING_FILE]), token)
    lora = _load(LORA_FILE, files[LORA_FILE]) if LORA_FILE in files else {}
    for key in lora:
        if not key.startswith(family.lora_prefix):
            raise ObjdriveError(f"{LORA_FILE}: tensor {key!r} is not named {family.lora_prefix}<module path>...")
    adapter = Adapter({key.removeprefix(family.lora_prefix): lora[key] for key in lora}, embeddings)
    _check_adapter(adapter)
    return adapter


def _save(tensors: Mapping[str, Tensor]) -> bytes:
    # Adapters trained as a group are slices of stacked tensors; safetensors takes only contiguous ones.
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(own, metadata={"format": "pt"})


def _load(name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ObjdriveError(f"{name} is not a readable safetensors file: {error}") from error


def _check_adapter(adapter: Adapter) -> None:
    for encoder, vector in adapter.embeddings.items():
        _check_tensor(f"the embedding for {encoder!r}", vector, dimensions=(1,))
    for key, tensor in adapter.lora.items():
        if not key.endswith((LORA_A, LORA_B)):
            raise ObjdriveError(f"LoRA tensor {key!r} is not named <module path>{LORA_A} or {LORA_B}")
        _check_tensor(f"LoRA tensor {key!r}", tensor, dimensions=(2, 4))
    modules = dict.fromkeys(key.removesuffix(LORA_A).removesuffix(LORA_B) for key in adapter.lora)
    for module in modules:
        down, up = adapter.lora.get(module + LORA_A), adapter.lora.get(module + LORA_B)
        if down is None or up is None:
            raise ObjdriveError(f"LoRA module {module!r} has only one of {LORA_A} and {LORA_B}")
        if down.shape[0] != up.shape[1]:
            raise ObjdriveError(
                f"LoRA module {module!r}: {LORA_A} {tuple(down.shape)} and {LORA_B} {tuple(up.shape)} "
                "differ in rank; expected (rank, in) and (out, rank)"
            )


def _check_tensor(what: str, tensor: Tensor, *, dimensions: tuple[int, ...]) -> None:
    if tensor.ndim not in dimensions or tensor.numel() == 0:
        expected = " or ".join(map(str, dimensions))
        raise ObjdriveError(f"{what} has shape {tuple(tensor.shape)}, expected {expected} dimension(s)")
    if not tensor.is_floating_point():
        raise ObjdriveError(f"{what} has dtype {tensor.dtype}, expected a floating-point one")
    if not _finite(tensor):
        raise ObjdriveError(f"{what} has values that are not finite; fine-tune at a lower learning rate")


def _finite(tensor: Tensor) -> bool:
    # By NumPy: PyTorch starts a team of threads for each thread that loads adapters, and keeps it.
    known = tensor if tensor.dtype in (torch.float16, torch.float32, torch.float64) else tensor.float()
    return bool(np.isfinite(known.detach().cpu().numpy()).all())
