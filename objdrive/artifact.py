"""An adapter as files: the folder that stock diffusers loads, its key, and what vouches for it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata as distributions
from typing import Annotated, Any, Final, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, FiniteFloat, StringConstraints
from pydantic_core import to_jsonable_python
from safetensors import SafetensorError
from torch import Tensor

from objdrive.errors import ObjdriveError

SCHEMA_VERSION: Final = 1

LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDING_FILE = "learned_embeds.safetensors"
METADATA_FILE = "artifact.json"

OBJECT_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
DIGEST_PATTERN = r"^[0-9a-f]{32}$"
FILE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$"

_UNET = "unet."
_LORA_A = ".lora_A.weight"
_LORA_B = ".lora_B.weight"


@dataclass(frozen=True)
class Member:
    """One object of a fine-tune, as far as the result depends on it.

    `mask_sha256` is empty when the image's own alpha channel is the mask.
    """

    image_sha256: str
    mask_sha256: str
    class_name: str


def adapter_digest(members: Sequence[Member], *, recipe_digest: str, base_fingerprint: str, method_version: int) -> str:
    """Return the key of an artifact: 32 hexadecimal digits of a SHA-256 over all that the result depends on.

    `members` holds one object, or all objects of a scene in the order of their object ids. Objects of a scene
    share the digest; each has its own folder.
    """
    keyed = {
        "members": [asdict(member) for member in members],
        "recipe": recipe_digest,
        "base": base_fingerprint,
        "method_version": method_version,
    }
    canonical = json.dumps(keyed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Adapter:
    """What a fine-tune yields for one object.

    `lora` maps ``"<module path in the UNet>.lora_A.weight"`` to a (rank, in) tensor and
    ``".lora_B.weight"`` to (out, rank); the scale is 1, any alpha is folded in. It is empty for methods
    that learn only the embedding. `embedding` is the (d,) input embedding of the object's token.
    """

    lora: dict[str, Tensor]
    embedding: Tensor


def adapter_files(adapter: Adapter, *, token: str) -> dict[str, bytes]:
    """Return the adapter's files by name, as ``load_lora_weights`` and ``load_textual_inversion`` read them.

    An adapter without LoRA has no `LORA_FILE`: diffusers rejects an empty one. Raises ObjdriveError, naming
    the tensor, for an adapter that `parse_adapter` would refuse, such as one with NaNs after a diverged
    fine-tune.
    """
    _check_adapter(adapter)
    files = {EMBEDDING_FILE: _save({token: adapter.embedding})}
    if adapter.lora:
        files[LORA_FILE] = _save({_UNET + key: tensor for key, tensor in adapter.lora.items()})
    return files


def parse_adapter(files: Mapping[str, bytes], *, token: str) -> Adapter:
    """Return the adapter that `files` (an artifact's files by name; others are ignored) hold, on the CPU.

    Raises ObjdriveError, naming the file or tensor, for a missing or unreadable file, a foreign tensor name,
    shapes that do not pair up, and values that are not finite floating-point numbers.
    """
    if EMBEDDING_FILE not in files:
        raise ObjdriveError(f"the artifact has no {EMBEDDING_FILE}; fine-tune the object again")
    embeddings = _load(EMBEDDING_FILE, files[EMBEDDING_FILE])
    if set(embeddings) != {token}:
        raise ObjdriveError(f"{EMBEDDING_FILE} holds tokens {sorted(embeddings)}, expected only {token!r}")
    lora = _load(LORA_FILE, files[LORA_FILE]) if LORA_FILE in files else {}
    for key in lora:
        if not key.startswith(_UNET):
            raise ObjdriveError(f"{LORA_FILE}: tensor {key!r} is not named {_UNET}<module path>...")
    adapter = Adapter({key.removeprefix(_UNET): lora[key] for key in lora}, embeddings[token])
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
    _check_tensor("the embedding", adapter.embedding, dimensions=1)
    for key, tensor in adapter.lora.items():
        if not key.endswith((_LORA_A, _LORA_B)):
            raise ObjdriveError(f"LoRA tensor {key!r} is not named <module path>{_LORA_A} or {_LORA_B}")
        _check_tensor(f"LoRA tensor {key!r}", tensor, dimensions=2)
    modules = dict.fromkeys(key.removesuffix(_LORA_A).removesuffix(_LORA_B) for key in adapter.lora)
    for module in modules:
        down, up = adapter.lora.get(module + _LORA_A), adapter.lora.get(module + _LORA_B)
        if down is None or up is None:
            raise ObjdriveError(f"LoRA module {module!r} has only one of {_LORA_A} and {_LORA_B}")
        if down.shape[0] != up.shape[1]:
            raise ObjdriveError(
                f"LoRA module {module!r}: {_LORA_A} {tuple(down.shape)} and {_LORA_B} {tuple(up.shape)} "
                "differ in rank; expected (rank, in) and (out, rank)"
            )


def _check_tensor(what: str, tensor: Tensor, *, dimensions: int) -> None:
    if tensor.ndim != dimensions or tensor.numel() == 0:
        raise ObjdriveError(f"{what} has shape {tuple(tensor.shape)}, expected {dimensions} dimension(s)")
    if not tensor.is_floating_point():
        raise ObjdriveError(f"{what} has dtype {tensor.dtype}, expected a floating-point one")
    if not torch.isfinite(tensor).all():
        raise ObjdriveError(f"{what} has values that are not finite; fine-tune at a lower learning rate")


def _jsonable(value: object) -> Any:
    # Manifest columns hold what Parquet holds (timestamps, decimals, bytes, NaN); metadata is JSON.
    return to_jsonable_python(value, fallback=str, bytes_mode="base64", inf_nan_mode="null")


ObjectId = Annotated[str, StringConstraints(pattern=OBJECT_ID_PATTERN)]
FileName = Annotated[str, StringConstraints(pattern=FILE_NAME_PATTERN)]
JsonObject = Annotated[dict[str, Any], BeforeValidator(_jsonable)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SceneMember(_Record):
    """One object of the scene that an adapter was fine-tuned on."""

    object_id: ObjectId
    class_name: str
    token: str


class BaseRef(_Record):
    """The base that an adapter belongs to."""

    id: str
    fingerprint: str


class SourceRecord(_Record):
    """Where a picture was read from: its size in bytes and its mark (ETag, modification time or the like)."""

    uri: str
    size: int
    mark: str


class Sources(_Record):
    """The pictures that an adapter was fine-tuned on; `mask` is None when the image's alpha is the mask."""

    image: SourceRecord
    mask: SourceRecord | None = None


class Preview(_Record):
    """A sample picture among the artifact's files."""

    file: FileName
    caption: str


class FileRecord(_Record):
    """Checksum (hexadecimal SHA-256) and size in bytes of one file."""

    sha256: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> "FileRecord":
        """Return the record of `data`."""
        return cls(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


class ArtifactMetadata(_Record):
    """What ``artifact.json`` says. A reader trusts only the files that it lists.

    `phrase` is what ``{}`` in a prompt becomes, e.g. ``"<tok> teapot"``. `scene` is empty for an object
    that was fine-tuned alone; `members` lists all objects of the scene in digest order, or the one.
    `metrics` holds losses, seconds and steps. `row` holds the manifest's free columns. `created` is ISO
    8601, UTC.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    object_id: ObjectId
    class_name: str
    token: str
    phrase: str
    digest: Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]
    scene: str = ""
    members: list[SceneMember]
    base: BaseRef
    recipe: JsonObject
    recipe_digest: str
    method_version: int
    metrics: dict[str, FiniteFloat]
    sources: Sources
    previews: list[Preview] = []
    row: JsonObject = {}
    files: dict[FileName, FileRecord] = {}
    versions: dict[str, str]
    created: str


def library_versions() -> dict[str, str]:
    """Return the versions of objdrive and of the libraries that a fine-tune's result depends on.

    A distribution that is not installed (objdrive itself, when its source tree is shipped with a job) is
    ``"source"``.
    """
    return {name: _version(name) for name in ("objdrive", "torch", "diffusers", "peft", "transformers")}


def _version(distribution: str) -> str:
    try:
        return distributions.version(distribution)
    except distributions.PackageNotFoundError:
        return "source"
