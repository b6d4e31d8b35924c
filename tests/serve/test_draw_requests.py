import asyncio
from types import SimpleNamespace

from objdrive.base.sizes import Sizes
from serve.draw_requests import draw_requests
from serve.drawing import LocalGenerators
from serve.schema import GenerationRequest


def test_the_base_alone_draws_with_what_suits_it():
    tuning = {"sample_steps": 11, "guidance_scale": 2.5}
    base = SimpleNamespace(name="tiny", fingerprint="f" * 32, sizes=Sizes(64, 8), files=SimpleNamespace(tuning=tuning))
    told = asyncio.run(LocalGenerators(base, None).describe())
    [draw] = draw_requests(GenerationRequest(prompt="a mug"), [], told)
    assert (draw.steps, draw.guidance_scale) == (11, 2.5)
    [draw] = draw_requests(GenerationRequest(prompt="a mug", steps=3, guidance_scale=1.5), [], told)
    assert (draw.steps, draw.guidance_scale) == (3, 1.5)
