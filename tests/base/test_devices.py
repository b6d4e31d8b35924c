"""What a GPU would refuse, found without one: a base on torch's meta device computes nothing, but has its device."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from objdrive.adapters.bank import AdapterBank
from objdrive.base.prompts import TOKEN_MARK
from objdrive.sampling.sampler import SampleSpec, draw_pictures
from objdrive.training.personalize import personalize
from objdrive.training.recipe import make_recipe

_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of several devices; what comes from the meta device to the CPU is nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and given[0].is_meta:
            return 0
        if func is torch.ops.aten._to_copy.default and given[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            # Not zeros: a distribution may be made of it.
            values = torch.linspace(0.9, 0.1, given[0].numel()).reshape(given[0].shape)
            return values.to(kwargs.get("dtype") or given[0].dtype)
        if func not in _MOVES:
            # A single number goes with any device.
            devices = {one.device.type for one in given if one.dim()}
            assert len(devices) < 2, f"{func} of tensors on {devices}"
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def away(tiny64):
    """The embedded base as it is on a GPU: elsewhere than what is made on the CPU, and mostly in half precision."""
    away = copy.deepcopy(tiny64)
    joint = away.towers[0].joint
    for part in (away.towers[0].encoder, joint.projection, away.unet):
        part.to("meta", torch.bfloat16)
    for part in (joint.image, away.vae):
        part.to("meta")
    return replace(away, noise=replace(away.noise, alphas=away.noise.alphas.to("meta")))


def test_prompts_with_embeddings_of_the_cpu(away):
    with OneDevice():
        prompt, vector = [away.tokenize(f"a photo of {TOKEN_MARK}")], torch.zeros(128)
        states = away.encode_text(prompt, [{"clip_l": vector}]).states
        embedded = away.embed_text(prompt, [vector])
    assert states.device.type == embedded.device.type == "meta"


@pytest.mark.parametrize("preset", ["objdrive", "dreambooth", "textual_inversion"])
def test_fine_tunes(away, catalog_scene, preset):
    steps = ["steps=2", "prototype_steps=2", "sample_steps=2"]
    recipe = make_recipe(preset, tuning=away.files.tuning, overrides=steps)
    scenes = [catalog_scene("hiking-boot-01", "umbrella-01"), catalog_scene("drum-01")]
    with OneDevice():
        assert len(personalize(away, scenes, recipe)) == 2


def test_drawings_with_adapters_of_the_cpu(tiny64, away):
    with AdapterBank(tiny64.unet, tiny64.family.lora_targets, slots=1, rank=4) as bank:
        bank.initialise(0, torch.Generator())
        lora = bank.export(0)
    how = {"steps": 2, "guidance_scale": 3.0}
    requests = [
        SampleSpec("a photo of {}", 1, [TOKEN_MARK], [{"clip_l": torch.zeros(128)}], {0: 1.0, 1: 0.5}, **how),
        SampleSpec("a photo", 2, (), (), {}, **how),
    ]
    with OneDevice(), AdapterBank(away.unet, away.family.lora_targets, slots=2, rank=4) as bank:
        for slot in (0, 1):
            bank.load(slot, lora)
        assert len(draw_pictures(away, requests, bank=bank)) == 2
