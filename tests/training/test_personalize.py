import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from objdrive.adapters.bank import AdapterBank
from objdrive.base.prompts import TOKEN_MARK, marked_phrase
from objdrive.base.stable_diffusion import Base
from objdrive.catalog.geometry import cut, whole_window
from objdrive.training.class_pictures import ClassPictures
from objdrive.training.loop import clip_each_, learning_rate_factor
from objdrive.training.losses import latent_mask, object_loss
from objdrive.training.personalize import Diverged, FineTuned, personalize
from objdrive.training.recipe import PRESETS, Recipe, make_recipe
from objdrive.training.views import main_picture, make_views, to_pixels

RECIPE = Recipe(
    steps=6,
    warmup_steps=2,
    lora_lr=2e-3,
    embedding_lr=5e-3,
    max_grad_norm=0.05,
    prototype_steps=4,
    prototype_lr=1e-2,
    views=2,
    zoom=0.5,
    ccr_weight=1.0,
    ccr_unconditional=0.5,
    class_samples=1,
    class_pool=1,
    sample_steps=2,
    guidance_scale=4.0,
)
SCENES = (
    ("rocket-01",),
    ("jeans-01", "high-heel-01"),
    ("drum-01",),
    ("bathtub-01",),
    ("alarm-clock-01",),
    ("rose-01",),
    ("bicycle-01",),
    ("skateboard-01",),
)


@pytest.fixture(scope="module")
def alone(tiny64, catalog_scene):
    """Each of `SCENES`, fine-tuned alone, by its key."""
    scenes = [catalog_scene(*ids) for ids in SCENES]
    return {scene.key: personalize(tiny64, [scene], RECIPE)[0] for scene in scenes}


def products(adapter):
    """What the adapter adds to each layer's weight, B A."""
    return [
        adapter.lora[key.replace("lora_A", "lora_B")].flatten(1) @ down.flatten(1)
        for key, down in adapter.lora.items()
        if "lora_A" in key
    ]


def largest(tensors):
    return max(float(tensor.abs().max()) for tensor in tensors)


def distance(one, other):
    """Largest difference between two results, over prototypes, embeddings and what LoRA adds to the weights.

    Not over A itself: some of its values have no gradient but rounding noise, which Adam blows up to full steps, and
    no effect either.
    """
    assert isinstance(one, FineTuned)
    assert isinstance(other, FineTuned)
    pairs = [(a["clip_l"], b["clip_l"]) for a, b in zip(one.prototypes, other.prototypes, strict=True)]
    for a, b in zip(one.adapters, other.adapters, strict=True):
        pairs += [(a.embeddings["clip_l"], b.embeddings["clip_l"]), *zip(products(a), products(b), strict=True)]
    return largest(a - b for a, b in pairs)


def assert_same(one, other):
    assert distance(one, other) < 1e-4
    for a, b in zip(one.adapters, other.adapters, strict=True):
        added = torch.cat([layer.flatten() for layer in products(a)])
        difference = torch.cat([layer.flatten() for layer in products(b)]) - added
        assert difference.norm() < 1e-3 * added.norm()
    for name in ("loss_object", "loss_class", "steps"):
        assert one.metrics[name] == pytest.approx(other.metrics[name], rel=1e-4, abs=1e-6)


class TestGroup:
    """A group is only an optimisation: each of its scenes gets the adapter that it would get alone."""

    @pytest.mark.parametrize("order", [(2, 1, 4), (7, 3, 1, 6, 0, 5, 2, 4)], ids=["3", "8"])
    def test_gives_each_the_adapter_that_it_would_get_alone(self, tiny64, catalog_scene, alone, order):
        scenes = [catalog_scene(*SCENES[index]) for index in order]
        results = personalize(tiny64, scenes, RECIPE)
        for scene, result in zip(scenes, results, strict=True):
            assert len(result.adapters) == len(result.prototypes) == len(scene.objects)
            assert_same(result, alone[scene.key])

    def test_the_adapters_that_must_agree_are_far_from_each_other(self, alone):
        singles = [result for result in alone.values() if len(result.adapters) == 1]
        for index, one in enumerate(singles):
            for other in singles[:index]:
                assert distance(one, other) > 0.1
                pairs = zip(products(one.adapters[0]), products(other.adapters[0]), strict=True)
                assert largest(a - b for a, b in pairs) > 0.5 * largest(products(one.adapters[0]))

    def test_a_scene_has_one_lora_and_a_token_for_each_object(self, alone):
        first, second = alone["jeans-01+high-heel-01"].adapters
        assert all(torch.equal(first.lora[key], second.lora[key]) for key in first.lora)
        assert (first.embeddings["clip_l"] - second.embeddings["clip_l"]).abs().max() > 0.01

    def test_a_member_that_diverges_leaves_the_others_alone(self, tiny64, catalog_scene, alone):
        good, pair, masked, classed = (catalog_scene(*SCENES[index]) for index in (0, 1, 2, 3))
        # One mask's sum becomes NaN, so 0/0 in the loss; one class picture carries NaN through the whole network.
        mask = masked.objects[0].mask.copy()
        mask[mask.shape[0] // 2, mask.shape[1] // 2] = np.nan
        masked = replace(masked, objects=(replace(masked.objects[0], mask=mask),))
        pictures = ClassPictures(tiny64, RECIPE)
        pictures.draw({"bathtub"})
        pictures["bathtub"].fill_(math.nan)
        with np.errstate(invalid="ignore"):
            results = personalize(tiny64, [masked, good, classed, pair], RECIPE, class_pictures=pictures)
        for broken in (results[0], results[2]):
            assert isinstance(broken, Diverged)
            assert 0 <= broken.step < RECIPE.steps
            assert f"at step {broken.step}: lower lora_lr or embedding_lr" in broken.message
        assert_same(results[1], alone[good.key])
        assert_same(results[3], alone[pair.key])

    def test_class_pictures_drawn_before_give_the_same(self, tiny64, catalog_scene, alone):
        pictures = ClassPictures(tiny64, RECIPE)
        pictures.draw({"drum", "rocket", "jeans"})
        steps = []
        scene = catalog_scene("rocket-01")
        result = personalize(tiny64, [scene], RECIPE, class_pictures=pictures, on_step=lambda: steps.append(1))[0]
        assert_same(result, alone[scene.key])
        assert len(steps) >= RECIPE.steps


class TestSeeds:
    def test_the_same_seed_and_key_give_the_same_bits(self, tiny64, catalog_scene, alone):
        scene = catalog_scene("rocket-01")
        once, again = alone[scene.key].adapters[0], personalize(tiny64, [scene], RECIPE)[0].adapters[0]
        assert torch.equal(once.embeddings["clip_l"], again.embeddings["clip_l"])
        assert once.lora.keys() == again.lora.keys()
        assert all(torch.equal(once.lora[key], again.lora[key]) for key in once.lora)

    def test_another_seed_or_key_gives_another_adapter(self, tiny64, catalog_scene, alone):
        scene = catalog_scene("rocket-01")
        renamed = personalize(tiny64, [replace(scene, key="another")], RECIPE)[0]
        reseeded = personalize(tiny64, [scene], RECIPE.model_copy(update={"seed": 1}))[0]
        for other in (renamed, reseeded):
            assert torch.equal(other.prototypes[0]["clip_l"], alone[scene.key].prototypes[0]["clip_l"])
            learned, expected = (one.adapters[0].embeddings["clip_l"] for one in (other, alone[scene.key]))
            assert (learned - expected).abs().max() > 1e-3


class TestPresets:
    @pytest.fixture(scope="class", params=PRESETS)
    @classmethod
    def tuned(cls, request, tiny64, catalog_scene):
        """(recipe, result) of a short run of each preset."""
        short = [f"{field}={getattr(RECIPE, field)}" for field in ("sample_steps", "class_pool")]
        recipe = make_recipe(request.param, overrides=[*short, "steps=2", "prototype_steps=2"])
        return recipe, personalize(tiny64, [catalog_scene("rocket-01")], recipe)[0]

    def test_trains_what_it_should_and_nothing_else(self, tiny64, tuned):
        recipe, result = tuned
        adapter, start = result.adapters[0], result.prototypes[0]["clip_l"]
        assert bool(adapter.lora) == (recipe.preset != "textual_inversion")
        if adapter.lora:
            assert largest(products(adapter)) > 0
            assert all(len(down) == recipe.rank for key, down in adapter.lora.items() if "lora_A" in key)
        frozen = recipe.preset in ("lora", "dreambooth", "t_lora")
        assert torch.equal(adapter.embeddings["clip_l"], start) == frozen
        class_word = tiny64.class_embeddings("rocket")["clip_l"]
        assert torch.equal(start, class_word) == (recipe.preset in ("lora", "textual_inversion"))
        assert (result.metrics["loss_class"] > 0) == (recipe.preset == "dreambooth" or recipe.ccr_weight > 0)
        assert result.metrics["steps"] == 2
        assert result.metrics["seconds"] > 0

    def test_names_the_object_as_the_method_does(self, tuned):
        recipe, _ = tuned
        expected = f"{TOKEN_MARK} rocket" if recipe.preset in ("dreambooth", "t_lora") else TOKEN_MARK
        assert marked_phrase(recipe.phrase, "rocket") == expected


def test_a_least_rank_leaves_the_last_ranks_to_clean_timesteps(tiny64, catalog_scene):
    def trained(least_rank):
        update = {"steps": 2, "rank": 4, "least_rank": least_rank, "max_grad_norm": 1e9}
        return personalize(tiny64, [catalog_scene("rocket-01")], RECIPE.model_copy(update=update))[0].adapters[0].lora

    plain, whole, none = trained(None), trained(4), trained(0)
    assert all(torch.allclose(whole[name], plain[name], atol=1e-4) for name in plain)
    ups = [value for name, value in none.items() if "lora_B" in name]
    # Adam's steps are as large wherever there is a gradient at all: at two steps no timestep was clean enough.
    assert any(value[:, 0].any() for value in ups)
    assert not any(value[:, 3].any() for value in ups)


class TestLearning:
    def test_the_object_is_learned(self, tiny64, catalog_scene):
        scene = catalog_scene("drum-01")
        recipe = RECIPE.model_copy(update={"steps": 25, "lora_lr": 4e-3})
        result = personalize(tiny64, [scene], recipe)[0]
        learned, start = result.adapters[0], result.prototypes[0]
        before = fixed_noise_losses(tiny64, scene, start, {})
        after = fixed_noise_losses(tiny64, scene, learned.embeddings, learned.lora)
        assert (after < before).all()
        assert after.mean() < 0.9 * before.mean()

    @pytest.mark.parametrize(
        ("field", "least", "most", "prompt", "around"),
        [("ccr_unconditional", 0.0, 1.0, "", False), ("ccr_background", False, True, f"a photo of {TOKEN_MARK}", True)],
    )
    def test_the_regularization_keeps(self, tiny64, catalog_scene, field, least, most, prompt, around):
        scene = catalog_scene("drum-01")
        base_recipe = RECIPE.model_copy(update={"steps": 24, "ccr_weight": 1.0, "ccr_unconditional": 0.0})
        base_recipe = base_recipe.model_copy(update={"ccr_background": False})
        changes = []
        for value in (least, most):
            (adapter,) = personalize(tiny64, [scene], base_recipe.model_copy(update={field: value}))[0].adapters
            changes.append(change_of_the_base(tiny64, scene, adapter, prompt, around=around))
        assert changes[1] < 0.6 * changes[0]

    def test_no_steps_leave_the_prototype(self, tiny64, catalog_scene):
        scene = catalog_scene("jeans-01", "high-heel-01")
        result = personalize(tiny64, [scene], RECIPE.model_copy(update={"steps": 0}))[0]
        for adapter, start in zip(result.adapters, result.prototypes, strict=True):
            assert torch.equal(adapter.embeddings["clip_l"], start["clip_l"])
            assert largest(products(adapter)) == 0

    def test_the_base_is_as_it_was(self, tiny64, catalog_scene):
        before = {key: value.clone() for key, value in tiny64.unet.state_dict().items()}
        personalize(tiny64, [catalog_scene("drum-01")], RECIPE.model_copy(update={"steps": 1}))
        after = tiny64.unet.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def change_of_the_base(base, scene, adapter, prompt, *, around):
    """Mean square of what an adapter changes of predictions of the noised first view: all over it or around the object.

    The base alone is given the class word in the token's place.
    """
    timesteps = torch.arange(50, 700, 50)
    view = make_views(base, scene, RECIPE)[0]
    latents = view.latents.repeat(len(timesteps), 1, 1, 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noised = base.noise.add_noise(latents, noise, timesteps)

    def predict(text, vectors=()):
        prompt = base.encode_text([base.tokenize(text)], list(vectors))
        return base.predict(noised, timesteps, prompt.expand(len(timesteps)))

    with AdapterBank(base.unet, base.family.lora_targets, slots=1, rank=RECIPE.rank) as bank, torch.no_grad():
        alone = predict(prompt.replace(TOKEN_MARK, scene.objects[0].class_name))
        bank.load(0, adapter.lora)
        with bank.active([0]):
            change = (predict(prompt, [adapter.embeddings] if TOKEN_MARK in prompt else []) - alone).square().mean(1)
    outside = 1 - view.weights
    return float((change * outside).sum() / outside.sum() if around else change.mean())


def fixed_noise_losses(base, scene, embeddings, lora):
    """Object-specific losses of the photo at 13 timesteps that are trained on, with noise that is always the same."""
    mask = scene.objects[0].mask
    weights = latent_mask(torch.from_numpy(cut(scene.image, mask, whole_window(mask), base.resolution)[1])[None], 16)
    timesteps = torch.arange(50, 700, 50)
    latents = base.encode_latents(to_pixels(base, [main_picture(base, scene, RECIPE)])).repeat(len(timesteps), 1, 1, 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with (
        AdapterBank(base.unet, base.family.lora_targets, slots=1, rank=RECIPE.rank) as bank,
        torch.no_grad(),
        bank.active([0]),
    ):
        bank.load(0, lora)
        prompt = base.encode_text([base.tokenize(f"a photo of {TOKEN_MARK}")], [embeddings])
        noised = base.noise.add_noise(latents, noise, timesteps)
        prediction = base.predict(noised, timesteps, prompt.expand(len(timesteps)))
    return object_loss(prediction, noise, weights[None])


class TestStableDiffusion15:
    def test_fine_tunes_with_epsilon_and_v_prediction(self, sd15_folders, catalog_scene):
        snapshot, clip = sd15_folders
        base = Base.load(str(snapshot), clip=str(clip), device="cpu")
        scenes = [catalog_scene("rocket-01"), catalog_scene("jeans-01", "high-heel-01")]
        recipe = RECIPE.model_copy(update={"steps": 3})
        together = personalize(base, scenes, recipe)
        for scene, result in zip(scenes, together, strict=True):
            assert_same(result, personalize(base, [scene], recipe)[0])
            assert largest(products(result.adapters[0])) > 0
            assert result.adapters[0].embeddings["clip_l"].shape == (32,)

    def test_the_loss_is_that_of_what_the_network_predicts(self, sd15_folders, catalog_scene):
        """A network that answers zero has a loss known in closed form: E[eps^2] = 1, E[v^2] = a + (1 - a) z^2."""
        snapshot, clip = sd15_folders
        base = Base.load(str(snapshot), clip=str(clip), device="cpu")
        with torch.no_grad():
            base.unet.conv_out.weight.zero_()
            base.unet.conv_out.bias.zero_()
        base.vae.register_to_config(scaling_factor=20.0)
        scene = catalog_scene("rocket-01")
        square = base.encode_latents(to_pixels(base, [main_picture(base, scene, RECIPE)])).square().mean()
        alphas = base.noise.alphas
        expected = float((alphas + (1 - alphas) * square).mean()) if base.noise.predicts_velocity else 1.0
        assert (expected > 2) == base.noise.predicts_velocity
        result = personalize(base, [scene], make_recipe("lora", overrides=["steps=4", "views=16"]))[0]
        assert result.metrics["loss_object"] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("steps", "warmup", "factors"),
    [
        (110, 10, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 35: 0.1 + 0.9 * (0.5 + 0.5**1.5), 60: 0.55, 110: 0.1}),
        (100, 0, {0: 1.0, 50: 0.55, 100: 0.1}),
        (5, 10, {0: 0.1, 4: 0.5, 5: 0.6}),
    ],
)
def test_the_learning_rate_warms_up_and_falls_to_a_tenth(steps, warmup, factors):
    recipe = Recipe(steps=steps, warmup_steps=warmup)
    for step, factor in factors.items():
        assert learning_rate_factor(step, recipe) == pytest.approx(factor)


class TestClipping:
    def test_each_slot_is_clipped_as_torch_would_clip_it_alone(self):
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 5), (3,), (4, 2, 2)]
        scales = torch.tensor([0.01, 1.0, 30.0, 0.3])
        stacks = [nn.Parameter(torch.zeros(4, *shape)) for shape in shapes]
        for stack in stacks:
            noise = torch.randn(stack.shape, generator=generator)
            stack.grad = noise * scales.view(-1, *[1] * (stack.dim() - 1))
        alone = [[nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in scales]
        norms = []
        for slot, values in enumerate(alone):
            for value, stack in zip(values, stacks, strict=True):
                value.grad = stack.grad[slot].clone()
            norms.append(torch.nn.utils.clip_grad_norm_(values, 1.0))
        torch.testing.assert_close(clip_each_(stacks, 1.0), torch.stack(norms))
        for slot, values in enumerate(alone):
            for value, stack in zip(values, stacks, strict=True):
                torch.testing.assert_close(stack.grad[slot], value.grad)

    def test_a_broken_slot_does_not_spread(self):
        stack = nn.Parameter(torch.zeros(3, 2))
        stack.grad = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [0.3, 0.4]])
        norms = clip_each_([stack], 1.0)
        np.testing.assert_allclose(norms, [5, math.nan, 0.5])
        np.testing.assert_allclose(stack.grad[[0, 2]], [[0.6, 0.8], [0.3, 0.4]], rtol=1e-5)
