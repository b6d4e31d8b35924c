"""What a snapshot is, read off its configs: its family, or why objdrive cannot draw with it. No PyTorch."""

import json
from pathlib import Path
from typing import Any

from objdrive.base.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, Family
from objdrive.errors import ObjdriveError

DRAWS = "objdrive draws with Stable Diffusion 1.x, 2.x and XL, from text"
_PREDICTIONS = ("epsilon", "v_prediction")
_NETWORK = "UNet2DConditionModel"


def family_of(name: str, snapshot: Path) -> Family:
    """The family of a snapshot in diffusers' layout.

    Raises:
        ObjdriveError: it is of another family, or made for something else than pictures from text; or it is no snapshot
            in diffusers' layout at all.
    """
    index = read_config(snapshot / "model_index.json")
    pipeline = str(index.get("_class_name", "StableDiffusionPipeline"))
    if not (snapshot / "unet" / "config.json").is_file():
        if not pipeline.startswith("StableDiffusion") and index:
            raise _refusal(name, f"it is of the kind {pipeline}")
        raise ObjdriveError(f"the base {name!r} at {snapshot} lacks unet: it must be in diffusers' layout")
    unet, vae = (read_config(snapshot / part / "config.json") for part in ("unet", "vae"))
    family = _by_network(unet)
    if family is None:
        raise _refusal(name, f"it is of the kind {pipeline}")
    if index.get("requires_aesthetics_score"):
        raise _refusal(name, "it is a refiner, which improves pictures of another base")
    taken, there = int(unet.get("in_channels", 4)), int(vae.get("latent_channels", 4))
    if taken != there:
        raise _refusal(name, f"its network takes {taken} channels and its latents have {there}: it is made for edits")
    if unet.get("time_cond_proj_dim") is not None:
        raise _refusal(name, "its network is distilled and takes the guidance as an input")
    if vae.get("latents_mean") is not None:
        raise _refusal(name, "its latents are normalised by a mean")
    check_noise(name, read_config(snapshot / "scheduler" / "scheduler_config.json"))
    return family


def check_latents(what: str, vae: dict[str, Any], snapshot: Path) -> None:
    """Raise ObjdriveError if an autoencoder's config is not one for the latents of a snapshot's network."""
    there, taken = (
        int(vae.get("latent_channels", 4)),
        int(read_config(snapshot / "unet" / "config.json")["in_channels"]),
    )
    if there != taken:
        raise ObjdriveError(f"{what} has latents of {there} channels, the base's network takes {taken}: name another")


def read_config(path: Path) -> dict[str, Any]:
    """A config; empty if it is not there."""
    read: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return read


def _by_network(unet: dict[str, Any]) -> Family | None:
    if unet.get("_class_name", _NETWORK) != _NETWORK:
        return None
    if unet.get("class_embed_type") is not None or unet.get("encoder_hid_dim_type") is not None:
        return None
    # "text" adds the states' own mean, which needs nothing else.
    known = {None: STABLE_DIFFUSION, "text": STABLE_DIFFUSION, "text_time": STABLE_DIFFUSION_XL}
    return known.get(unet.get("addition_embed_type"))


def check_noise(name: str, scheduler: dict[str, Any]) -> None:
    """Raise ObjdriveError if a scheduler's config tells of a noise process that objdrive does not have."""
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise _refusal(name, f"its network predicts {prediction!r}, not one of {', '.join(_PREDICTIONS)}")
    if scheduler.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise _refusal(name, "its noise has a terminal SNR of zero, of which no noise can be predicted (epsilon)")


def _refusal(name: str, reason: str) -> ObjdriveError:
    return ObjdriveError(f"the base {name!r} can't be used: {reason}; {DRAWS}")
