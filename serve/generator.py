"""The Serve deployment that draws pictures: each replica has an engine."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Gauge, Histogram

from objdrive.base.memory import limit_memory
from objdrive.metrics import PREFIX
from objdrive.sampling.engine import Engine
from objdrive.sampling.requests import DrawRequest
from serve.drawing import BaseInfo, FinishedPicture, LocalGenerators, PartialPicture, PictureEvent, Refused
from serve.engine import make_engine
from serve.errors import RETRY_AFTER_SECONDS, ApiError, logger
from serve.health import HealthCheck
from serve.metrics import MEASURED, SECONDS, samples
from serve.settings import Settings

_ADVERTISED_ADAPTERS = 32
_EXPORT_SECONDS = 5.0
_ATTEMPTS = 5
_PAUSE_SECONDS = 0.5
_GONE = (RayActorError, TaskCancelledError, ReplicaUnavailableError)


class Generator:
    """A replica: a base, and an engine on it."""

    def __init__(self, settings: Settings) -> None:
        limit_memory(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))
        base, self._engine = make_engine(settings)
        self._generators = LocalGenerators(base, self._engine)
        self._health = HealthCheck(self._engine)
        self._closed = threading.Event()
        threading.Thread(target=_export, args=(self._engine, self._closed), name="metrics", daemon=True).start()

    async def describe(self) -> BaseInfo:
        """See `serve.drawing.Generators`."""
        return await self._generators.describe()

    async def draw(self, request: DrawRequest) -> AsyncGenerator[PictureEvent, None]:
        """See `serve.drawing.Generators`."""
        for key in request.objects:
            await self.adapter(str(key))
        async for event in self._generators.draw(request):
            yield event

    @serve.multiplexed(  # type: ignore[untyped-decorator]
        max_num_models_per_replica=_ADVERTISED_ADAPTERS
    )
    async def adapter(self, model_id: str) -> str:
        """Tell Serve which adapters this replica uses, by ``object_id@digest``.

        The engine holds the adapters, not Serve's cache: that one evicts adapters that are still drawn with, and loads
        them one at a time.
        """
        return model_id

    async def check_health(self) -> None:
        """Raises if the engine no longer draws; Serve then replaces the replica."""
        await self._health.check()

    async def __del__(self) -> None:
        """Close the engine; Serve calls this after the replica's last request."""
        self._closed.set()
        await asyncio.to_thread(self._engine.close)


def _export(engine: Engine, closed: threading.Event) -> None:
    """Pass the engine's measurements to Ray's metrics every few seconds."""
    gauges: dict[str, Gauge] = {}
    while not closed.wait(_EXPORT_SECONDS):
        for name, description, labels, value in samples(engine.stats()):
            if name not in gauges:
                gauges[name] = Gauge(PREFIX + name, description, tuple(labels))
            gauges[name].set(value, labels)


class RayMeter:
    """Passes the API's measurements to Ray's metrics, which Prometheus reads from every node."""

    def __init__(self) -> None:
        self._counters = {
            name: Counter(PREFIX + name, metric.description, metric.labels)
            for name, metric in MEASURED.items()
            if metric.kind == "counter"
        }
        self._histograms = {
            name: Histogram(PREFIX + name, metric.description, list(SECONDS), metric.labels)
            for name, metric in MEASURED.items()
            if metric.kind == "histogram"
        }

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """See `serve.metrics.Meter`."""
        self._counters[name].inc(amount, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """See `serve.metrics.Meter`."""
        self._histograms[name].observe(value, labels)


class RayGenerators:
    """The replicas of a `Generator` deployment, as the API sees them.

    When a drawing's replica goes away, another one draws the picture anew. It comes out the same, and no partial
    picture is delivered twice.
    """

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self._handle = handle
        self._info: BaseInfo | None = None

    async def describe(self) -> BaseInfo:
        """See `serve.drawing.Generators`."""
        if self._info is None:
            try:
                self._info = await self._handle.describe.remote()
            except (*_GONE, BackPressureError, DeploymentUnavailableError) as error:
                raise ApiError("unavailable", "no generator is available at the moment") from error
        assert self._info is not None
        return self._info

    async def draw(self, request: DrawRequest) -> AsyncGenerator[PictureEvent, None]:
        """See `serve.drawing.Generators`."""
        delivered: set[int | type[PictureEvent]] = set()
        attempts = 0
        while True:
            attempts += 1
            async for event in self._attempt(request):
                if isinstance(event, Refused) and self._again(event, attempts, begun=bool(delivered)):
                    break
                mark = event.index if isinstance(event, PartialPicture) else type(event)
                if mark not in delivered:
                    delivered.add(mark)
                    yield event
                if isinstance(event, Refused | FinishedPicture):
                    return
            await asyncio.sleep(_PAUSE_SECONDS)

    def _again(self, refused: Refused, attempts: int, *, begun: bool) -> bool:
        # A drawing that lost its place in a queue gets another, however long it takes: the API holds the time limit.
        return (begun and refused.code == "queue_full") or (
            refused.code in ("draining", "unavailable") and attempts < _ATTEMPTS
        )

    async def _attempt(self, request: DrawRequest) -> AsyncGenerator[PictureEvent, None]:
        home = str(request.objects[0]) if request.objects else ""
        options = self._handle.options(stream=True, multiplexed_model_id=home)
        response: Any = options.draw.remote(request)
        try:
            async for event in response:
                yield event
        except _GONE as error:
            logger.warning("a generator went away: %s", error)
            yield Refused("unavailable", "the generator went away", RETRY_AFTER_SECONDS)
        except DeploymentUnavailableError:
            yield Refused("unavailable", "no generator is available at the moment", RETRY_AFTER_SECONDS)
        except BackPressureError:
            yield Refused("queue_full", "too many requests wait already: try again", RETRY_AFTER_SECONDS)
        finally:
            # Nobody listens any more.
            with suppress(RuntimeError):
                response.cancel()
