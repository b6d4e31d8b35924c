"""What sets families apart: towers, what stands for no prompt, autoencoders, defaults, names in files."""

import json

import bases
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel

from objdrive.base.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from objdrive.base.files import find_base
from objdrive.base.prompts import TOKEN_MARK
from objdrive.base.stable_diffusion import Base
from objdrive.errors import ObjdriveError
from objdrive.training.recipe import make_recipe


@pytest.fixture(scope="module")
def sd21(tmp_path_factory):
    return bases.written(tmp_path_factory.mktemp("sd21"), bases.write_sd21)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return bases.written(tmp_path_factory.mktemp("sdxl"), bases.write_sdxl)


def load(folders, **options):
    return Base.load(str(folders[0]), clip=str(folders[1]), device="cpu", **options)


class TestTowers:
    def test_texts_of_a_shortened_encoder_are_compared_through_the_whole_tower(self, sd21):
        base, clip = load(sd21), CLIPModel.from_pretrained(sd21[1])
        texts = ["a photo of a teapot", "a rose on grass"]
        ids = base.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            ours = base.embed_text([base.tokenize(text) for text in texts])
            theirs = clip.text_projection(clip.text_model(ids).pooler_output)
            through_the_encoder = clip.text_projection(base.towers[0].encoder(ids).pooler_output)
        torch.testing.assert_close(ours, theirs)
        assert (ours - through_the_encoder).abs().max() > 0.01

    def test_a_learned_vector_acts_in_the_whole_tower_too(self, sd21):
        base = load(sd21)
        prompt, vector = base.tokenize(f"a {TOKEN_MARK}"), torch.ones(32, requires_grad=True)
        base.embed_text([prompt], [vector]).sum().backward()
        assert vector.grad.abs().sum() > 0

    def test_a_pooled_prompt_is_its_end_whatever_the_config_calls_the_end(self, tmp_path, sdxl):
        """SDXL's own config names a token that its tokenizer does not use."""
        old = bases.written(tmp_path, bases.write_sdxl, eos=2)
        pooled = []
        for base in (load(sdxl), load(old)):
            vectors = {name: torch.ones(table.shape[1]) for name, table in base.vocabularies.items()}
            pooled.append(base.encode_text([base.tokenize(f"a {TOKEN_MARK} on grass")], [vectors]).pooled)
        torch.testing.assert_close(*pooled)

    def test_bases_are_frozen_in_all_parts(self, sdxl, sd21):
        for base in (load(sdxl), load(sd21)):
            parts = [base.unet, base.vae]
            for tower in base.towers:
                parts += [tower.encoder, *((tower.joint.text, tower.joint.image) if tower.joint else ())]
            for part in parts:
                assert not part.training
                assert not any(weight.requires_grad for weight in part.parameters())


class TestNoPrompt:
    def test_is_zeros_where_the_base_was_trained_so(self, sdxl):
        base = load(sdxl)
        absent, empty, worded = (
            base.encode_text([base.tokenize(text, negative=negative)])
            for text, negative in (("", True), ("", False), ("red", True))
        )
        assert not absent.states.any()
        assert not absent.pooled.any()
        for one in (empty, worded):
            assert one.states.any()
            assert one.pooled.any()

    def test_is_an_empty_text_where_the_base_says_so(self, tmp_path):
        folders = bases.written(tmp_path, bases.write_sdxl)
        index = folders[0] / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
        base = load(folders)
        assert base.encode_text([base.tokenize("", negative=True)]).states.any()

    def test_is_an_empty_text_of_other_families(self, tiny64):
        assert tiny64.encode_text([tiny64.tokenize("", negative=True)]).states.any()


class TestAutoencoder:
    @pytest.fixture
    def named(self, tmp_path):
        def named(force_upcast):
            AutoencoderKL.from_config(bases.small_vae_config("sdxl") | {"force_upcast": force_upcast}).save_pretrained(
                tmp_path / "vae"
            )
            return str(tmp_path / "vae")

        return named

    def test_is_in_float32_whatever_the_network_is_in(self, sdxl):
        base = load(sdxl, dtype=torch.bfloat16)
        assert (base.unet.dtype, base.vae.dtype) == (torch.bfloat16, torch.float32)

    @pytest.mark.parametrize(("force_upcast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
    def test_one_that_is_named_may_bear_less(self, sdxl, named, force_upcast, dtype):
        base = load(sdxl, vae=named(force_upcast), dtype=torch.bfloat16)
        assert base.vae.dtype is dtype
        latents = base.encode_latents(torch.rand(1, 3, 64, 64))
        assert latents.dtype is base.decode_latents(latents).dtype is torch.float32

    def test_counts_for_the_fingerprint(self, sdxl, named):
        files = [find_base(str(sdxl[0]), clip=str(sdxl[1]), vae=vae) for vae in (None, named(False))]
        assert files[0].fingerprint() != files[1].fingerprint()


class TestDefaults:
    def test_those_of_the_family_stand_below_a_snapshot_s_own(self, tmp_path):
        folders = bases.written(tmp_path, bases.write_sdxl)
        files = find_base(str(folders[0]), clip=str(folders[1]))
        recipe = make_recipe(tuning=files.tuning)
        assert (recipe.guidance_scale, recipe.lora_lr) == (5.0, 1e-4)
        (folders[0] / "recipe.yaml").write_text("lora_lr: 0.5\n")
        recipe = make_recipe(tuning=files.tuning)
        assert (recipe.guidance_scale, recipe.lora_lr) == (5.0, 0.5)

    def test_those_of_stable_diffusion_are_the_recipe_s(self):
        assert make_recipe(tuning=STABLE_DIFFUSION.tuning).digest == make_recipe().digest


class TestEmbeddingFiles:
    VECTORS = {"clip_l": torch.ones(32), "clip_g": torch.zeros(24)}  # noqa: RUF012

    def test_two_vectors_are_named_after_their_encoders(self):
        tensors = STABLE_DIFFUSION_XL.embedding_tensors(self.VECTORS, "<mug-1>")
        assert {name: tuple(rows.shape) for name, rows in tensors.items()} == {"clip_l": (1, 32), "clip_g": (1, 24)}
        read = STABLE_DIFFUSION_XL.read_embeddings(tensors, "<mug-1>")
        assert all(torch.equal(read[name], vector) for name, vector in self.VECTORS.items())

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"clip_l": torch.ones(1, 32)}, r"holds \['clip_l'\], expected only 'clip_l' and 'clip_g'"),
            ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(1, 24)}, r"shape \(2, 32\) for 'clip_l', expected one"),
            ({"clip_l": torch.ones(32), "clip_g": torch.ones(1, 24)}, r"shape \(32,\) for 'clip_l'"),
        ],
    )
    def test_other_files_are_refused(self, tensors, message):
        with pytest.raises(ObjdriveError, match=message):
            STABLE_DIFFUSION_XL.read_embeddings(tensors, "<mug-1>")
