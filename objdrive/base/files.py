"""A base's files: where they lie, what they say of the base, their fingerprint. No PyTorch: jobs start faster."""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from objdrive.base.digests import sha256_of
from objdrive.base.family import STABLE_DIFFUSION, Family
from objdrive.base.recognise import check_latents, check_noise, family_of, read_config
from objdrive.errors import ObjdriveError


def _embedded() -> Path:
    # `ray job submit` sends this code without the bases (.rayignore): they are then in the installed package.
    beside = Path(__file__).parents[1] / "bases"
    places = [beside, *(Path(entry) / "objdrive" / "bases" for entry in sys.path)]
    return next((place for place in places if place.is_dir()), beside)


EMBEDDED = _embedded()
"""The folder of the bases that come with the package."""

_OPTIONAL_PARTS = ("image_encoder", "text_projection", "image_encoder_2")
PARTS = (*STABLE_DIFFUSION.parts, "image_encoder", "text_projection")
"""Folders of a snapshot that a base of Stable Diffusion 1.x, with its own image tower, is loaded from."""
_SUFFIXES = ("json", "txt", "safetensors")
_TELLING = ["model_index.json", "recipe.yaml", "classes.json"]
_HUB_IGNORE = ["*.fp16.*", "*non_ema*", "*.int8.*"]
_HALF = "fp16"
_ZEROS = "force_zeros_for_empty_prompt"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_MATCHING_CLIP = {768: "openai/clip-vit-large-patch14", 1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}


@dataclass(frozen=True)
class BaseFiles:
    """Where a base's files lie.

    Attributes:
        name: that it was found by.
        snapshot: in diffusers' layout.
        clip: the CLIP with the image tower, if the snapshot has none.
        family: what it is.
        vae: an autoencoder in place of the snapshot's own.
        single: the file that the snapshot was made of, if it was one.
    """

    name: str
    snapshot: Path
    clip: Path | None
    family: Family = STABLE_DIFFUSION
    vae: Path | None = None
    single: Path | None = None

    @property
    def tuning(self) -> dict[str, Any]:
        """What suits fine-tunes and drawings on this base: the family's, and its own ``recipe.yaml`` if it ships one.

        See `objdrive.training.recipe.make_recipe`.
        """
        path = self.snapshot / "recipe.yaml"
        return dict(self.family.tuning) | (yaml.safe_load(path.read_text()) if path.is_file() else {})

    @property
    def classes(self) -> frozenset[str]:
        """The class words that this base was trained on, if it lists them (``classes.json``), else empty."""
        path = self.snapshot / "classes.json"
        return frozenset(json.loads(path.read_text())["classes"]) if path.is_file() else frozenset()

    @property
    def resolution(self) -> int:
        """Edge of the native square in pixels, see `Base.resolution`: told by configs alone."""
        latents = int(read_config(self.snapshot / "unet" / "config.json")["sample_size"])
        halved = len(read_config(self.snapshot / "vae" / "config.json")["block_out_channels"]) - 1
        return latents << halved

    @property
    def zeros_no_prompt(self) -> bool:
        """Whether the base was trained to see zeros in place of no prompt."""
        return self.family.sized and bool(read_config(self.snapshot / "model_index.json").get(_ZEROS, True))

    def variant(self, part: str) -> str | None:
        """Diffusers' name of the weights that a part is loaded from: ``fp16`` if it has no others."""
        return _variant(self.snapshot / part)

    def weights(self) -> list[tuple[str, Path]]:
        """All files of weights and configs that it is loaded from, by names that do not depend on their places."""
        if self.single is not None:
            # What was made of it depends on it and on how its noise is told, see `fingerprint`.
            named = [("single", self.single)]
        else:
            parts = [part for part in (*self.family.parts, *_OPTIONAL_PARTS) if part != "vae" or self.vae is None]
            found = [path for part in parts for path in _read_from(self.snapshot / part)]
            named = [(f"{path.parent.name}/{path.name}", path) for path in sorted(found)]
            if self.family.sized:
                named.append(("model_index.json", self.snapshot / "model_index.json"))
        # Not by their folders' names: the same CLIP may lie in any folder.
        if self.clip:
            towers = sorted(self.clip.glob("*.json")) + sorted(self.clip.glob("*.safetensors"))
            named += [(f"clip/{path.name}", path) for path in towers]
        if self.vae:
            named += [(f"vae/{path.name}", path) for path in _read_from(self.vae)]
        return named

    @property
    def worker_bytes(self) -> int:
        """About what a worker takes of a machine's memory that fine-tunes on the processor.

        Twice the weights in float32: once themselves, and as much for what one scene's step keeps (measured on SD 1.5:
        11 GiB).
        """
        return 2 * 4 * sum(_count_values(path) for _, path in self.weights() if path.suffix == ".safetensors")

    def fingerprint(self) -> str:
        """32 hexadecimal characters over the bytes of all weights and configs that a base is loaded from."""
        digest = hashlib.sha256()
        for name, path in self.weights():
            digest.update(f"{name}:{sha256_of(path)}\n".encode())
        if self.single is not None:
            noise = read_config(self.snapshot / "scheduler" / "scheduler_config.json")
            # Who wrote it down does not matter.
            told = {key: value for key, value in noise.items() if not key.startswith("_")}
            digest.update(json.dumps(told, sort_keys=True).encode())
        return digest.hexdigest()[:32]


def find_base(name: str, *, clip: str | None = None, vae: str | None = None) -> BaseFiles:
    """Find a base's files, downloading them if `name` is a hub id.

    What objdrive cannot draw with is refused before its weights are downloaded or read.

    Args:
        name: ``tiny64`` (embedded), a folder in diffusers' layout, a single file (``.safetensors``), or a hub id.
        clip: folder or hub id of a CLIPModel whose image tower belongs to the base's (first) text encoder; needed only
            for snapshots without `image_encoder` and `text_projection`. Default: the CLIP that the family used.
        vae: folder or hub id of an autoencoder to use in place of the base's own, such as one for half precision.

    Raises:
        ObjdriveError: neither an embedded base nor a folder nor a reachable hub id, parts are missing, or the family
            is another.
    """
    vae_folder = _locate(vae, ["config.json", "*.safetensors"]) if vae else None
    if name.lower().endswith(_PICKLES):
        raise ObjdriveError(
            f"the base {name!r} is a pickle, which may run any code and is never read: have it as .safetensors, "
            'such as with torch.load(FILE, weights_only=True)["state_dict"] and safetensors.torch.save_file'
        )
    if name.lower().endswith(".safetensors"):
        return _find_single(name, clip, vae_folder)
    snapshot = _locate(name, [*_TELLING, "*/*.json", "*/*.txt"])
    family = family_of(name, snapshot)
    if not Path(name).is_dir() and not (EMBEDDED / name).is_dir():
        snapshot = _download_weights(name, snapshot, family)
    missing = [part for part in family.parts if not (snapshot / part).is_dir()]
    if missing:
        raise ObjdriveError(
            f"the base {name!r} at {snapshot} lacks {', '.join(missing)}: it must be in diffusers' layout"
        )
    _check_weights(name, snapshot, family)
    if vae_folder:
        check_latents(f"the autoencoder {vae!r}", read_config(vae_folder / "config.json"), snapshot)
    if all((snapshot / part).is_dir() for part in ("image_encoder", "text_projection")):
        return BaseFiles(name, snapshot, None, family, vae_folder)
    return BaseFiles(name, snapshot, _find_clip(name, snapshot, clip), family, vae_folder)


def _check_weights(name: str, snapshot: Path, family: Family) -> None:
    parts = [part for part in family.parts if not part.startswith(("tokenizer", "scheduler"))]
    without = [part for part in parts if not any((snapshot / part).glob("*.safetensors"))]
    if without:
        raise ObjdriveError(
            f"the base {name!r} at {snapshot} has no .safetensors in {', '.join(without)}: weights in pickles (.bin) "
            "may run any code and are never read; have them as .safetensors"
        )


def _find_single(name: str, clip: str | None, vae: Path | None) -> BaseFiles:
    if not Path(name).is_file():
        raise ObjdriveError(f"no base {name!r}: there is no such file")
    # PyTorch, which other bases are found without.
    from objdrive.base import single_file

    kind = single_file.recognise(Path(name))
    towers = _find_clip(name, kind.configs, clip)
    check_noise(name, kind.scheduler)
    if vae:
        check_latents(f"the autoencoder {vae}", read_config(vae / "config.json"), kind.configs)
    snapshot = single_file.convert(Path(name), kind, tokenizer=towers)
    return BaseFiles(name, snapshot, towers, family_of(name, kind.configs), vae, single=Path(name))


def _find_clip(name: str, snapshot: Path, clip: str | None) -> Path:
    """The CLIP whose image tower belongs to a snapshot's (first) text encoder.

    Raises:
        ObjdriveError: none is known, or its text tower is not the one that the base's text encoder is (a part of).
    """
    encoder = read_config(snapshot / "text_encoder" / "config.json")
    width, layers = int(encoder["hidden_size"]), int(encoder["num_hidden_layers"])
    if clip is None and width not in _MATCHING_CLIP:
        raise ObjdriveError(
            f"the base {name!r} has no image tower, and no CLIP of text width {width} is known: name one with --clip"
        )
    folder = _locate(clip or _MATCHING_CLIP[width], ["*.json", "model.safetensors"])
    tower = read_config(folder / "config.json").get("text_config") or {}
    # transformers' own, where a config leaves them out.
    found = int(tower.get("hidden_size", 512)), int(tower.get("num_hidden_layers", 12))
    if found[0] != width or found[1] < layers:
        raise ObjdriveError(
            f"the base {name!r} has a text encoder of width {width} with {layers} layers, and the CLIP {folder} has "
            f"one of width {found[0]} with {found[1]}: name with --clip the CLIP that the base was made with, whole"
        )
    return folder


def _download_weights(name: str, configs: Path, family: Family) -> Path:
    parts = [part for part in (*family.parts, *_OPTIONAL_PARTS) if (configs / part).is_dir()]
    patterns = [*_TELLING, *(f"{part}/*.{suffix}" for part in parts for suffix in _SUFFIXES)]
    snapshot = _locate(name, patterns)
    half = [part for part in parts if not part.startswith(("tokenizer", "scheduler")) and not _plain(snapshot / part)]
    if half:
        # Some repositories have weights in half precision alone.
        snapshot = _locate(name, [f"{part}/*.{_HALF}.safetensors" for part in half], ignore=[])
    return snapshot


def _locate(name: str, patterns: list[str], ignore: Sequence[str] = _HUB_IGNORE) -> Path:
    if (EMBEDDED / name).is_dir():
        return EMBEDDED / name
    if Path(name).is_dir():
        return Path(name)
    embedded = ", ".join(sorted(p.parent.name for p in EMBEDDED.glob("*/model_index.json")))
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=list(ignore)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ObjdriveError(
            f"no base {name!r}: it is not embedded ({embedded or 'objdrive is not installed here, so no base is'}), "
            f"not a folder, and no hub id that can be downloaded: {error}"
        ) from error


def _read_from(part: Path) -> list[Path]:
    """The files of a part that it is loaded from, sorted."""
    found = sorted(path for suffix in _SUFFIXES for path in part.glob(f"*.{suffix}"))
    if _variant(part) is None:
        return [path for path in found if not _ignored(path)]
    return [path for path in found if path.match(f"*.{_HALF}.*") or path.suffix != ".safetensors"]


def _variant(part: Path) -> str | None:
    return _HALF if not _plain(part) and any(part.glob(f"*.{_HALF}.safetensors")) else None


def _plain(part: Path) -> list[Path]:
    return [path for path in part.glob("*.safetensors") if not _ignored(path)]


def _count_values(path: Path) -> int:
    """How many numbers a safetensors file holds, by its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _ignored(path: Path) -> bool:
    return any(path.match(pattern) for pattern in _HUB_IGNORE)
