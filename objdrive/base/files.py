"""A base's files: where they lie, what they say of the base, their fingerprint. No PyTorch: jobs start faster."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from objdrive.errors import ObjdriveError


def _embedded() -> Path:
    # `ray job submit` sends this code without the bases (.rayignore): they are then in the installed package.
    beside = Path(__file__).parents[1] / "bases"
    places = [beside, *(Path(entry) / "objdrive" / "bases" for entry in sys.path)]
    return next((place for place in places if place.is_dir()), beside)


EMBEDDED = _embedded()
"""The folder of the bases that come with the package."""

PARTS = ("text_encoder", "tokenizer", "unet", "vae", "scheduler", "image_encoder", "text_projection")
"""Folders of a snapshot that a base is loaded from."""
_PATTERNS = [f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "txt", "safetensors")]
_HUB_IGNORE = ["*.fp16.*", "*non_ema*", "*.int8.*"]
_MATCHING_CLIP = {768: "openai/clip-vit-large-patch14", 1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}


@dataclass(frozen=True)
class BaseFiles:
    """Where a base's files lie: the snapshot, and the CLIP with the image tower if the snapshot has none."""

    name: str
    snapshot: Path
    clip: Path | None

    @property
    def tuning(self) -> dict[str, Any]:
        """What suits fine-tunes on this base: its ``recipe.yaml``, if it ships one (see `make_recipe`)."""
        path = self.snapshot / "recipe.yaml"
        return yaml.safe_load(path.read_text()) if path.is_file() else {}

    @property
    def classes(self) -> frozenset[str]:
        """The class words that this base was trained on, if it lists them (``classes.json``), else empty."""
        path = self.snapshot / "classes.json"
        return frozenset(json.loads(path.read_text())["classes"]) if path.is_file() else frozenset()

    def fingerprint(self) -> str:
        """32 hexadecimal characters over the bytes of all weights and configs that a base is loaded from."""
        digest = hashlib.sha256()
        parts = sorted(p for pattern in _PATTERNS for p in self.snapshot.glob(pattern) if not _ignored(p))
        named = [(f"{path.parent.name}/{path.name}", path) for path in parts]
        if self.clip:
            # Not by its folder's name: the same CLIP may lie in any folder.
            towers = sorted(self.clip.glob("*.json")) + sorted(self.clip.glob("*.safetensors"))
            named += [(f"clip/{path.name}", path) for path in towers]
        for name, path in named:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{name}:{content}\n".encode())
        return digest.hexdigest()[:32]


def find_base(name: str, *, clip: str | None = None) -> BaseFiles:
    """Find a base's files, downloading them if `name` is a hub id.

    Args:
        name: ``tiny64`` (embedded), a folder in diffusers' layout, or a hub id.
        clip: folder or hub id of a CLIPModel whose image tower belongs to the base's text encoder; needed only
            for snapshots without `image_encoder` and `text_projection`. Default: the CLIP that SD 1.x / 2.x used.

    Raises:
        ObjdriveError: neither an embedded base nor a folder nor a reachable hub id, or parts are missing.
    """
    snapshot = _locate(name, [*_PATTERNS, "recipe.yaml", "classes.json"])
    missing = [part for part in PARTS[:5] if not (snapshot / part).is_dir()]
    if missing:
        raise ObjdriveError(
            f"the base {name!r} at {snapshot} lacks {', '.join(missing)}: it must be in diffusers' layout"
        )
    if all((snapshot / part).is_dir() for part in PARTS[5:]):
        return BaseFiles(name, snapshot, None)
    width = json.loads((snapshot / "text_encoder" / "config.json").read_text())["hidden_size"]
    if clip is None and width not in _MATCHING_CLIP:
        raise ObjdriveError(
            f"the base {name!r} has no image tower, and no CLIP of text width {width} is known: name one with --clip"
        )
    clip_folder = _locate(clip or _MATCHING_CLIP[width], ["*.json", "model.safetensors"])
    return BaseFiles(name, snapshot, clip_folder)


def _locate(name: str, patterns: list[str]) -> Path:
    if (EMBEDDED / name).is_dir():
        return EMBEDDED / name
    if Path(name).is_dir():
        return Path(name)
    embedded = ", ".join(sorted(p.parent.name for p in EMBEDDED.glob("*/model_index.json")))
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=_HUB_IGNORE))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ObjdriveError(
            f"no base {name!r}: it is not embedded ({embedded or 'objdrive is not installed here, so no base is'}), "
            f"not a folder, and no hub id that can be downloaded: {error}"
        ) from error


def _ignored(path: Path) -> bool:
    return any(path.match(pattern) for pattern in _HUB_IGNORE)
