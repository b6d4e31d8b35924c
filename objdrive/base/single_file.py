"""Bases in a single file (A1111's layout, as Civitai has them): what they are, and diffusers' layout made of them."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from transformers import CLIPTokenizer

from objdrive.base.digests import sha256_of
from objdrive.base.recognise import DRAWS, read_config
from objdrive.errors import ObjdriveError

CONFIGS = Path(__file__).parent / "configs"
"""Configs of SD 1.5, SD 2.1 and SDXL: single files hold weights alone."""

_NETWORK, _AUTOENCODER = "model.diffusion_model.", "first_stage_model."
_TEXT = {
    "conditioner.embedders.1.model.": "sdxl",
    "cond_stage_model.model.": "sd21",
    "cond_stage_model.transformer.": "sd15",
}
"""Beginnings of the text encoder's names, by the folder of configs."""
_PADS = {"sd15": ("<|endoftext|>",), "sd21": ("!",), "sdxl": ("<|endoftext|>", "!")}
"""What prompts are padded with for each text encoder."""
_LONGEST_PROMPT = 77
_LATENT_SIZES = {("sd21", "epsilon"): 64}
"""Where the prediction tells the native square: SD 2.x of 512 pixels predicts the noise, of 768 the velocity."""


@dataclass(frozen=True)
class Kind:
    """What a single file is: the folder of its configs, and its noise."""

    configs: Path
    prediction: str
    zero_snr: bool

    @property
    def scheduler(self) -> dict[str, Any]:
        """The config of its scheduler."""
        usual = read_config(self.configs / "scheduler" / "scheduler_config.json")
        # As v-prediction bases of a terminal SNR of zero are drawn with (arXiv 2305.08891).
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if self.zero_snr else {}
        return usual | {"prediction_type": self.prediction} | zero


def recognise(path: Path) -> Kind:
    """What a single file is, by the names and shapes of its tensors, which are not read.

    What its network predicts is told by its metadata (``modelspec.prediction_type``), by marks among the tensors
    (``v_pred``, ``ztsnr``), or by a YAML file beside it (``parameterization``); else it is what the family usually
    predicts: the noise, and of SD 2.x the velocity.

    Raises:
        ObjdriveError: not a safetensors file, or no whole Stable Diffusion 1.x, 2.x or XL.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ObjdriveError(f"the base {str(path)!r} is not a readable safetensors file: {error}") from error
    begins = {start: any(name.startswith(start) for name in names) for start in (_NETWORK, _AUTOENCODER, *_TEXT)}
    kind = next((folder for start, folder in _TEXT.items() if begins[start]), None)
    if kind is None or not begins[_NETWORK] or not begins[_AUTOENCODER]:
        raise ObjdriveError(f"the base {str(path)!r} can't be used: {_what_else(shapes, begins)}; {DRAWS}")
    configs = CONFIGS / kind
    _check_network(path, configs, shapes)
    usual = read_config(configs / "scheduler" / "scheduler_config.json")["prediction_type"]
    return Kind(configs, _prediction(path, shapes, metadata) or usual, "ztsnr" in shapes)


def convert(path: Path, kind: Kind, *, tokenizer: Path) -> Path:
    """The file in diffusers' layout, in a cache (``OBJDRIVE_CACHE``, by default ``~/.cache/objdrive``).

    It is made once for the same content, wherever the file lies, and by one process at a time: others wait. What one
    that was killed left behind is never taken for it, and goes when the next one makes it.

    Args:
        path: the file.
        kind: what it is.
        tokenizer: folder of a CLIP whose tokenizer it takes: single files have none.

    Raises:
        ObjdriveError: its tensors are not those of a base of its kind, or the CLIP has no tokenizer.
    """
    cache = Path(os.environ.get("OBJDRIVE_CACHE") or Path.home() / ".cache" / "objdrive") / "bases"
    noise = kind.prediction + ("-zero-snr" if kind.zero_snr else "")
    home = cache / f"{sha256_of(path)[:32]}-{noise}"
    if home.is_dir():
        return home
    cache.mkdir(parents=True, exist_ok=True)
    made = cache / f"making-{home.name}"
    try:
        # The lock goes with the process that holds it: what lies there under the lock was left by one that was killed.
        with FileLock(cache / f"{home.name}.lock"):
            if home.is_dir():
                return home
            shutil.rmtree(made, ignore_errors=True)
            try:
                _load(path, kind, tokenizer).save_pretrained(made)
                made.rename(home)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ObjdriveError(f"the base {str(path)!r} can't be brought into diffusers' layout: {error}") from error
    except OSError as error:
        raise ObjdriveError(f"the base {str(path)!r} can't be kept in {cache}: {error}") from error
    return home


def _load(path: Path, kind: Kind, tokenizer: Path) -> Any:
    large = kind.configs.name == "sdxl"
    pipeline: Any = StableDiffusionXLPipeline if large else StableDiffusionPipeline
    try:
        tokenizers = [
            CLIPTokenizer.from_pretrained(tokenizer, pad_token=pad, model_max_length=_LONGEST_PROMPT)
            for pad in _PADS[kind.configs.name]
        ]
    except (OSError, ValueError, TypeError) as error:
        raise ObjdriveError(
            f"the CLIP {tokenizer} has no tokenizer, which single files need: name one that has it with --clip"
        ) from error
    parts = {name: one for name, one in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=False)}
    others = {} if large else {"safety_checker": None, "feature_extractor": None}
    with safe_open(path, framework="pt") as file:
        first = file.get_slice(f"{_NETWORK}input_blocks.0.0.weight").get_dtype()
    made = pipeline.from_single_file(
        str(path),
        config=str(kind.configs),
        local_files_only=True,
        scheduler=DDIMScheduler.from_config(kind.scheduler),
        torch_dtype=torch.float16 if first == "F16" else torch.float32,
        **parts,
        **others,
    )
    size = _LATENT_SIZES.get((kind.configs.name, kind.prediction))
    if size is not None:
        made.unet.register_to_config(sample_size=size)
    return made


def _check_network(path: Path, configs: Path, shapes: dict[str, torch.Tensor]) -> None:
    """Raise ObjdriveError if the network's tensors are not as many and as large as those of its kind."""
    config = read_config(configs / "unet" / "config.json")
    entrance = shapes.get(f"{_NETWORK}input_blocks.0.0.weight")
    channels = entrance.shape[1] if entrance is not None else 0
    with torch.device("meta"):
        expected = UNet2DConditionModel.from_config(config).state_dict()
    there = [one for name, one in shapes.items() if name.startswith(_NETWORK)]
    counts = [(len(some), sum(one.numel() for one in some)) for some in (there, list(expected.values()))]
    if channels != config["in_channels"]:
        raise ObjdriveError(
            f"the base {str(path)!r} can't be used: its network takes {channels} channels, those of pictures from text "
            f"are {config['in_channels']}: it is made for edits; {DRAWS}"
        )
    if counts[0] != counts[1]:
        raise ObjdriveError(
            f"the base {str(path)!r} can't be used: its network has {counts[0][0]} tensors of {counts[0][1]} values, "
            f"{configs.name} has {counts[1][0]} of {counts[1][1]}: it is of another architecture; {DRAWS}"
        )


def _prediction(path: Path, shapes: dict[str, torch.Tensor], metadata: dict[str, str]) -> str | None:
    told = metadata.get("modelspec.prediction_type")
    beside = path.with_suffix(".yaml")
    if told is None and "v_pred" in shapes:
        told = "v"
    if told is None and beside.is_file():
        told = _told_beside(beside)
    if told is None:
        return None
    return "v_prediction" if told.startswith("v") else "epsilon"


def _told_beside(path: Path) -> str:
    try:
        told: Any = yaml.safe_load(path.read_text())
        return str(told["model"]["params"].get("parameterization", "epsilon"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ObjdriveError(
            f"{str(path)!r} beside the base can't be read as its settings (model: params:): mend or remove it"
        ) from error


def _what_else(shapes: dict[str, torch.Tensor], begins: dict[str, bool]) -> str:
    if begins[_NETWORK] and any(begins[start] for start in _TEXT):
        return "it has no autoencoder (first_stage_model): have one with it"
    found = infer_diffusers_model_type(shapes)
    # What diffusers takes files for that it does not know.
    if found != "v1":
        return f"it is of the kind {found}"
    if begins[_NETWORK]:
        return "it has no text encoder (cond_stage_model, conditioner): have one with it"
    return f"it is no base: its tensors have names such as {next(iter(shapes), 'none')!r}"
