"""No request ever gets another object's adapter, whatever happens around it."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from under_fire import STYLES, VERSIONS, Catalog, draw_alone, least_difference

from objdrive.adapters.store import ArtifactStore
from objdrive.errors import Cancelled
from objdrive.sampling.engine import Engine
from objdrive.sampling.requests import DrawRequest

pytestmark = pytest.mark.cluster

OBJECTS, SLOTS, CLIENTS = 40, 6, 16
REQUESTS = 2 * 32 * CLIENTS
CANCELLED_SHARE = 0.05
RETRAINED_EVERY = 25
RANK = 4
MEBIBYTE = 2**20


def some_request(catalog, dice):
    objects = tuple(catalog.current(number) for number in catalog.some(dice))
    return DrawRequest(" and ".join(["{}"] * len(objects)), 1, objects, **dice.choice(STYLES))


class Client:
    """Draws one picture after the other; now and then it hangs up, or an object is retrained."""

    def __init__(self, engine, catalog, number):
        self._engine, self._catalog, self._dice = engine, catalog, random.Random(number)
        self.pictures = []
        self.outcomes = Counter()

    def draw(self, count):
        for _ in range(count):
            request = some_request(self._catalog, self._dice)
            if self._dice.random() < 1 / RETRAINED_EVERY:
                self._catalog.retrain(self._dice.randrange(OBJECTS))
            drawing = self._engine.submit(request)
            if self._dice.random() < CANCELLED_SHARE:
                drawing.cancel()
            try:
                self.pictures.append((request, drawing.result(120)))
                self.outcomes["drawn"] += 1
            except Cancelled:
                self.outcomes["cancelled"] += 1


def under_fire(engine, catalog):
    """All requests by all clients, in two halves: the clients, and the process's size after each half."""
    clients = [Client(engine, catalog, number) for number in range(CLIENTS)]
    sizes = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(2):
            for half in [pool.submit(client.draw, REQUESTS // 2 // CLIENTS) for client in clients]:
                half.result()
            sizes.append(psutil.Process().memory_info().rss)
    return clients, sizes


def test_every_picture_is_the_one_drawn_alone(small, random_adapter, put_adapter, tmp_path):
    store = ArtifactStore(str(tmp_path))

    def commit(number, version):
        seed, rank = number * VERSIONS + version, 1 + number % RANK
        return put_adapter(store, small, f"object-{number:02}", seed, rank=rank)

    catalog = Catalog(store, OBJECTS, commit)
    largest = random_adapter(small, 0, RANK)
    host_bytes = 10 * sum(tensor.nbytes for tensor in largest.lora.values())
    settings = {"rank": RANK, "host_bytes": host_bytes, "queue_limit": CLIENTS}
    with Engine(small, store, batch_size=8, slots=SLOTS, **settings) as engine:
        clients, (half, whole) = under_fire(engine, catalog)
        stats = engine.stats()
    outcomes = sum((client.outcomes for client in clients), Counter())
    assert outcomes == stats.requests
    assert outcomes.total() == REQUESTS
    assert outcomes["cancelled"] > REQUESTS * CANCELLED_SHARE / 2
    assert catalog.retrainings > REQUESTS / RETRAINED_EVERY / 2
    assert min(stats.hits[tier] for tier in ("bank", "host", "store")) > SLOTS
    assert stats.swap_seconds.count > 10 * SLOTS
    assert stats.resident <= SLOTS
    assert stats.hosted_bytes <= host_bytes
    assert whole - half < 50 * MEBIBYTE
    pictures = [pair for client in clients for pair in client.pictures]
    assert_drawn_as_alone(pictures, small, store)


def assert_drawn_as_alone(pictures, base, store):
    expected = {request: draw_alone(base, store, request) for request, _ in pictures}
    for request, picture in pictures:
        assert picture.objects == request.objects
        assert float((picture.latents - expected[request]).abs().max()) < 1e-3, request
    # Were two of them alike, equality would prove nothing.
    assert least_difference(expected) > 1e-2
