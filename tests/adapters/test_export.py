"""Adapters in the forms of other tools, read back by these tools' rules and by diffusers itself."""

import re

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from random_store import metadata_of

from objdrive.adapters.adapter import Adapter, adapter_files, family_of_files
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.export import export_adapter, kohya_tensors
from objdrive.adapters.store import ArtifactStore
from objdrive.base.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from objdrive.base.files import EMBEDDED
from objdrive.cli import main
from objdrive.errors import ObjdriveError

XL_ADAPTER = Adapter({}, {"clip_l": torch.ones(4), "clip_g": torch.ones(6)})
SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = ["proj_in", "proj_out"]
_BLOCK = [f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")]
_BLOCK += ["ff.net.0.proj", "ff.net.2"]


def comfyui_key_map():
    """Which layer of SD 1.5's checkpoint ComfyUI adapts for each name in a LoRA file.

    Written by the rules of its ``unet_to_diffusers`` (comfy/utils.py) and ``model_lora_keys_unet`` (comfy/lora.py), of
    https://github.com/comfyanonymous/ComfyUI, for two blocks a level, the first three of which have attention.
    """
    places = {}

    def resnet(name, block):
        places.update({f"{name}.{layer}": f"{block}.{inner}" for inner, layer in _RESNET.items()})

    def attention(name, block):
        places.update({f"{name}.{layer}": f"{block}.{layer}" for layer in _ATTENTION})
        inner = "transformer_blocks.0"
        places.update({f"{name}.{inner}.{layer}": f"{block}.{inner}.{layer}" for layer in _BLOCK})

    for level in range(4):
        for index in range(2):
            block = 1 + 3 * level + index
            resnet(f"down_blocks.{level}.resnets.{index}", f"input_blocks.{block}.0")
            if level < 3:
                attention(f"down_blocks.{level}.attentions.{index}", f"input_blocks.{block}.1")
        for index in range(3):
            block = 3 * level + index
            resnet(f"up_blocks.{level}.resnets.{index}", f"output_blocks.{block}.0")
            if level > 0:
                attention(f"up_blocks.{level}.attentions.{index}", f"output_blocks.{block}.1")
    for index, block in enumerate((0, 2)):
        resnet(f"mid_block.resnets.{index}", f"middle_block.{block}")
    attention("mid_block.attentions.0", "middle_block.1")
    return {f"lora_unet_{name.replace('.', '_')}": place for name, place in places.items()}


@pytest.fixture(scope="module")
def sd15_unet():
    """SD 1.5's network without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15)


def lora_of(unet, rank=4):
    """Zeros in every layer that gets LoRA."""
    lora = {}
    for name, layer in unet.named_modules():
        if not name.endswith(tuple(f".{target}" for target in STABLE_DIFFUSION.lora_targets)):
            continue
        outside, inside, *kernel = layer.weight.shape
        lora[f"{name}.lora_A.weight"] = torch.zeros(rank, inside, *kernel)
        lora[f"{name}.lora_B.weight"] = torch.zeros(outside, rank, *[1] * len(kernel))
    return lora


def test_lora_is_where_the_bank_puts_it(tiny64):
    with AdapterBank(tiny64.unet, STABLE_DIFFUSION.lora_targets, slots=1, rank=4) as bank:
        shapes = {key: tensor.shape for key, tensor in bank.export(0).items()}
    assert {key: tensor.shape for key, tensor in lora_of(tiny64.unet).items()} == shapes


def test_comfyui_finds_a_layer_for_every_key_of_an_adapter_for_sd15(sd15_unet):
    layers, lora = dict(sd15_unet.named_modules()), lora_of(sd15_unet)
    tensors = kohya_tensors(lora)
    names = {key.partition(".")[0] for key in tensors}
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    known = comfyui_key_map()
    assert not names - known.keys()
    # No two of them adapt the same layer, and what is left over has no LoRA: the time embedding's layers.
    assert len({known[name] for name in names}) == len(names) == len(lora) // 2
    assert all("emb_layers" in known[name] or "skip_connection" in known[name] for name in known.keys() - names)
    for key in (key for key in lora if key.endswith(".lora_A.weight")):
        module = key.removesuffix(".lora_A.weight")
        name = f"lora_unet_{module.replace('.', '_')}"
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        # As ComfyUI adds it: up and down as matrices, shaped as the layer.
        assert up.flatten(1).shape[0] * down.flatten(1).shape[1] == layers[module].weight.numel()
        assert tensors[f"{name}.alpha"].shape == ()


def test_a_layer_that_differs_in_width_has_a_shortcut_of_its_own(sd15_unet):
    tensors = kohya_tensors(lora_of(sd15_unet))
    assert "lora_unet_up_blocks_0_resnets_0_conv_shortcut.lora_down.weight" in tensors
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (4, 320, 3, 3)
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape == (320, 4, 1, 1)


def test_layers_that_would_share_a_name_are_refused():
    lora = {f"{module}.{part}.weight": torch.ones(2, 2) for module in ("a.b", "a_b") for part in ("lora_A", "lora_B")}
    with pytest.raises(ObjdriveError, match="'a_b' would be named 'lora_unet_a_b'"):
        kohya_tensors(lora)


@pytest.fixture
def store(tmp_path, tiny64, put_adapter):
    store = ArtifactStore(str(tmp_path / "store"))
    put_adapter(store, tiny64, "mug-1", 3, phrase="<mug-1> mug")
    return store


@pytest.fixture
def exported(store, tmp_path, capsys):
    """Call it with a format: the folder that the command fills, and what it says of prompts."""

    def exported(format):
        out = tmp_path / format
        assert main(["export", store.url, "mug-1", "--format", format, "--out", str(out)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sorted(lines[:-1]) == sorted(str(path) for path in out.rglob("*.safetensors"))
        return out, lines[-1].removeprefix("prompt: ")

    return exported


def draw(prompt, *loads):
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED / "tiny64", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for load in loads:
        load(pipe)
    return pipe(
        prompt,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images


@pytest.mark.parametrize(
    ("format", "lora", "embedding", "prompt"),
    [
        ("kohya", "lora", "embeddings", "mug-1 mug"),
        ("a1111", "models/Lora", "embeddings", "mug-1 mug <lora:mug-1:1>"),
        ("comfyui", "models/loras", "models/embeddings", "embedding:mug-1 mug"),
    ],
)
def test_diffusers_draws_the_same_picture_from_what_was_exported(exported, store, format, lora, embedding, prompt):
    out, told = exported(format)
    assert told == f"a photo of {prompt}"
    lora, embedding = (out / folder / "mug-1.safetensors" for folder in (lora, embedding))
    metadata, _ = store.read("mug-1")
    folder = store.folder("mug-1", metadata.digest)
    ours = draw(
        "a photo of <mug-1> mug",
        lambda pipe: pipe.load_lora_weights(folder),
        lambda pipe: pipe.load_textual_inversion(folder, use_safetensors=True),
    )
    theirs = draw(
        "a photo of <other> mug",
        lambda pipe: pipe.load_lora_weights(lora),
        lambda pipe: pipe.load_textual_inversion(embedding, token="<other>", use_safetensors=True),
    )
    assert (ours - theirs).abs().max() < 1e-5
    without = draw(
        "a photo of <other> mug",
        lambda pipe: pipe.load_textual_inversion(embedding, token="<other>", use_safetensors=True),
    )
    assert (ours - without).abs().max() > 0.05


def test_for_diffusers_files_are_those_of_the_artifact(exported, store):
    out, prompt = exported("diffusers")
    _, files = store.read("mug-1")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert prompt == "a photo of <mug-1> mug"


def test_files_say_what_they_are(exported, store):
    out, _ = exported("a1111")
    about = {}
    for path in out.rglob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            about[file.metadata()["modelspec.architecture"].partition("/")[2]] = file.metadata()
    assert about.keys() == {"lora", "textual-inversion"}
    lora = about["lora"]
    assert lora["modelspec.sai_model_spec"] == "1.0.1"
    assert lora["modelspec.title"] == "mug-1"
    assert lora["modelspec.trigger_phrase"] == "mug-1 mug"
    assert lora["objdrive.digest"] == store.current("mug-1").digest
    assert (lora["ss_network_dim"], lora["ss_network_alpha"]) == ("4", "4")


@pytest.mark.parametrize(
    ("width", "base", "architecture", "resolution", "v2"),
    [
        (768, "stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1", "512x512", "False"),
        (1024, "stabilityai/stable-diffusion-2-1", "stable-diffusion-v2-768-v", "768x768", "True"),
        (1024, "stabilityai/stable-diffusion-2-1-base", "stable-diffusion-v2-512", "512x512", "True"),
    ],
)
def test_a_base_is_named_as_other_tools_know_it(store, width, base, architecture, resolution, v2):
    metadata = store.current("mug-1")
    metadata = metadata.model_copy(update={"base": metadata.base.model_copy(update={"id": base})})
    lora = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}
    out = export_adapter(Adapter(lora, {"clip_l": torch.ones(width)}), metadata, "kohya", family=STABLE_DIFFUSION)
    header = out.files["lora/mug-1.safetensors"].decode("latin-1")
    assert f'"modelspec.architecture":"{architecture}/lora"' in header
    assert f'"modelspec.resolution":"{resolution}"' in header
    assert f'"ss_v2":"{v2}"' in header
    vectors = safetensors.torch.load(out.files["embeddings/mug-1.safetensors"])
    assert {name: tuple(one.shape) for name, one in vectors.items()} == {"emb_params": (1, width)}


def test_an_adapter_without_lora_is_an_embedding_alone(store):
    adapter = Adapter({}, {"clip_l": torch.ones(8)})
    out = export_adapter(adapter, store.current("mug-1"), "a1111", family=STABLE_DIFFUSION)
    assert list(out.files) == ["embeddings/mug-1.safetensors"]
    assert out.prompt == "a photo of mug-1 mug"
    assert adapter_files(adapter, token="<mug-1>", family=STABLE_DIFFUSION).keys() == {"learned_embeds.safetensors"}


def test_an_object_that_is_not_there_is_told(store, capsys):
    assert main(["export", store.url, "gone", "--format", "kohya"]) == 2
    assert re.search("object 'gone' has no current artifact", capsys.readouterr().err)


@pytest.mark.parametrize("format", ["kohya", "a1111", "comfyui"])
def test_adapters_of_two_text_encoders_go_to_diffusers_alone(format):
    files = adapter_files(XL_ADAPTER, token="<mug>", family=STABLE_DIFFUSION_XL)
    assert family_of_files(files) is STABLE_DIFFUSION_XL
    metadata = metadata_of("mug", None, fingerprint="f" * 32)
    with pytest.raises(ObjdriveError, match="use --format diffusers"):
        export_adapter(XL_ADAPTER, metadata, format, family=STABLE_DIFFUSION_XL)
    exported = export_adapter(XL_ADAPTER, metadata, "diffusers", family=STABLE_DIFFUSION_XL)
    assert exported.files == files
