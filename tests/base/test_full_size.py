"""The embedded configs are those of the real bases: counted at their full size, without values."""

import bases
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from objdrive.adapters.adapter import Adapter, adapter_files, parse_adapter
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.layers import find_layers
from objdrive.base.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL

PUBLISHED = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}
"""Parameters of the UNets."""
FAMILIES = {"sd15": STABLE_DIFFUSION, "sd21": STABLE_DIFFUSION, "sdxl": STABLE_DIFFUSION_XL}
WIDTHS = {"sd15": {"clip_l": 768}, "sd21": {"clip_l": 1024}, "sdxl": {"clip_l": 768, "clip_g": 1280}}


def count(network):
    return sum(weight.numel() for weight in network.parameters())


@pytest.fixture(scope="module")
def unets():
    with torch.device("meta"):
        return {kind: UNet2DConditionModel.from_config(bases.full_config(kind, "unet")) for kind in PUBLISHED}


def text_encoder(kind, part, model):
    with torch.device("meta"):
        return model(CLIPTextConfig(**bases.full_config(kind, part)))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_networks_have_as_many_parameters_as_published(unets, kind):
    assert count(unets[kind]) == PUBLISHED[kind]
    with torch.device("meta"):
        assert count(AutoencoderKL.from_config(bases.full_config(kind, "vae"))) == 83_653_863


def test_text_encoders_have_as_many_parameters_as_published():
    assert count(text_encoder("sd15", "text_encoder", CLIPTextModel)) == 123_060_480
    assert count(text_encoder("sd21", "text_encoder", CLIPTextModel)) == 340_387_840
    assert count(text_encoder("sdxl", "text_encoder_2", CLIPTextModelWithProjection)) == 694_659_840


@pytest.mark.parametrize(("kind", "layers", "megabytes"), [("sd15", 250, 1.97), ("sd21", 250, 2.0), ("sdxl", 767, 6.2)])
def test_an_adapter_has_so_many_layers_and_bytes(unets, kind, layers, megabytes):
    family, unet = FAMILIES[kind], unets[kind]
    with AdapterBank(unet, family.lora_targets, slots=1, rank=1) as bank:
        found = find_layers(unet, family.lora_targets, 1)
        assert len(found) == layers
        lora = {}
        for one in found:
            lora[f"{one.name}.lora_A.weight"] = torch.zeros(1, *one.inside)
            lora[f"{one.name}.lora_B.weight"] = torch.zeros(one.out, 1, *([1, 1] if one.is_convolution else []))
        vectors = {name: torch.zeros(width) for name, width in WIDTHS[kind].items()}
        files = adapter_files(Adapter(lora, vectors).in_half_precision(), token="<mug-1>", family=family)
        assert sum(map(len, files.values())) / 1e6 == pytest.approx(megabytes, rel=0.03)
        bank.check(parse_adapter(files, token="<mug-1>", family=family).lora)
