import asyncio
import threading

import pytest
from random_store import digest_of, metadata_of

from objdrive.errors import StoreError
from serve.errors import ApiError
from serve.objects import FRESH_SECONDS, Objects


class AnyBase:
    fingerprint = "f" * 32


class Store:
    """A store whose answers, failures and slowness are set by the test."""

    def __init__(self):
        self.versions = {"mug-1": 0}
        self.away = False
        self.asked = 0
        self.open = threading.Event()
        self.open.set()

    def look_up(self, object_id):
        self.asked += 1
        assert self.open.wait(30)
        if self.away:
            raise StoreError("away")
        version = self.versions.get(object_id)
        return None if version is None else metadata_of(object_id, AnyBase, version=version)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def world():
    store, clock = Store(), Clock()
    objects = Objects(store, clock=clock, patience=0.5)
    yield store, clock, objects
    store.open.set()
    objects.close()


def digest(objects, object_id="mug-1"):
    return asyncio.run(objects.find(object_id)).digest


def test_asks_again_when_the_answer_is_old(world):
    store, clock, objects = world
    assert digest(objects) == digest_of("mug-1", 0)
    store.versions["mug-1"] = 1
    assert digest(objects) == digest_of("mug-1", 0)
    assert store.asked == 1
    clock.now += FRESH_SECONDS
    assert digest(objects) == digest_of("mug-1", 1)
    store.versions.clear()
    clock.now += FRESH_SECONDS
    with pytest.raises(ApiError) as refused:
        digest(objects)
    assert refused.value.code == "unknown_object"


def test_asks_once_for_all_who_ask_at_once(world):
    store, _, objects = world

    async def many():
        return await asyncio.gather(*(objects.find("mug-1") for _ in range(50)))

    assert len(asyncio.run(many())) == 50
    assert store.asked == 1


@pytest.mark.parametrize("object_id", ["", "..", "a/b", "-a", "a" * 129, "ä", "a\n"])
def test_asks_nothing_about_what_is_no_id(world, object_id):
    store, _, objects = world
    with pytest.raises(ApiError) as refused:
        digest(objects, object_id)
    assert refused.value.status == 404
    assert store.asked == 0


def test_objects_in_use_outlast_an_outage_and_others_wait_for_its_end(world):
    store, clock, objects = world
    digest(objects)
    store.away = True
    clock.now += 60
    assert digest(objects) == digest_of("mug-1", 0)
    with pytest.raises(ApiError) as refused:
        digest(objects, "mug-2")
    assert refused.value.code == "store_unreachable"
    clock.now += 600
    with pytest.raises(ApiError):
        digest(objects)
    store.away, store.versions["mug-1"] = False, 1
    assert digest(objects) == digest_of("mug-1", 1)


def test_a_store_that_hangs_is_not_waited_for(world):
    store, clock, objects = world
    digest(objects)
    store.open.clear()
    clock.now += FRESH_SECONDS
    assert digest(objects) == digest_of("mug-1", 0)
    with pytest.raises(ApiError) as refused:
        digest(objects, "mug-2")
    assert refused.value.code == "store_unreachable"


def test_what_is_remembered_is_bounded_by_its_bytes(world):
    store, clock, _ = world
    store.versions |= {f"mug-{number}": 0 for number in range(50)}
    size = len(metadata_of("mug-10", AnyBase).model_dump_json())
    objects = Objects(store, clock=clock, remembered_bytes=10 * (size + 600))

    async def look(*numbers):
        for number in numbers:
            await objects.find(f"mug-{number}")

    asyncio.run(look(*range(50)))
    asked = store.asked
    asyncio.run(look(*range(49, 39, -1)))
    assert store.asked == asked
    asyncio.run(look(20))
    assert store.asked == asked + 1
    assert objects._bytes <= objects.remembered_bytes
    objects.close()


def test_many_objects_are_asked_for_at_once(world):
    store, clock, _ = world
    objects = Objects(store, clock=clock, patience=30)
    store.versions |= {f"mug-{number}": 0 for number in range(64)}
    store.open.clear()

    async def many():
        finding = asyncio.gather(*(objects.find(f"mug-{number}") for number in range(64)))
        while store.asked < 64:
            await asyncio.sleep(0.01)
        store.open.set()
        return await finding

    assert len(asyncio.run(many())) == 64
    objects.close()
