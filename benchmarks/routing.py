"""Who draws what: a catalog's long tail against simulated generators, by the real router and the real residency.

Usage: ``python benchmarks/routing.py`` (``--smoke`` tries it out in seconds). Requests come at random moments, for the
k-th object with weight 1 / k, to ingress replicas that each have a router of their own (`serve.router.WarmRouter` in
Ray Serve's machinery). A generator holds adapters by `objdrive.sampling.residency.Residency` and draws as many at once
as its batch has places; drawing and loading only take time, which is simulated. Prints, for the last third of that
time, in which tier adapters were found, how many requests were drawn away from an object's homes and how long requests
waited; and how long the router took to choose, in real time, per request.
"""

import argparse
import asyncio
import heapq
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from objdrive.adapters.adapter import Adapter, adapter_files
from objdrive.adapters.artifact import EMBEDDING_FILE, ArtifactKey
from objdrive.base.family import STABLE_DIFFUSION
from objdrive.sampling.residency import Reservation, Residency
from serve.placement import ranked
from serve.router import WarmRouter

TIERS = ("bank", "host", "store")
_TOKEN = "<object>"
_DIGEST = "0" * 32
_WIDTH = 64
_LOADERS = 4
_BIN_SECONDS = 10


@dataclass(frozen=True)
class Load:
    """What comes, and what there is to meet it.

    `draw` is seconds a picture in a full batch, `load` seconds an adapter from the store.
    """

    seconds: float
    per_second: float
    objects: int
    generators: int
    routers: int
    batch: int
    slots: int
    hosted: int
    queue_limit: int
    draw: float
    load: float


class Clock:
    """Simulated time, in seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class OneAdapterStore:
    """Every object's adapter, at once."""

    def __init__(self) -> None:
        adapter = Adapter({}, {STABLE_DIFFUSION.text_encoders[0]: torch.zeros(_WIDTH)})
        self._files = adapter_files(adapter, token=_TOKEN, family=STABLE_DIFFUSION)

    def read(self, object_id: str, digest: str, *, only: Any) -> tuple[Any, dict[str, bytes]]:
        base = SimpleNamespace(id="none", fingerprint="")
        return SimpleNamespace(
            layout_noise=None,
            least_rank=None,
            object_id=object_id,
            base=base,
            token=_TOKEN,
            phrase=_TOKEN,
            class_name="teapot",
            files={EMBEDDING_FILE: None},
        ), self._files


@dataclass(eq=False)
class Request:
    """On its way: when it came, who drew it, when that began, and where its adapter was found."""

    rank: int
    came: float
    router: "WarmRouter"
    reservation: Reservation
    generator: int = -1
    ready: float = 0.0
    began: float = 0.0
    tier: str = ""
    spilled: bool = False


@dataclass(eq=False)
class Generator:
    """A replica's engine: a residency, a queue, and places in a batch."""

    load: Load
    residency: Residency
    waiting: deque[Request] = field(default_factory=deque)
    running: int = 0
    loading: dict[ArtifactKey, float] = field(default_factory=dict)
    loaders: list[float] = field(default_factory=lambda: [0.0] * _LOADERS)

    @property
    def requests(self) -> int:
        return len(self.waiting) + self.running

    def take(self, request: Request, now: float) -> None:
        """Queue a request, and begin to load its adapter."""
        self.waiting.append(request)
        self._prepare(request, now)

    def begin(self, now: float) -> list[Request]:
        """Give free places to those whose adapters are there, in order; those that began."""
        begun = []
        for request in list(self.waiting):
            if self.running == self.load.batch:
                break
            if not self._prepare(request, now) or request.ready > now:
                continue
            before = self.residency.hits
            if self.residency.lease(request.reservation) is None:
                continue
            after = self.residency.hits
            found = next(tier for tier in TIERS if after.get(tier, 0) > before.get(tier, 0))
            request.tier = "store" if request.tier else found
            request.began = now
            self.waiting.remove(request)
            self.running += 1
            begun.append(request)
        return begun

    def end(self, request: Request) -> None:
        self.residency.release(request.reservation)
        self.running -= 1

    def _prepare(self, request: Request, now: float) -> bool:
        if request.reservation.pinned:
            return True
        if not self.residency.prepare(request.reservation):
            return False
        [key] = request.reservation.keys
        for load in request.reservation.loads.values():
            load.result()
            free = heapq.heappop(self.loaders)
            self.loading[key] = max(free, now) + self.load.load
            heapq.heappush(self.loaders, self.loading[key])
        # Loaded really, but not yet by simulated time.
        request.ready = self.loading.get(key, 0.0)
        if request.ready > now:
            request.tier = "store"
        else:
            self.loading.pop(key, None)
        return True


class Replica:
    """What a router knows of a generator."""

    def __init__(self, number: int, generator: Generator) -> None:
        self.replica_id = ReplicaID(f"generator-{number:02}", DeploymentID("Generator", "objdrive"))
        self.max_ongoing_requests = generator.load.queue_limit + generator.load.batch
        self.number = number
        self._generator = generator

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self._generator.requests


class Simulation:
    """Arrivals, ends of loads and ends of drawings, in the order of simulated time."""

    def __init__(self, load: Load, seed: int) -> None:
        self.load = load
        self._clock = Clock()
        self._loop = asyncio.new_event_loop()
        self._dice = np.random.default_rng(seed)
        self._generators = [Generator(load, _residency(load)) for _ in range(load.generators)]
        self._replicas = [Replica(number, generator) for number, generator in enumerate(self._generators)]
        self._routers = [self._loop.run_until_complete(self._router()) for _ in range(load.routers)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.done: list[Request] = []
        self.choosing: list[float] = []
        self.refused = 0

    def run(self) -> None:
        """All requests to their ends."""
        count = self._dice.poisson(self.load.seconds * self.load.per_second)
        weights = 1 / np.arange(1, self.load.objects + 1)
        ranks = self._dice.choice(self.load.objects, size=count, p=weights / weights.sum())
        for came, rank in zip(np.sort(self._dice.uniform(0, self.load.seconds, count)), ranks, strict=True):
            self._until(came)
            self._arrive(int(rank))
        self._until(float("inf"))
        for generator in self._generators:
            generator.residency.close()

    async def _router(self) -> WarmRouter:
        router = WarmRouter(
            DeploymentID("Generator", "objdrive"),
            DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            get_curr_time_s=self._clock,
        )
        router.initialize_state(spill_at=2 * self.load.batch, full_at=self.load.queue_limit + self.load.batch)
        router.update_replicas(self._replicas)
        # Serve asks new replicas for their queues in a task.
        await asyncio.sleep(0.01)
        return router

    def _at(self, moment: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._order), event))

    def _until(self, moment: float) -> None:
        while self._events and self._events[0][0] <= moment:
            self._clock.now, _, event = heapq.heappop(self._events)
            event()
        self._clock.now = moment

    def _arrive(self, rank: int) -> None:
        if all(replica.max_ongoing_requests <= self._generators[replica.number].requests for replica in self._replicas):
            self.refused += 1
            return
        router = self._routers[int(self._dice.integers(len(self._routers)))]
        key = ArtifactKey(f"object-{rank:06}", _DIGEST)
        request = Request(rank, self._clock.now, router, Reservation([key]))
        replica = self._choose(router, str(key))
        request.generator = replica.number
        homes = ranked(
            str(key), {one.replica_id.unique_id: 0 for one in self._replicas}, choices=2, spill_at=1, full_at=1
        )[:2]
        request.spilled = [replica.replica_id.unique_id] not in homes
        generator = self._generators[replica.number]
        generator.take(request, self._clock.now)
        router.on_send_request(replica.replica_id)
        router.on_new_queue_len_info(replica.replica_id, generator.requests)
        if request.ready > self._clock.now:
            self._at(request.ready, lambda: self._begin(generator))
        self._begin(generator)

    def _choose(self, router: WarmRouter, key: str) -> Replica:
        """The replica, by Serve's own machinery, asked again as Serve does when one turns out to be full."""
        while True:
            number = str(next(self._order))
            metadata = RequestMetadata(request_id=number, internal_request_id=number, multiplexed_model_id=key)

            async def choose(metadata: RequestMetadata = metadata) -> Any:
                return await router._choose_replica_for_request(PendingRequest([], {}, metadata))

            started = time.perf_counter()
            replica: Replica = self._loop.run_until_complete(choose())
            self.choosing.append(time.perf_counter() - started)
            generator = self._generators[replica.number]
            if generator.requests < replica.max_ongoing_requests:
                return replica
            router.on_new_queue_len_info(replica.replica_id, generator.requests)

    def _begin(self, generator: Generator) -> None:
        for request in generator.begin(self._clock.now):
            self._at(self._clock.now + self.load.draw, lambda request=request: self._end(request))

    def _end(self, request: Request) -> None:
        generator = self._generators[request.generator]
        generator.end(request)
        request.router.decrement_queue_len_cache(self._replicas[request.generator].replica_id)
        self.done.append(request)
        self._begin(generator)


def _residency(load: Load) -> Residency:
    base: Any = SimpleNamespace(
        name="none",
        fingerprint="",
        family=STABLE_DIFFUSION,
        vocabularies={STABLE_DIFFUSION.text_encoders[0]: torch.zeros(1, _WIDTH)},
        device="cpu",
    )
    bank: Any = SimpleNamespace(
        slots=load.slots, rank=0, check=lambda lora: None, load=lambda slot, lora, least_rank: None
    )
    store: Any = OneAdapterStore()
    host_bytes = load.hosted * _WIDTH * torch.zeros(1).element_size()
    return Residency(base, store, bank, host_bytes=host_bytes, loaders=_LOADERS)


def report(simulation: Simulation) -> None:
    """Tables of the last third."""
    load = simulation.load
    late = [one for one in simulation.done if one.came >= load.seconds * 2 / 3]
    waits = np.array([one.began - one.came for one in late])
    tiers = Counter(one.tier for one in late)
    busy = len(late) * load.draw / (load.generators * load.batch * load.seconds / 3)
    print(f"{len(simulation.done):,} requests, {simulation.refused} refused; places in use: {busy:.0%}")
    print("found in:   " + ", ".join(f"{tier} {tiers[tier] / len(late):.1%}" for tier in TIERS))
    print(f"spilled:    {np.mean([one.spilled for one in late]):.1%} of the requests")
    print(f"waited:     p50 {_ms(waits, 50)}, p95 {_ms(waits, 95)}, p99 {_ms(waits, 99)} ms")
    drawn = Counter(one.generator for one in late)
    print(f"generators: the busiest drew {max(drawn.values()) / np.mean(list(drawn.values())):.2f} of the mean")
    print("rank of the object   requests   generators   spilled   wait p50 ms   p99 ms")
    for first, last in ((0, 1), (1, 10), (10, 100), (100, 1000), (1000, 10_000), (10_000, load.objects)):
        some = [one for one in late if first <= one.rank < last]
        if not some:
            continue
        places = len({(one.rank, one.generator) for one in some}) / len({one.rank for one in some})
        spilled = np.mean([one.spilled for one in some])
        waited = np.array([one.began - one.came for one in some])
        name = f"{first + 1:,} to {last:,}"
        halves = f"{_ms(waited, 50):>11}   {_ms(waited, 99):>6}"
        print(f"{name:18}   {len(some):8,}   {places:10.1f}   {spilled:7.1%}   {halves}")
    choosing = np.array(simulation.choosing)
    print(
        f"router:     p50 {np.percentile(choosing, 50) * 1000:.2f}, p99 {np.percentile(choosing, 99) * 1000:.2f} ms "
        f"to choose; {1 / choosing.mean():,.0f} a second at most"
    )


def plot(simulation: Simulation, path: Path) -> None:
    """The tiers over time, and the waits by rank."""
    load = simulation.load
    figure, (shares, waits) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    bins: dict[int, Counter[str]] = {}
    for one in simulation.done:
        bins.setdefault(int(one.came // _BIN_SECONDS), Counter())[one.tier] += 1
    moments = sorted(bins)
    for tier in TIERS:
        found = [bins[moment][tier] / bins[moment].total() for moment in moments]
        shares.plot([moment * _BIN_SECONDS for moment in moments], found, label=tier)
    shares.set(xlabel="seconds since a cold start", ylabel="share of requests", ylim=(0, 1), title="adapter found in")
    late = [one for one in simulation.done if one.came >= load.seconds * 2 / 3]
    edges = np.unique(np.geomspace(1, load.objects + 1, 16).astype(int))
    ranks = np.array([one.rank + 1 for one in late])
    waited = np.array([one.began - one.came for one in late])
    places = np.digitize(ranks, edges)
    shown = [place for place in range(1, len(edges)) if (places == place).any()]
    for name, share in (("p50", 50), ("p99", 99)):
        values = [1000 * np.percentile(waited[places == place], share) for place in shown]
        waits.plot([edges[place - 1] for place in shown], values, marker=".", label=name)
    waits.set(xlabel="rank of the object", ylabel="milliseconds", xscale="log", title="wait before drawing")
    for axes in (shares, waits):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _ms(seconds: Any, share: float) -> str:
    return f"{1000 * np.percentile(seconds, share):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="simulated (%(default)s)")
    parser.add_argument("--per-second", type=float, default=1000, help="requests (%(default)s)")
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--generators", type=int, default=50)
    parser.add_argument("--routers", type=int, default=4, help="ingress replicas (%(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--hosted", type=int, default=450, help="adapters in a generator's host memory (%(default)s)")
    parser.add_argument("--queue-limit", type=int, default=64)
    parser.add_argument("--draw", type=float, default=0.28, help="seconds a picture in a full batch (%(default)s)")
    parser.add_argument("--load", type=float, default=0.1, help="seconds an adapter from the store (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="WEBP")
    parser.add_argument("--smoke", action="store_true", help="few objects and seconds: tries it all out")
    arguments = parser.parse_args()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    options = vars(arguments)
    seed, path, smoke = (options.pop(name) for name in ("seed", "plot", "smoke"))
    if smoke:
        options |= {"seconds": 6.0, "per_second": 100.0, "objects": 1000, "generators": 5}
    simulation = Simulation(Load(**options), seed)
    simulation.run()
    report(simulation)
    if path:
        plot(simulation, path)


if __name__ == "__main__":
    main()
