"""An adapter as files: the folder that stock diffusers loads, its key, and what vouches for it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata as distributions
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FiniteFloat, StringConstraints, model_validator
from pydantic_core import to_jsonable_python

SCHEMA_VERSION: Final = 1

LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDING_FILE = "learned_embeds.safetensors"
METADATA_FILE = "artifact.json"

OBJECT_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
DIGEST_PATTERN = r"^[0-9a-f]{32}$"
FILE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$"

PreviewKind = Literal["input", "mask", "mended_mask", "prototype", "picture"]
"""What a preview shows: the photo, its mask, the mask as it was mended, a drawing by the prototype alone, or one by
the adapter."""


@dataclass(frozen=True)
class ArtifactKey:
    """Names one artifact: the object, and which of its fine-tunes. As text: ``object_id@digest``."""

    object_id: str
    digest: str

    def __str__(self) -> str:
        return f"{self.object_id}@{self.digest}"


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
    """Where a picture was read from: its size in bytes and its mark (ETag, modification time or the like).

    `uri` lacks the signatures that it was read with; `size` is None where storage does not tell it.
    """

    uri: str
    size: int | None
    mark: str


class Sources(_Record):
    """The pictures that an adapter was fine-tuned on; `mask` is None when the image's alpha is the mask."""

    image: SourceRecord
    mask: SourceRecord | None = None


class Preview(_Record):
    """A sample picture among the artifact's files; `caption` is for people, `kind` for programs."""

    file: FileName
    kind: PreviewKind
    caption: str

    @model_validator(mode="before")
    @classmethod
    def _with_kind(cls, fields: Any) -> Any:
        # The first artifacts note captions alone.
        if isinstance(fields, dict) and "kind" not in fields and isinstance(fields.get("caption"), str):
            return fields | {"kind": _kind_of(fields["caption"])}
        return fields


def _kind_of(caption: str) -> PreviewKind:
    fixed: dict[str, PreviewKind] = {"input": "input", "mask": "mask", "mended mask": "mended_mask"}
    return fixed.get(caption, "prototype" if caption.startswith("prototype only") else "picture")


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

    @property
    def layout_noise(self) -> float | None:
        """The noise level above which the base alone draws; None: the adapter was made to act at all levels."""
        noise: float | None = self.recipe.get("layout_noise")
        return noise

    @property
    def least_rank(self) -> int | None:
        """How much of the LoRA's rank acts at the noisiest timestep; None: all of it at all timesteps."""
        rank: int | None = self.recipe.get("least_rank")
        return rank


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
