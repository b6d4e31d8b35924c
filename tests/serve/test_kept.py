"""Drawings that outlast the patience of a proxy."""

import asyncio
import threading
import time

import httpx2
import numpy as np
import pytest
from answers import error, png
from conftest import serving
from PIL import Image

from objdrive.sampling.edits import Edit
from objdrive.sampling.exact import CutOut
from objdrive.sampling.requests import DrawRequest
from serve.drawing import FinishedPicture
from serve.finishing import Finish
from serve.kept import KEPT_SECONDS, Kept, name_of


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Drawings:
    """A drawing that ends when it is told to."""

    def __init__(self):
        self.begun = self.cancelled = 0
        self.finish = asyncio.Event()

    async def draw(self, size=1):
        self.begun += 1
        try:
            await self.finish.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return [FinishedPicture(b"x" * size, "")]


def run(test):
    async def running():
        clock, drawings = Clock(), Drawings()
        await test(Kept(proxy_seconds=55, clock=clock), clock, drawings)

    asyncio.run(running())


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


class TestKept:
    def test_a_second_request_waits_for_the_drawing_of_the_first(self):
        async def test(kept, clock, drawings):
            work = kept.begin("a", drawings.draw())
            first = asyncio.ensure_future(kept.wait(work))
            await settled()
            clock.now = 100
            first.cancel()
            await settled()
            assert kept.find("a") is work
            second = asyncio.ensure_future(kept.wait(kept.find("a")))
            drawings.finish.set()
            assert [one.data for one in await second] == [b"x"]
            assert (drawings.begun, drawings.cancelled) == (1, 0)

        run(test)

    def test_it_is_kept_for_ten_minutes(self):
        async def test(kept, clock, drawings):
            work = kept.begin("a", drawings.draw())
            await settled()
            clock.now = 60
            drawings.finish.set()
            await settled()
            clock.now += KEPT_SECONDS - 1
            assert await kept.wait(kept.find("a")) is work.task.result()
            clock.now += 2
            assert kept.find("a") is None

        run(test)

    def test_a_client_that_leaves_early_ends_its_drawing(self):
        async def test(kept, clock, drawings):
            first = asyncio.ensure_future(kept.wait(kept.begin("a", drawings.draw())))
            await settled()
            clock.now = 5
            first.cancel()
            await settled()
            assert drawings.cancelled == 1
            assert kept.find("a") is None

        run(test)

    def test_one_that_is_soon_done_is_not_kept(self):
        async def test(kept, clock, drawings):
            work = kept.begin("a", drawings.draw())
            drawings.finish.set()
            await kept.wait(work)
            await settled()
            clock.now = 100
            assert kept.find("a") is None

        run(test)

    def test_memory_is_bounded(self):
        async def test(kept, clock, drawings):
            for name in "abc":
                kept.begin(name, drawings.draw(30 * 2**20))
            await settled()
            clock.now = 100
            drawings.finish.set()
            await settled()
            assert [kept.find(name) is not None for name in "abc"] == [False, True, True]

        run(test)

    def test_one_that_failed_is_not(self):
        async def test(kept, clock, drawings):
            async def fail():
                await drawings.finish.wait()
                raise ValueError("lost")

            work = kept.begin("a", fail())
            await settled()
            clock.now = 100
            drawings.finish.set()
            with pytest.raises(ValueError, match="lost"):
                await kept.wait(work)
            await settled()
            assert kept.find("a") is None

        run(test)


def test_a_name_tells_requests_with_other_pictures_apart():
    draw = DrawRequest("{}", 1, steps=2, guidance_scale=4.0)
    cut_out = CutOut(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.float32))
    picture, place = Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255)
    names = {
        name_of([draw], Finish()),
        name_of([DrawRequest("{}", 2, steps=2, guidance_scale=4.0)], Finish()),
        name_of([draw, DrawRequest("{}", 2, steps=2, guidance_scale=4.0)], Finish()),
        name_of([draw], Finish("webp")),
        name_of([draw], Finish("webp", 50)),
        name_of([draw], Finish(given="another photo")),
        name_of([draw], Finish(exact=True, cut_out=cut_out)),
        name_of([draw], Finish(given="another photo", edit=Edit(picture, place))),
        name_of([draw], Finish(exact=True, given="another photo", edit=Edit(picture, place, cut_out))),
    }
    # Of an edit without a cut-out the photo tells all.
    assert len(names) == 8
    # Whether its photo has been read or not.
    assert name_of([draw], Finish(exact=True)) in names
    assert name_of([DrawRequest("{}", 1, steps=2, guidance_scale=4.0)], Finish()) == name_of([draw], Finish())


def test_a_request_that_a_proxy_gave_up_gets_its_picture_without_another_drawing(small_base, filled, tmp_path):
    with (
        serving(small_base, filled, tmp_path, keys=[("shop", {"burst": 1})], kept=Kept(proxy_seconds=0.3)) as server,
        server.client("shop") as client,
    ):
        engine = server.services.generators._engine
        # The first step ends when the proxy has gone.
        gone = threading.Event()
        fault = engine._base.unet.register_forward_pre_hook(lambda *_: gone.wait(60) and None)
        asked = {"model": "acme-mug-1", "prompt": "{}", "seed": 5}
        with pytest.raises(httpx2.ReadTimeout):
            client.post("/v1/images/generations", json=asked, timeout=1)
        deadline = time.monotonic() + 60
        gone.set()
        while engine.stats().requests.get("drawn") != 1:
            assert time.monotonic() < deadline, engine.stats().requests
            time.sleep(0.02)
        answer = client.post("/v1/images/generations", json=asked)
        assert png(answer)
        assert engine.stats().requests == {"drawn": 1}
        # It was spent once; nothing is left for another picture.
        assert error(server.draw(client, **asked | {"seed": 6}), 429) == "rate_limit_exceeded"
        fault.remove()
