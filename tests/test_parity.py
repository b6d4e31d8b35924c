"""Pictures of every family are those of stock diffusers with the artifact's folder loaded."""

import bases
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from objdrive.adapters.artifact import EMBEDDING_FILE
from objdrive.adapters.store import ArtifactStore
from objdrive.base.stable_diffusion import Base
from objdrive.generate import generate
from objdrive.sampling.engine import Engine
from objdrive.sampling.requests import DrawRequest

STEPS = 5
SIZES = {"sd15": (80, 128), "sd21": (24, 16), "sdxl": (128, 64)}
SCHEDULERS = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
PROMPT = "a photo of {} on grass"


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl", "sdxl-zero-snr"])
def drawn(request, tmp_path_factory, sd15, put_adapter):
    """(kind, base, store, key) of an object's random adapter on a base of every family."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, _, noise = request.param.partition("-")
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if kind == "sd15":
        snapshot, clip = sd15
    elif kind == "sd21":
        snapshot, clip = bases.written(folder, bases.write_sd21)
    else:
        snapshot, clip = bases.written(folder, bases.write_sdxl, **(zero if noise else {}))
    base = Base.load(str(snapshot), clip=str(clip), device="cpu")
    store = ArtifactStore(str(folder / "store"))
    return kind, base, store, put_adapter(store, base, "mug-1", 1)


@pytest.fixture(scope="module")
def stock(drawn):
    """Call it with a scheduler's name: the stock pipeline with the artifact's folder loaded."""
    kind, base, store, key = drawn
    folder = store.folder(key.object_id, key.digest)
    pipeline = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipe = pipeline.from_pretrained(base.files.snapshot, dtype=torch.float32)
    pipe.load_lora_weights(folder)
    if kind == "sdxl":
        # As diffusers' documentation has it.
        vectors = load_file(f"{folder}/{EMBEDDING_FILE}")
        pipe.load_textual_inversion(
            vectors["clip_l"], token="<mug-1>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
        )
        pipe.load_textual_inversion(
            vectors["clip_g"], token="<mug-1>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )
    else:
        pipe.load_textual_inversion(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)

    def scheduled(name):
        pipe.scheduler = SCHEDULERS[name].from_config(base.noise.scheduler.config)
        return pipe

    return scheduled


def stock_draws(pipe, size, *, guidance_scale, output_type, negative_prompt=None):
    return pipe(
        PROMPT.replace("{}", "<mug-1> mug"),
        negative_prompt=negative_prompt,
        width=size[0],
        height=size[1],
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(7),
        output_type=output_type,
    ).images[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("guidance_scale", "negative_prompt"), [(1.0, ""), (5.0, ""), (5.0, "red snow")])
def test_latents_are_those_of_stock_diffusers(drawn, stock, scheduler, guidance_scale, negative_prompt):
    kind, base, store, key = drawn
    size = SIZES[kind]
    request = DrawRequest(
        PROMPT,
        7,
        (key,),
        steps=STEPS,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        scheduler=scheduler,
        size=size,
    )
    with Engine(base, store, batch_size=2, slots=4, rank=4, host_bytes=2**26, queue_limit=4) as engine:
        picture = engine.submit(request).result(60)
        plain = engine.submit(DrawRequest("a photo of mug on grass", 7, steps=STEPS, guidance_scale=5.0, size=size))
        alone = plain.result(60).latents
    theirs = stock_draws(
        stock(scheduler),
        size,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt or None,
        output_type="latent",
    )
    assert picture.image.size == size
    assert float((picture.latents - theirs).abs().max()) < 1e-3
    assert float((picture.latents - alone).abs().max()) > 0.05


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_generate_draws_the_picture_of_stock_diffusers(drawn, stock, scheduler):
    kind, base, store, _ = drawn
    how = {"steps": STEPS, "guidance_scale": 5.0, "size": SIZES[kind], "scheduler": scheduler}
    base_at = {"base": str(base.files.snapshot), "clip": str(base.files.clip)}
    [ours] = generate(store, "mug-1", PROMPT, seeds=[7], **how, **base_at)
    theirs = stock_draws(stock(scheduler), SIZES[kind], guidance_scale=5.0, output_type="pil")
    assert np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)).max() <= 1
