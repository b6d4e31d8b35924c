import asyncio
import threading

import pytest
from random_store import RANK

from objdrive.base.stable_diffusion import Base
from objdrive.errors import ObjdriveError, QueueFull
from objdrive.sampling.engine import Engine
from objdrive.sampling.requests import DrawRequest
from serve.health import HealthCheck


@pytest.fixture
def engine(small_base, filled):
    with Engine(small_base, filled, batch_size=1, slots=4, rank=RANK, host_bytes=2**20, queue_limit=1) as engine:
        yield engine


def steps(engine):
    return engine.stats().step_seconds.count


def test_an_engine_at_rest_draws(engine):
    asyncio.run(HealthCheck(engine).check())
    assert steps(engine) == 1


def test_an_engine_at_work_is_left_to_it(engine):
    health = HealthCheck(engine)
    engine.submit(DrawRequest(prompt="a mug", seed=0, steps=2, guidance_scale=1.0)).result(60)
    asyncio.run(health.check())
    assert steps(engine) == 2
    asyncio.run(health.check())
    assert steps(engine) == 3


def test_an_engine_that_is_stuck_is_found_out(engine, monkeypatch):
    stuck = threading.Event()
    predict = Base.predict
    monkeypatch.setattr(Base, "predict", lambda *arguments: stuck.wait(60) and predict(*arguments))
    try:
        with pytest.raises(ObjdriveError, match="draws nothing"):
            asyncio.run(HealthCheck(engine, seconds=0.2).check())
    finally:
        stuck.set()


def test_an_engine_that_drains_is_well(engine):
    engine.drain()
    asyncio.run(HealthCheck(engine).check())


def test_an_engine_is_well_however_many_wait(engine, monkeypatch):
    drawing = [engine.submit(DrawRequest(prompt="a mug", seed=0, steps=20, guidance_scale=4.0))]
    while engine.stats().waiting:
        pass
    drawing.append(engine.submit(DrawRequest(prompt="a mug", seed=1, steps=1, guidance_scale=4.0)))
    with pytest.raises(QueueFull):
        engine.submit(DrawRequest(prompt="a mug", seed=2, steps=1, guidance_scale=4.0))
    health = HealthCheck(engine, seconds=600)
    # As if it had not taken a step since the last check.
    monkeypatch.setattr(health, "_has_moved", lambda: False)
    asyncio.run(health.check())
    for one in drawing:
        one.cancel()
