import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel

from objdrive.base import files
from objdrive.base.files import EMBEDDED, find_base
from objdrive.base.prompts import TOKEN_MARK
from objdrive.base.stable_diffusion import Base
from objdrive.catalog.geometry import object_alone
from objdrive.errors import ObjdriveError
from objdrive.training.recipe import make_recipe
from objdrive.training.views import main_picture, to_pixels

HELD_OUT = (
    "scarf-01",
    "drum-01",
    "skateboard-01",
    "key-01",
    "phone-01",
    "couch-01",
    "bathtub-01",
    "bicycle-01",
    "rocket-01",
    "sailboat-01",
    "rose-01",
    "cupcake-01",
    "ice-cream-01",
)
"""Catalog objects alone in their pictures, of classes that the embedded base knows in other designs."""


def write_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copied(sd15, tmp_path):
    """(snapshot, CLIP) folders of one's own to change."""
    return shutil.copytree(sd15[0], tmp_path / "mine"), shutil.copytree(sd15[1], tmp_path / "my-clip")


class TestTiny64:
    def test_the_stock_pipeline_loads_and_draws(self):
        pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED / "tiny64", dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
        generator = torch.Generator().manual_seed(0)
        picture = pipe("a photo of a teapot", num_inference_steps=3, generator=generator).images[0]
        assert picture.size == (64, 64)
        assert np.asarray(picture).std() > 10

    def test_is_frozen_and_knows_its_sizes(self, tiny64):
        assert (tiny64.name, tiny64.resolution, tiny64.latent_size) == ("tiny64", 64, 16)
        assert not tiny64.noise.predicts_velocity
        tower = tiny64.towers[0]
        for part in (tiny64.unet, tiny64.vae, tower.encoder, tower.joint.image, tower.joint.projection):
            assert not part.training
            assert not any(value.requires_grad for value in part.parameters())
        assert len(tiny64.noise.alphas) == 1000
        assert (tiny64.noise.alphas.diff() < 0).all()

    def test_its_tuning_makes_a_recipe_and_its_classes_are_listed(self):
        files = find_base("tiny64")
        assert files.tuning["steps"] > 0
        assert len(files.classes) == 72
        assert "teapot" in files.classes

    def test_the_autoencoder_keeps_the_picture(self, tiny64, catalog_scene):
        pixels = to_pixels(tiny64, [main_picture(tiny64, catalog_scene("rocket-01"), make_recipe())])
        latents = tiny64.encode_latents(pixels)
        assert latents.shape == (1, 8, 16, 16)
        assert (tiny64.decode_latents(latents) - pixels).abs().mean() < 0.05

    def test_the_towers_know_objects_that_they_have_never_seen(self, tiny64, catalog_scene):
        scenes = [catalog_scene(name) for name in HELD_OUT]
        alone = to_pixels(tiny64, [object_alone(scene.image, scene.objects[0].mask, 64) for scene in scenes])
        prompts = [tiny64.tokenize(f"a photo of a {scene.objects[0].class_name}") for scene in scenes]
        pictures = F.normalize(tiny64.encode_images(alone), dim=-1)
        texts = F.normalize(tiny64.embed_text(prompts), dim=-1)
        right = (pictures @ texts.T).argmax(dim=1) == torch.arange(len(HELD_OUT))
        chance = 1 / len(HELD_OUT)
        assert right.float().mean() > 3 * chance


class TestFingerprint:
    def test_depends_neither_on_the_folders_place_nor_on_the_name(self, sd15, copied):
        fingerprint = find_base(str(sd15[0]), clip=str(sd15[1])).fingerprint()
        assert len(fingerprint) == 32
        assert int(fingerprint, 16) >= 0
        assert find_base(str(sd15[0]), clip=str(sd15[1])).fingerprint() == fingerprint
        assert find_base(str(copied[0]), clip=str(copied[1])).fingerprint() == fingerprint

    def test_is_that_of_the_loaded_base(self, tiny64):
        assert tiny64.fingerprint == find_base("tiny64").fingerprint() == find_base("tiny64").fingerprint()

    @pytest.mark.parametrize(
        "changed",
        [
            "mine/unet/diffusion_pytorch_model.safetensors",
            "mine/unet/config.json",
            "mine/vae/diffusion_pytorch_model.safetensors",
            "mine/text_encoder/model.safetensors",
            "mine/scheduler/scheduler_config.json",
            "mine/tokenizer/merges.txt",
            "my-clip/model.safetensors",
            "my-clip/config.json",
        ],
    )
    def test_changes_with_any_byte(self, copied, changed):
        files = find_base(str(copied[0]), clip=str(copied[1]))
        before = files.fingerprint()
        path = copied[0].parent / changed
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert files.fingerprint() != before

    def test_does_not_see_what_is_not_loaded(self, copied):
        files = find_base(str(copied[0]), clip=str(copied[1]))
        before = files.fingerprint()
        (copied[0] / "README.md").write_text("Hello")
        (copied[0] / "safety_checker").mkdir()
        (copied[0] / "safety_checker" / "model.safetensors").write_bytes(b"weights")
        (copied[0] / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"weights")
        assert files.fingerprint() == before


class TestRefusals:
    def test_of_a_name_that_is_nothing(self):
        with pytest.raises(ObjdriveError, match=r"no base 'nobody/nothing': it is not embedded \(.*tiny64"):
            find_base("nobody/nothing")

    def test_of_an_embedded_base_where_only_the_code_is(self, monkeypatch, tmp_path):
        monkeypatch.setattr(files, "EMBEDDED", tmp_path / "bases")
        with pytest.raises(ObjdriveError, match=r"no base 'tiny64': .*objdrive is not installed here"):
            find_base("tiny64")

    @pytest.mark.parametrize("name", ["no such thing", "/nowhere/at/all", "a/b/c"])
    def test_of_what_is_no_hub_id_either(self, name):
        with pytest.raises(ObjdriveError, match=f"no base '{name}'"):
            find_base(name)

    @pytest.mark.parametrize("part", ["unet", "tokenizer"])
    def test_of_a_snapshot_that_lacks_a_part(self, copied, part):
        shutil.rmtree(copied[0] / part)
        with pytest.raises(ObjdriveError, match=f"lacks {part}: it must be in diffusers' layout"):
            find_base(str(copied[0]), clip=str(copied[1]))

    def test_of_a_snapshot_for_which_no_clip_is_known(self, sd15):
        with pytest.raises(ObjdriveError, match="no CLIP of text width 32 is known: name one with --clip"):
            find_base(str(sd15[0]))

    def test_of_a_clip_that_cannot_be_had(self, copied):
        write_json(copied[0] / "text_encoder" / "config.json", hidden_size=768)
        with pytest.raises(ObjdriveError, match="'openai/clip-vit-large-patch14'"):
            find_base(str(copied[0]))

    def test_of_prompts_that_are_too_long(self, tiny64):
        longest = "teapot " * 30
        assert len(tiny64.tokenize(longest).ids) == 32
        with pytest.raises(ObjdriveError, match=r"the prompt 'a {} .*' takes 34 tokens, the base reads 32: shorten it"):
            tiny64.tokenize(f"a {TOKEN_MARK} {longest}")

    def test_of_embeddings_that_do_not_fit_the_places(self, tiny64):
        with pytest.raises(ValueError, match="the prompts have 1 places for learned tokens, got 0 embeddings"):
            tiny64.encode_text([tiny64.tokenize(TOKEN_MARK)])


class TestText:
    @pytest.mark.parametrize(
        "prompt",
        ["a photo of {} on grass", "{}", "{} teapot, under water", "a photo of {}.", "the {} and the {}"],
    )
    def test_a_learned_token_reads_as_in_the_stock_pipeline(self, tiny64, tmp_path, prompt):
        vector = tiny64.class_embeddings("teapot")["clip_l"]
        vector += 0.1 * torch.randn(128, generator=torch.Generator().manual_seed(1))
        safetensors.torch.save_file({"<mug-1>": vector}, tmp_path / "learned_embeds.safetensors")
        pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED / "tiny64", dtype=torch.float32)
        pipe.load_textual_inversion(tmp_path, use_safetensors=True)
        expected = pipe.encode_prompt(prompt.replace("{}", "<mug-1>"), "cpu", 1, False)[0]
        marked = tiny64.tokenize(prompt.replace("{}", TOKEN_MARK))
        with torch.no_grad():
            states = tiny64.encode_text([marked], [{"clip_l": vector}] * prompt.count("{}")).states
            plain = tiny64.encode_text([tiny64.tokenize(prompt.replace("{}", "teapot"))]).states
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
        assert (states - plain).abs().max() > 0.01

    def test_each_prompt_gets_its_own_embeddings(self, tiny64):
        drawn = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
        vectors = [{"clip_l": vector} for vector in drawn]
        texts = [f"{TOKEN_MARK} on grass", "a teapot", f"{TOKEN_MARK} near {TOKEN_MARK}"]
        prompts = [tiny64.tokenize(text) for text in texts]
        assert [len(prompt.places) for prompt in prompts] == [1, 0, 2]
        with torch.no_grad():
            together, embedded = tiny64.encode_text(prompts, vectors).states, tiny64.embed_text(prompts, list(drawn))
            alone = [
                (
                    tiny64.encode_text([prompt], some).states,
                    tiny64.embed_text([prompt], [one["clip_l"] for one in some]),
                )
                for prompt, some in zip(prompts, (vectors[:1], [], vectors[1:]), strict=True)
            ]
        assert together.shape == (3, 32, 128)
        torch.testing.assert_close(together, torch.cat([states for states, _ in alone]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(embedded, torch.cat([text for _, text in alone]), rtol=1e-4, atol=1e-5)

    def test_the_vocabulary_is_not_touched(self, tiny64):
        table = tiny64.vocabularies["clip_l"]
        before = table.clone()
        vector = torch.ones(128, requires_grad=True)
        states = tiny64.encode_text([tiny64.tokenize(TOKEN_MARK)], [{"clip_l": vector}]).states
        states.sum().backward()
        assert vector.grad.abs().sum() > 0
        assert table.grad is None
        assert torch.equal(table, before)

    def test_the_embedding_of_a_class_is_the_mean_over_its_tokens(self, tiny64):
        table = tiny64.vocabularies["clip_l"].numpy()
        ids = tiny64.tokenizer("alarm clock", add_special_tokens=False).input_ids
        assert len(ids) > 1
        vector = tiny64.class_embeddings("alarm clock")["clip_l"]
        np.testing.assert_allclose(vector, table[ids].mean(axis=0), rtol=1e-5, atol=1e-7)


class TestKnows:
    @pytest.mark.parametrize(
        ("class_name", "known"), [("teapot", True), ("Ice Cream", True), ("stethoscope", False), ("pot", False)]
    )
    def test_a_base_with_a_list_knows_what_is_listed(self, tiny64, class_name, known):
        assert tiny64.knows(class_name) is known

    def test_a_base_without_a_list_knows_what_is_a_word_of_its_vocabulary(self, sd15):
        base = Base.load(str(sd15[0]), clip=str(sd15[1]), device="cpu")
        assert base.knows("teapot")
        assert base.knows("coffee cup")
        assert not base.knows("stethoscope")
        assert not base.knows("coffee stethoscope")


class TestStableDiffusion15:
    """A snapshot as SD 1.5 ships it: no image tower, files of an old tokenizer, PNDM's config."""

    def test_loads_and_knows_its_sizes(self, sd15_folders):
        snapshot, clip = sd15_folders
        base = Base.load(str(snapshot), clip=str(clip), device="cpu")
        assert (base.resolution, base.latent_size) == (128, 16)
        assert base.noise.predicts_velocity == (snapshot.name == "velocity")
        assert base.files.tuning["guidance_scale"] == 7.5
        assert base.files.classes == frozenset()

    def test_reads_prompts_as_the_stock_pipeline_does(self, sd15):
        base = Base.load(str(sd15[0]), clip=str(sd15[1]), device="cpu")
        pipe = StableDiffusionPipeline.from_pretrained(sd15[0], safety_checker=None, dtype=torch.float32)
        expected = pipe.encode_prompt("a photo of a Teapot, under water", "cpu", 1, False)[0]
        states = base.encode_text([base.tokenize("a photo of a Teapot, under water")]).states
        assert states.shape == (1, 77, 32)
        torch.testing.assert_close(states, expected)

    def test_takes_both_projections_from_the_clip(self, sd15):
        base = Base.load(str(sd15[0]), clip=str(sd15[1]), device="cpu")
        clip = CLIPModel.from_pretrained(sd15[1])
        texts = ["a photo of a teapot", "a rose on grass"]
        prompts = [base.tokenize(text) for text in texts]
        pixels = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
        scaled = (pixels.numpy() - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            theirs = clip(
                input_ids=base.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids,
                pixel_values=torch.from_numpy(scaled).float(),
            )
            texts, pictures = base.embed_text(prompts), base.encode_images(pixels)
        for ours, expected in ((texts, theirs.text_embeds), (pictures, theirs.image_embeds)):
            torch.testing.assert_close(ours / ours.norm(dim=-1, keepdim=True), expected, rtol=1e-4, atol=1e-5)

    def test_pictures_of_another_size_are_brought_to_the_towers(self, sd15):
        base = Base.load(str(sd15[0]), clip=str(sd15[1]), device="cpu")
        small, large = (torch.full((1, 3, size, size), 0.25) for size in (48, 64))
        torch.testing.assert_close(base.encode_images(large), base.encode_images(small), rtol=1e-4, atol=1e-5)

    def test_latents_are_not_clipped_where_the_scheduler_s_file_does_not_say(self, copied):
        path = copied[0] / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "clip_sample"}))
        base = Base.load(str(copied[0]), clip=str(copied[1]), device="cpu")
        assert base.noise.scheduler.config["clip_sample"] is False
