"""Bases that objdrive cannot draw with are refused by name, before any weight is read or downloaded."""

import json
import shutil

import bases
import pytest

from objdrive.base import files
from objdrive.base.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from objdrive.base.files import find_base
from objdrive.base.recognise import family_of
from objdrive.base.single_file import CONFIGS
from objdrive.errors import ObjdriveError


@pytest.fixture
def snapshot(tmp_path):
    """Call it with a kind, a part and changes of its config: configs alone, without weights."""

    def snapshot(kind, part, **changes):
        shutil.copytree(CONFIGS / kind, tmp_path / "base")
        name = {"": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}.get(part, f"{part}/config.json")
        path = tmp_path / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / "base"

    return snapshot


@pytest.mark.parametrize(
    ("kind", "family"), [("sd15", STABLE_DIFFUSION), ("sd21", STABLE_DIFFUSION), ("sdxl", STABLE_DIFFUSION_XL)]
)
def test_known_families(kind, family):
    assert family_of(kind, CONFIGS / kind) is family


@pytest.mark.parametrize(
    ("kind", "part", "changes", "reason"),
    [
        ("sd15", "unet", {"in_channels": 9}, "its network takes 9 channels and its latents have 4: it is made for"),
        ("sdxl", "", {"requires_aesthetics_score": True}, "it is a refiner"),
        ("sdxl", "unet", {"time_cond_proj_dim": 256}, "its network is distilled"),
        ("sdxl", "unet", {"addition_embed_type": "image"}, "it is of the kind StableDiffusionXLPipeline"),
        ("sd21", "unet", {"class_embed_type": "projection"}, "it is of the kind StableDiffusionPipeline"),
        ("sdxl", "vae", {"latents_mean": [0, 0, 0, 0]}, "its latents are normalised"),
        ("sd15", "scheduler", {"prediction_type": "sample"}, "its network predicts 'sample'"),
        ("sd15", "scheduler", {"rescale_betas_zero_snr": True}, "a terminal SNR of zero"),
    ],
)
def test_others_are_refused_by_what_they_are(snapshot, kind, part, changes, reason):
    with pytest.raises(ObjdriveError, match=f"can't be used: .*{reason}.*; objdrive draws with Stable Diffusion"):
        find_base(str(snapshot(kind, part, **changes)))


def test_another_architecture_is_refused_by_its_name(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ObjdriveError, match="it is of the kind FluxPipeline; objdrive draws with"):
        find_base(str(tmp_path))


class Hub:
    """A hub with one repository, in a folder; it notes what is downloaded."""

    def __init__(self, folder, cache):
        self.folder, self.cache, self.downloaded = folder, cache, []

    def __call__(self, name, *, allow_patterns, ignore_patterns):
        for path in filter(lambda path: path.is_file(), self.folder.rglob("*")):
            inside = path.relative_to(self.folder)
            wanted = any(inside.match(pattern) for pattern in allow_patterns)
            if wanted and not any(inside.match(pattern) for pattern in ignore_patterns):
                (self.cache / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / inside)
                self.downloaded.append(str(inside))
        return str(self.cache)


def test_no_weight_is_downloaded_of_what_is_refused(snapshot, tmp_path, monkeypatch):
    folder = snapshot("sd15", "unet", in_channels=9)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(files, "snapshot_download", hub)
    with pytest.raises(ObjdriveError, match="the base 'some/inpainting' can't be used"):
        find_base("some/inpainting")
    assert hub.downloaded
    assert not any(name.endswith(".safetensors") for name in hub.downloaded)


def test_half_precision_is_taken_where_there_is_no_other(tmp_path, monkeypatch):
    folder, clip = bases.written(tmp_path, bases.write_sdxl)
    halves = ("unet/diffusion_pytorch_model", "text_encoder_2/model")
    for name in halves:
        (folder / f"{name}.safetensors").rename(folder / f"{name}.fp16.safetensors")
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / "vae/d.fp16.safetensors")
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(files, "snapshot_download", hub)
    found = find_base("some/xl", clip=str(clip))
    assert [found.variant(part) for part in ("unet", "text_encoder_2", "text_encoder", "vae")] == [
        "fp16", "fp16", None, None
    ]  # fmt: skip
    names = {name for name, _ in found.weights()}
    assert {f"{name}.fp16.safetensors" for name in halves} < names
    assert "vae/d.fp16.safetensors" not in names
    assert "model_index.json" in names


@pytest.mark.parametrize("name", ["model.ckpt", "weights/pytorch_model.bin", "model.PT"])
def test_pickles_are_refused_with_how_to_convert_them(tmp_path, name):
    with pytest.raises(ObjdriveError, match=r"is a pickle, .* never read: have it as \.safetensors"):
        find_base(str(tmp_path / name))


def test_a_snapshot_with_pickled_weights_is_refused(tmp_path):
    snapshot, clip = bases.written(tmp_path, bases.write_sd15)
    weights = snapshot / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ObjdriveError, match=r"has no \.safetensors in unet: .* never read"):
        find_base(str(snapshot), clip=str(clip))


def test_an_autoencoder_of_other_latents_is_refused(tmp_path):
    snapshot, clip = bases.written(tmp_path / "base", bases.write_sd15)
    config = json.loads((snapshot / "vae/config.json").read_text())
    shutil.copytree(snapshot / "vae", tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"latent_channels": 16}))
    with pytest.raises(ObjdriveError, match="latents of 16 channels, the base's network takes 4"):
        find_base(str(snapshot), clip=str(clip), vae=str(tmp_path / "other"))


def test_a_clip_that_lacks_the_text_encoders_layers_is_refused(tmp_path):
    snapshot, clip = bases.written(tmp_path, bases.write_sd21)
    config = json.loads((clip / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (clip / "config.json").write_text(json.dumps(config))
    with pytest.raises(ObjdriveError, match=r"width 32 with 2 layers, and the CLIP .* one of width 32 with 1: name"):
        find_base(str(snapshot), clip=str(clip))
