"""Bases in one .safetensors file: what they are is read off it, and they draw as the snapshot they were made of."""

import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bases
import pytest
import torch
from safetensors.torch import save_file
from single_files import write_single

from objdrive.base import single_file
from objdrive.base.files import find_base
from objdrive.base.stable_diffusion import Base
from objdrive.errors import ObjdriveError
from objdrive.sampling.sampler import SampleSpec, draw_latents

WRITERS = {"sd15": bases.write_sd15, "sd21": bases.write_sd21, "sdxl": bases.write_sdxl}


@pytest.fixture(autouse=True)
def small_configs(tmp_path, monkeypatch):
    """The configs that come with the package, of the small bases; and a cache of one's own."""
    for kind in WRITERS:
        shutil.copytree(bases.CONFIGS / kind, tmp_path / "configs" / kind)
        parts = {
            "unet": bases.small_unet_config(kind, 32 if kind == "sdxl" else 8),
            "vae": bases.small_vae_config(kind),
        }
        parts["text_encoder"] = bases.small_text_config(kind).to_dict()
        if kind == "sdxl":
            parts["text_encoder_2"] = bases.small_text_config(kind, "text_encoder_2").to_dict()
        for part, config in parts.items():
            (tmp_path / "configs" / kind / part / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")
    monkeypatch.setenv("OBJDRIVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def made(tmp_path):
    """Call it with a kind: (single file, snapshot that it was made of, CLIP)."""

    def made(kind, **options):
        snapshot, clip = bases.written(tmp_path / kind, WRITERS[kind])
        return write_single(snapshot, tmp_path / f"{kind}.safetensors", kind, **options), snapshot, clip

    return made


def picture(base):
    spec = SampleSpec("a photo of a teapot", 1, steps=2, guidance_scale=3.0, negative_prompt="red")
    return draw_latents(base, [spec])


@pytest.mark.parametrize("kind", WRITERS)
def test_draws_as_the_snapshot_that_it_was_made_of(made, kind):
    path, snapshot, clip = made(kind)
    single = Base.load(str(path), clip=str(clip), device="cpu")
    torch.testing.assert_close(picture(single), picture(Base.load(str(snapshot), clip=str(clip), device="cpu")))
    pixels = torch.rand(1, 3, single.resolution, single.resolution, generator=torch.Generator().manual_seed(1))
    again = Base.load(str(snapshot), clip=str(clip), device="cpu")
    torch.testing.assert_close(single.encode_latents(pixels), again.encode_latents(pixels))
    assert single.noise.predicts_velocity is (kind == "sd21")


def test_is_converted_once_and_known_by_its_content(made, tmp_path, monkeypatch):
    path, _, clip = made("sd15")
    first = find_base(str(path), clip=str(clip))
    moved = shutil.copy(path, tmp_path / "elsewhere.safetensors")

    def never(*args, **options):
        raise AssertionError("converted again")

    monkeypatch.setattr(single_file, "_load", never)
    second = find_base(str(moved), clip=str(clip))
    assert second.snapshot == first.snapshot
    assert second.fingerprint() == first.fingerprint()
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    moved.write_bytes(data)
    assert second.fingerprint() != first.fingerprint()


def test_its_fingerprint_is_the_same_whoever_converts_it(made):
    path, _, clip = made("sd15")
    found = find_base(str(path), clip=str(clip))
    before = found.fingerprint()
    settings = found.snapshot / "scheduler/scheduler_config.json"
    noise = json.loads(settings.read_text())
    settings.write_text(json.dumps(noise | {"_diffusers_version": "9.9"}))
    assert found.fingerprint() == before
    settings.write_text(json.dumps(noise | {"prediction_type": "v_prediction"}))
    assert found.fingerprint() != before


@pytest.mark.parametrize("beside", ["model: [", "[]", "model: 3"])
def test_settings_beside_it_that_cannot_be_read_are_named(made, beside):
    path, _, clip = made("sd15")
    path.with_suffix(".yaml").write_text(beside)
    with pytest.raises(ObjdriveError, match=r"sd15\.yaml' beside the base can't be read"):
        find_base(str(path), clip=str(clip))


def test_noise_that_cannot_be_predicted_is_refused(made):
    path, _, clip = made("sd15", metadata={"modelspec.prediction_type": "epsilon"}, extra=["ztsnr"])
    with pytest.raises(ObjdriveError, match="terminal SNR of zero"):
        find_base(str(path), clip=str(clip))


@pytest.mark.parametrize(
    ("options", "beside", "velocity"),
    [
        ({"metadata": {"modelspec.prediction_type": "v"}}, "", True),
        ({"extra": ["v_pred", "ztsnr"]}, "", True),
        ({}, "model:\n  params:\n    parameterization: v\n", True),
        ({}, "model:\n  params: {}\n", False),
    ],
)
def test_what_it_predicts_is_told_by_marks_or_by_a_file_beside_it(made, options, beside, velocity):
    path, _, clip = made("sd15", **options)
    if beside:
        path.with_suffix(".yaml").write_text(beside)
    scheduler = json.loads(
        (find_base(str(path), clip=str(clip)).snapshot / "scheduler/scheduler_config.json").read_text()
    )
    assert (scheduler["prediction_type"] == "v_prediction") is velocity
    assert bool(scheduler["rescale_betas_zero_snr"]) is ("extra" in options)


@pytest.mark.parametrize(("prediction", "size"), [("epsilon", 64), ("v", 8)])
def test_sd2_that_predicts_the_noise_draws_512_pixels(made, prediction, size):
    path, _, clip = made("sd21", metadata={"modelspec.prediction_type": prediction})
    snapshot = find_base(str(path), clip=str(clip)).snapshot
    # 8 is what the small base's config says in the place of 96, which are 768 pixels.
    assert json.loads((snapshot / "unet/config.json").read_text())["sample_size"] == size


def folders(cache):
    return sorted(one.name for one in (cache / "bases").iterdir() if one.is_dir())


def test_what_a_killed_conversion_left_is_gone_after_the_next(made, tmp_path, monkeypatch):
    path, _, clip = made("sd15")
    load = single_file._load

    class Killed:
        def save_pretrained(self, folder):
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / "model_index.json").write_text("{")
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(single_file, "_load", lambda *args: Killed())
    child = multiprocessing.get_context("fork").Process(target=find_base, args=(str(path),), kwargs={"clip": str(clip)})
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(folders(tmp_path / "cache")) == 1
    monkeypatch.setattr(single_file, "_load", load)
    snapshot = find_base(str(path), clip=str(clip)).snapshot
    assert folders(tmp_path / "cache") == [snapshot.name]
    assert json.loads((snapshot / "model_index.json").read_text())["_class_name"]


def test_two_that_convert_at_once_make_it_once(made, tmp_path, monkeypatch):
    path, _, clip = made("sd15")
    load, loaded = single_file._load, []
    monkeypatch.setattr(single_file, "_load", lambda *args: loaded.append(1) or load(*args))
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: find_base(str(path), clip=str(clip)).snapshot, range(2)))
    assert len(loaded) == 1
    assert found[0] == found[1]
    assert folders(tmp_path / "cache") == [found[0].name]


def names(*, text="cond_stage_model.transformer.text_model.x", network=(16, 4, 3, 3), vae="first_stage_model.x"):
    entrance = {"model.diffusion_model.input_blocks.0.0.weight": network} if network else {}
    return entrance | {name: (1,) for name in (text, vae) if name}


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (names(network=(16, 9, 3, 3)), "its network takes 9 channels"),
        (names(), "its network has 1 tensors of 576 values, sd15 has .* another architecture"),
        (names(vae=""), "it has no autoencoder"),
        (names(text=""), "it has no text encoder"),
        ({"lora_unet_down_blocks.alpha": (1,)}, "it is no base: its tensors have names such as 'lora_unet_down"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (1,), "img_in.weight": (1, 64)}, "it is of the kind flux"),
    ],
)
def test_what_is_no_whole_base_is_refused_by_what_it_is(tmp_path, shapes, reason):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(ObjdriveError, match=f"can't be used: {reason}.*; objdrive draws with"):
        find_base(str(path))
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_cut_off_is_refused(made):
    path, _, clip = made("sd15")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ObjdriveError, match="is not a readable safetensors file"):
        find_base(str(path), clip=str(clip))


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(ObjdriveError, match="there is no such file"):
        find_base("nowhere/model.safetensors")
