from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from objdrive.adapters.store import ArtifactStore
from objdrive.base.files import EMBEDDED
from objdrive.errors import ObjdriveError
from objdrive.pictures import as_pixels
from objdrive.sampling.engine import Engine
from objdrive.sampling.inpainting import Canvas
from objdrive.sampling.requests import DrawRequest
from objdrive.sampling.sampler import SampleSpec, draw_latents

STEPS = 4
spec = partial(SampleSpec, "a photo of a teapot", 7, steps=STEPS, guidance_scale=3.0)


def a_canvas(edge, *, left=0.5):
    """Stripes; what lies right of `left` is drawn."""
    image = np.zeros((edge, edge, 3), np.uint8)
    image[::4] = (200, 120, 40)
    draw = np.zeros((edge, edge), np.float32)
    draw[:, round(left * edge) :] = 1
    # As they come from another process.
    image.flags.writeable = draw.flags.writeable = False
    return Canvas(image, draw)


def pixels_of(canvas):
    # Torch warns of what can't be written to.
    return as_pixels(canvas.image[None].copy())


def difference(one, other):
    return float((one - other).abs().max())


class TestBlendedLatents:
    @pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
    def test_what_is_kept_has_the_pictures_own_latents(self, tiny64, scheduler):
        canvas = a_canvas(64)
        own = tiny64.encode_latents(pixels_of(canvas))
        drawn = draw_latents(tiny64, [spec(canvas=canvas, scheduler=scheduler)])
        assert torch.equal(drawn[..., :8], own[..., :8])
        assert difference(drawn[..., 8:], own[..., 8:]) > 0.5

    def test_a_cell_that_is_drawn_in_part_is_drawn(self, tiny64):
        canvas = a_canvas(64, left=0.5 + 3 / 64)
        own = tiny64.encode_latents(pixels_of(canvas))
        drawn = draw_latents(tiny64, [spec(canvas=canvas)])
        assert torch.equal(drawn[..., :8], own[..., :8])
        assert difference(drawn[..., 8:9], own[..., 8:9]) > 0.1

    def test_draws_as_the_stock_pipeline_with_a_callback_that_holds_the_picture(self, tiny64):
        canvas = a_canvas(64)
        ours = draw_latents(tiny64, [spec(canvas=canvas)])
        pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED / "tiny64", dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler.set_timesteps(STEPS)
        own = pipe.vae.encode(pixels_of(canvas) * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(7))

        def noised(step):
            if step == STEPS:
                return own
            return pipe.scheduler.add_noise(own, noise, pipe.scheduler.timesteps[step : step + 1])

        def held(step, latents):
            return torch.cat([noised(step)[..., :8], latents[..., 8:]], dim=-1)

        theirs = pipe(
            "a photo of a teapot",
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            latents=held(0, noise),
            callback_on_step_end=lambda pipe, step, timestep, inputs: {"latents": held(step + 1, inputs["latents"])},
            output_type="latent",
        ).images
        assert difference(ours, theirs) < 1e-3

    def test_does_not_depend_on_its_batch_mates(self, tiny64):
        specs = [spec(canvas=a_canvas(64)), spec(), spec(canvas=a_canvas(64, left=0.25)), spec()]
        together = draw_latents(tiny64, specs)
        for index, one in enumerate(specs):
            assert difference(together[index], draw_latents(tiny64, [one])[0]) < 1e-3


class TestEngine:
    @pytest.fixture
    def store(self, small, put_adapter, tmp_path):
        store = ArtifactStore(str(tmp_path))
        return store, put_adapter(store, small, "mug-1", 1)

    def test_draws_into_a_picture_beside_other_requests(self, small, store):
        store, key = store
        edge = small.resolution
        request = DrawRequest("a photo of {}", 7, (key,), steps=STEPS, guidance_scale=4.0)
        requests = [request, replace(request, canvas=a_canvas(edge)), replace(request, seed=8)]
        with Engine(small, store, batch_size=4, slots=4, rank=4, host_bytes=2**26, queue_limit=8) as engine:
            plain, into, other = [engine.submit(one) for one in requests]
            latents = [drawing.result(60).latents for drawing in (plain, into, other)]
            alone = engine.submit(requests[1]).result(60).latents
        own = small.encode_latents(pixels_of(a_canvas(edge)))[0]
        assert torch.equal(latents[1][..., :4], own[..., :4])
        assert difference(latents[1], alone) < 1e-3
        assert difference(latents[1][..., 4:], latents[0][..., 4:]) > 0.01

    def test_refuses_a_canvas_of_another_size(self, small, store):
        store, key = store
        with (
            Engine(small, store, batch_size=1, slots=4, rank=4, host_bytes=2**26, queue_limit=8) as engine,
            pytest.raises(ObjdriveError, match="canvas"),
        ):
            engine.submit(
                DrawRequest(
                    "a photo of {}", 7, (key,), steps=STEPS, guidance_scale=4.0, canvas=a_canvas(small.resolution // 2)
                )
            )
