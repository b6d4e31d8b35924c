from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from objdrive.adapters.adapter import Adapter, adapter_files
from objdrive.adapters.bank import AdapterBank
from objdrive.base.family import STABLE_DIFFUSION
from objdrive.base.files import EMBEDDED
from objdrive.base.prompts import TOKEN_MARK
from objdrive.base.stable_diffusion import Base
from objdrive.errors import ObjdriveError
from objdrive.pictures import to_pictures
from objdrive.sampling import sampler
from objdrive.sampling.inpainting import Canvas
from objdrive.sampling.negatives import NegativePrompts
from objdrive.sampling.sampler import Layout, begin, draw_latents, draw_pictures, starting_noise

RANK = 4
STEPS = 3
GUIDANCE = 4.0
TOKEN = "<drum-01>"
OTHER_TOKEN = "<drum-02>"

SampleSpec = partial(sampler.SampleSpec, steps=STEPS, guidance_scale=GUIDANCE)


@pytest.fixture(scope="module")
def adapters(tiny64):
    """Three adapters strong enough that each changes every picture."""
    with AdapterBank(tiny64.unet, tiny64.family.lora_targets, slots=1, rank=RANK) as bank:
        adapters = []
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            bank.initialise(0, generator)
            lora = {
                key: 0.1 * torch.randn(value.shape, generator=generator) if "lora_B" in key else value
                for key, value in bank.export(0).items()
            }
            vector = tiny64.class_embeddings("drum")["clip_l"] + 0.02 * torch.randn(128, generator=generator)
            adapters.append(Adapter(lora, {"clip_l": vector}))
    return adapters


@pytest.fixture(scope="module")
def bank(tiny64, adapters):
    with AdapterBank(tiny64.unet, tiny64.family.lora_targets, slots=3, rank=RANK) as bank:
        for slot, adapter in enumerate(adapters):
            bank.load(slot, adapter.lora)
        yield bank


def test_half_precision_draws_the_same_pictures(tiny64, bank, adapters):
    halved = adapters[1].in_half_precision()
    assert {tensor.dtype for tensor in halved.lora.values()} == {torch.float16}
    phrases = {"phrases": [TOKEN_MARK], "steps": 8}
    whole = SampleSpec("{} on grass", 5, embeddings=[adapters[1].embeddings], slots={1: 1.0}, **phrases)
    half = replace(whole, embeddings=[halved.embeddings], slots={0: 1.0})
    with AdapterBank(tiny64.unet, tiny64.family.lora_targets, slots=1, rank=RANK) as other:
        other.load(0, halved.lora)
        pictures = [tiny64.decode_latents(draw(tiny64, [half], other))]
    pictures += [tiny64.decode_latents(draw(tiny64, [spec], bank)) for spec in (whole, replace(whole, slots={}))]
    assert difference(pictures[0], pictures[1]) < 1e-2
    assert difference(pictures[1], pictures[2]) > 0.1


def draw(base, requests, bank=None):
    return draw_latents(base, requests, bank=bank)


def difference(one, other):
    return float((one - other).abs().max())


def stock_latents(pipe, prompt, seed, negative_prompt=None):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images


@pytest.fixture(scope="module")
def stock(adapters, tmp_path_factory):
    """The stock pipeline with an artifact's folder loaded, and another object's token."""
    folder = tmp_path_factory.mktemp("artifact")
    for name, data in adapter_files(adapters[1], token=TOKEN, family=STABLE_DIFFUSION).items():
        (folder / name).write_bytes(data)
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED / "tiny64", dtype=torch.float32)
    pipe.load_lora_weights(folder)
    pipe.load_textual_inversion(folder, use_safetensors=True)
    pipe.load_textual_inversion({OTHER_TOKEN: adapters[2].embeddings["clip_l"]})
    return pipe


class TestStockDiffusers:
    @pytest.mark.parametrize("phrase", ["{token}", "{token} drum"])
    def test_draws_the_same_from_an_artifact(self, tiny64, bank, adapters, stock, phrase):
        request = SampleSpec(
            "a photo of {} on grass",
            seed=2**40 + 7,
            phrases=[phrase.replace("{token}", TOKEN_MARK)],
            embeddings=[adapters[1].embeddings],
            slots={1: 1.0},
        )
        ours = draw(tiny64, [request], bank)
        theirs = stock_latents(stock, f"a photo of {phrase.replace('{token}', TOKEN)} on grass", request.seed)
        assert ours.shape == theirs.shape == (1, 8, 16, 16)
        assert difference(ours, theirs) < 1e-3
        assert difference(ours, draw(tiny64, [replace(request, slots={})])) > 0.05
        other_token = replace(request, embeddings=[adapters[0].embeddings])
        assert difference(ours, draw(tiny64, [other_token], bank)) > 0.01

    def test_takes_negative_prompts_alike(self, tiny64, bank, stock):
        request = SampleSpec("a photo of a teapot", seed=3, slots={1: 1.0}, negative_prompt="grass, blue")
        ours = draw(tiny64, [request], bank)
        assert difference(ours, stock_latents(stock, request.prompt, 3, request.negative_prompt)) < 1e-3
        assert difference(ours, draw(tiny64, [replace(request, negative_prompt="")], bank)) > 0.01

    def test_several_objects_take_their_places_in_order(self, tiny64, bank, adapters, stock):
        embeddings = [adapters[1].embeddings, adapters[2].embeddings]
        request = SampleSpec("{} left of {}", 1, [f"{TOKEN_MARK} drum", TOKEN_MARK], embeddings, slots={1: 1.0})
        ours = draw(tiny64, [request], bank)
        assert difference(ours, stock_latents(stock, f"{TOKEN} drum left of {OTHER_TOKEN}", 1)) < 1e-3
        swapped = replace(request, embeddings=embeddings[::-1])
        assert difference(ours, draw(tiny64, [swapped], bank)) > 0.01

    def test_draws_the_same_with_a_layout_by_a_callback(self, tiny64, bank, adapters, stock):
        """As docs/recipes.md tells users to have it."""
        layout = Layout(4.5, ["drum"], [{1: 1.0}])
        prompt, steps = "a photo of {} on grass", 8
        request = SampleSpec(prompt, 7, [TOKEN_MARK], [adapters[1].embeddings], layout=layout, steps=steps)
        ours = draw(tiny64, [request], bank)

        def encode(text):
            positive, negative = stock.encode_prompt(text, "cpu", 1, True)
            return torch.cat([negative, positive])

        def take_over(pipe, step, timestep, inputs):
            alpha = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[min(step + 1, steps - 1)]]
            if ((1 - alpha) / alpha).sqrt() <= layout.noise:
                pipe.enable_lora()
                inputs["prompt_embeds"] = encode(prompt.replace("{}", TOKEN))
            return inputs

        stock.set_progress_bar_config(disable=True)
        stock.disable_lora()
        theirs = stock(
            prompt.replace("{}", "drum"),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(7),
            callback_on_step_end=take_over,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
            output_type="latent",
        ).images
        assert difference(ours, theirs) < 1e-3

    def test_draws_the_same_with_epsilon_and_v_prediction(self, sd15_folders):
        snapshot, clip = sd15_folders
        base = Base.load(str(snapshot), clip=str(clip), device="cpu")
        pipe = StableDiffusionPipeline(
            **{
                "vae": base.vae,
                "text_encoder": base.towers[0].encoder,
                "tokenizer": base.tokenizer,
                "unet": base.unet,
                "scheduler": DDIMScheduler.from_pretrained(snapshot / "scheduler"),
                "safety_checker": None,
                "feature_extractor": None,
                "requires_safety_checker": False,
            }
        )
        ours = draw(base, [SampleSpec("a photo of a teapot", seed=5)])
        assert difference(ours, stock_latents(pipe, "a photo of a teapot", 5)) < 1e-3


def test_a_least_rank_holds_at_each_samples_own_timestep(tiny64, adapters):
    request = SampleSpec("a photo of {}", 1, [TOKEN_MARK], [adapters[1].embeddings], {0: 1.0})
    others = [replace(request, slots={}), replace(request, slots={1: 1.0}, steps=STEPS + 2)]
    drawn = {}
    with AdapterBank(tiny64.unet, tiny64.family.lora_targets, slots=2, rank=RANK) as bank:
        bank.load(1, adapters[2].lora)
        for least_rank in (None, RANK, 0):
            bank.load(0, adapters[1].lora, least_rank=least_rank)
            alone = draw(tiny64, [request], bank)
            assert difference(draw(tiny64, [request, *others], bank)[:1], alone) < 1e-3
            drawn[least_rank] = alone
    assert difference(drawn[RANK], drawn[None]) < 1e-3
    assert difference(drawn[0], drawn[None]) > 0.02


class TestBatches:
    def test_a_request_does_not_depend_on_its_batch_mates(self, tiny64, bank, adapters):
        requests = [
            SampleSpec(prompt, seed, [TOKEN_MARK], [adapters[slot].embeddings], {slot: 1.0}, negative)
            for prompt, seed, slot, negative in (
                ("a photo of {} on grass", 1, 2, ""),
                ("{} and {}, under water", 2, 0, "red"),
                ("a photo of {} on grass", 1, 1, ""),
                ("a photo of {}", 3, 2, ""),
                ("a photo of {} on grass", 1, 2, ""),
            )
        ]
        together = draw(tiny64, requests, bank)
        for index, request in enumerate(requests):
            assert difference(together[index : index + 1], draw(tiny64, [request], bank)) < 1e-3
        assert difference(together[0], together[4]) < 1e-3
        assert difference(together[0], together[2]) > 0.05

    def test_without_guidance_a_picture_takes_one_row(self, tiny64):
        rows = []
        hook = tiny64.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        try:
            plain = SampleSpec("a teapot", 1, guidance_scale=1.0)
            alone = draw(tiny64, [plain])
            mixed = draw(tiny64, [SampleSpec("a drum", 2), plain])
        finally:
            hook.remove()
        assert rows == [1] * STEPS + [3] * STEPS
        assert difference(mixed[1], alone[0]) < 1e-3

    def test_what_guidance_leads_away_from_is_encoded_once_for_all(self, tiny64):
        prompts = []
        encoder = tiny64.towers[0].encoder
        hook = encoder.register_forward_pre_hook(lambda _, inputs: prompts.append(len(inputs[0])))
        try:
            draw(
                tiny64,
                [SampleSpec("a teapot", 1), SampleSpec("a drum", 2), SampleSpec("a drum", 2, negative_prompt="red")],
            )
        finally:
            hook.remove()
        assert sum(prompts) == 3 + 2

    def test_every_step_is_reported(self, tiny64):
        steps = []
        draw_latents(
            tiny64,
            [SampleSpec("a teapot", 1)],
            on_step=lambda: steps.append(1),
        )
        assert len(steps) == STEPS

    def test_slots_without_a_bank_are_refused(self, tiny64):
        with pytest.raises(ValueError, match="names slots, but there is no bank"):
            draw(tiny64, [SampleSpec("a teapot", 1, slots={0: 1.0}), SampleSpec("a teapot", 1)])

    def test_noise_belongs_to_the_seed(self, tiny64):
        noise = starting_noise(tiny64, [5, 6, 5])
        assert torch.equal(noise[0], noise[2])
        assert not torch.equal(noise[0], noise[1])
        expected = torch.randn((1, 8, 16, 16), generator=torch.Generator().manual_seed(6))
        assert torch.equal(noise[1:2], expected)

    def test_a_negative_prompt_cannot_ask_for_a_token(self, tiny64, adapters):
        request = SampleSpec("a {}", 1, [TOKEN_MARK], [adapters[0].embeddings], negative_prompt="\0")
        with pytest.raises(ObjdriveError, match="holds a NUL character"):
            draw(tiny64, [request])


class TestLayouts:
    """The base lays a picture out with class words, then adapters draw."""

    def ask(self, adapters, noise, *, prompt="a photo of {} on grass", slot=1, steps=8):
        return SampleSpec(
            prompt,
            1,
            [TOKEN_MARK],
            [adapters[slot].embeddings],
            layout=Layout(noise, ["drum"], [{slot: 1.0}]),
            steps=steps,
        )

    def test_the_base_draws_alone_while_noise_is_above_the_level(self, tiny64, bank, adapters):
        base_alone = draw(tiny64, [SampleSpec("a photo of drum on grass", 1, steps=8)])
        assert difference(draw(tiny64, [self.ask(adapters, 0.0)], bank), base_alone) < 1e-3

    def test_the_adapter_draws_below_it(self, tiny64, bank, adapters):
        laid_out = draw(tiny64, [self.ask(adapters, 4.5)], bank)
        whole = SampleSpec("a photo of {} on grass", 1, [TOKEN_MARK], [adapters[1].embeddings], {1: 1.0}, steps=8)
        others = [SampleSpec("a photo of drum on grass", 1, steps=8), whole, self.ask(adapters, 4.5, slot=2)]
        assert all(difference(laid_out, draw(tiny64, [other], bank)) > 0.05 for other in others)

    def test_the_base_takes_the_first_step_in_any_case(self, tiny64, bank, adapters):
        only_step = self.ask(adapters, 1000.0, steps=1)
        assert (
            difference(
                draw(tiny64, [only_step], bank), draw(tiny64, [SampleSpec("a photo of drum on grass", 1, steps=1)])
            )
            < 1e-3
        )

    def test_a_request_does_not_depend_on_its_batch_mates(self, tiny64, bank, adapters):
        two = SampleSpec(
            "a photo of {} and {}",
            2,
            [TOKEN_MARK] * 2,
            [adapters[slot].embeddings for slot in (0, 2)],
            layout=Layout(4.5, ["drum", "rose"], [{0: 1.0}, {2: 0.5}]),
            steps=8,
        )
        requests = [
            self.ask(adapters, 4.5),
            two,
            self.ask(adapters, 3.0, prompt="a photo of {} and a teapot", slot=2),
            SampleSpec("{} under water", 4, [TOKEN_MARK], [adapters[0].embeddings], {0: 1.0}, steps=8),
        ]
        together = draw(tiny64, requests, bank)
        for index, request in enumerate(requests):
            assert difference(together[index : index + 1], draw(tiny64, [request], bank)) < 1e-3

    def test_each_object_is_drawn_by_its_own_adapter_in_its_own_place(self, tiny64, bank, adapters):
        """With the second object's adapter another one, the first object's place stays nearly as it is."""

        def pair(slot):
            return SampleSpec(
                "a photo of {} and {} on grass",
                3,
                [TOKEN_MARK] * 2,
                [adapters[0].embeddings, adapters[slot].embeddings],
                layout=Layout(4.5, ["drum", "rose"], [{0: 1.0}, {slot: 1.0}]),
                steps=8,
            )

        changed = (draw(tiny64, [pair(1)], bank) - draw(tiny64, [pair(2)], bank)).abs().mean(dim=(0, 1))
        halves = sorted(float(half.mean()) for half in (changed[:, :5], changed[:, 11:], changed[:5], changed[11:]))
        assert halves[0] < 0.5 * halves[-1]

    def test_objects_are_sought_where_a_picture_is_drawn_into(self, tiny64, adapters):
        """What is kept is attended to most, by the first object's word."""
        free = np.zeros((64, 64), np.float32)
        free[:, 24:] = 1
        request = SampleSpec(
            "{} and {}",
            1,
            [TOKEN_MARK] * 2,
            [adapters[slot].embeddings for slot in (0, 1)],
            layout=Layout(4.5, ["drum", "rose"], [{0: 1.0}, {1: 1.0}]),
            canvas=Canvas(np.zeros((64, 64, 3), np.uint8), free),
        )
        sample = begin(tiny64, request, NegativePrompts(tiny64))
        first, second = sample.plan.places
        maps = 0.1 + 0.01 * torch.rand(77, 8, 8, generator=torch.Generator().manual_seed(1))
        # In the kept part, then where each stands.
        maps[first, 3:5, 0:2], maps[first, 1:3, 5:7] = 1.0, 0.3
        maps[second, 5:7, 5:7] = 0.5
        sample.settle(maps)
        assert sample.shares[0, 3, 12] > 0.95
        assert sample.shares[1, 12, 12] > 0.95

    def test_without_guidance(self, tiny64, bank, adapters):
        assert draw(tiny64, [replace(self.ask(adapters, 4.5), guidance_scale=1.0)], bank).isfinite().all()

    def test_the_lowest_level_of_several_objects_holds(self):
        slots = [{0: 1.0}, {1: 1.0}, {2: 1.0}]
        names = ["drum", "rose", "key"]
        assert Layout.of([4.5, None, 3.0], names, slots) == Layout(3.0, names, slots)
        assert Layout.of([None, None, None], names, slots) is None


class TestPictures:
    def test_come_in_the_requests_order(self, tiny64, bank, adapters, monkeypatch):
        # Batches of two, which the embedded base's small pictures would never fill.
        monkeypatch.setattr(sampler, "_PIXELS_ON_PROCESSOR", 2 * tiny64.resolution**2)
        token, embedding = [TOKEN_MARK], [adapters[0].embeddings]
        requests = [
            SampleSpec("a photo of {}", 1, token, embedding, slots={2: 1.0}),
            SampleSpec("a photo of {}", 1, token, embedding),
            SampleSpec("a teapot", 2),
            SampleSpec("a photo of {}", 1, token, embedding, slots={0: 1.0}),
            SampleSpec("a teapot", 2, slots={0: 1.0}),
            SampleSpec("a rose", 3),
        ]
        pictures = draw_pictures(tiny64, requests, bank=bank)
        alone = [draw_pictures(tiny64, [request], bank=bank)[0] for request in requests]
        assert [picture.size for picture in pictures] == [(64, 64)] * 6
        distances = [
            [np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() for other in alone]
            for one in pictures
        ]
        for index, row in enumerate(distances):
            assert row[index] <= 1
            assert min(row[:index] + row[index + 1 :]) > 10

    def test_pixels_become_bytes(self):
        pixels = torch.zeros(2, 3, 4, 4)
        pixels[1, 0] = 1
        pixels[1, 1] = 0.5
        pixels[1, 2, 0, 3] = 1 / 255
        first, second = (np.asarray(picture) for picture in to_pictures(pixels))
        assert not first.any()
        assert second[0, 3].tolist() == [255, 128, 1]
        assert second[3, 0].tolist() == [255, 128, 0]
