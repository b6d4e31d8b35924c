"""Metrics for Prometheus. No label names an object, so that their number stays bounded."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from objdrive.sampling.histogram import HistogramSnapshot
from objdrive.sampling.stats import EngineStats

PREFIX = "objdrive_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class Metric:
    """A metric: its kind, what it measures, and its labels."""

    kind: Literal["counter", "histogram"]
    description: str
    labels: tuple[str, ...] = ()


MEASURED = {
    "http_requests": Metric("counter", "HTTP requests by outcome.", ("route", "status")),
    "http_request_seconds": Metric("histogram", "Time until a request's answer was complete.", ("route",)),
    "pictures": Metric("counter", "Drawings by outcome: ok, or an error's code.", ("outcome",)),
    "picture_seconds": Metric("histogram", "Time from a drawing's request to its picture."),
}
"""What the API measures."""


class Meter(Protocol):
    """Takes the measurements of `MEASURED`. Safe for use from threads."""

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        ...


class PrometheusMeter:
    """Keeps the measurements in this process, for a single server that Prometheus reads directly.

    Args:
        stats: reads the statistics of the engine in this process.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._metrics = {name: self._make(name, metric) for name, metric in MEASURED.items()}
        self._registry.register(_EngineCollector(stats))

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """See `Meter`."""
        self._labelled(name, labels).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """See `Meter`."""
        self._labelled(name, labels).observe(value)

    def render(self) -> bytes:
        """All measurements, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _make(self, name: str, metric: Metric) -> Counter | Histogram:
        if metric.kind == "counter":
            return Counter(PREFIX + name, metric.description, metric.labels, registry=self._registry)
        return Histogram(PREFIX + name, metric.description, metric.labels, buckets=SECONDS, registry=self._registry)

    def _labelled(self, name: str, labels: dict[str, str]) -> Any:
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric


@dataclass(frozen=True)
class Reading:
    """An engine's measurement: one number, one histogram, or with `label` a number for each of its values."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    value: Any
    label: str = ""


def readings(stats: EngineStats) -> list[Reading]:
    """An engine's measurements, under their exported names."""
    return [
        Reading("engine_requests", "counter", "Requests to the engine by outcome.", stats.requests, "outcome"),
        Reading("engine_waiting", "gauge", "Requests that wait for a place in the batch.", stats.waiting),
        Reading("engine_running", "gauge", "Requests in the batch.", stats.running),
        Reading("queue_seconds", "histogram", "From a request to its first step.", stats.queue_seconds),
        Reading("batch_size", "histogram", "Requests in a step.", stats.batch_size),
        Reading("step_seconds", "histogram", "A denoising step of a batch.", stats.step_seconds),
        Reading("decode_seconds", "histogram", "Decoding a batch of pictures.", stats.decode_seconds),
        Reading("swap_seconds", "histogram", "Copying an adapter into a slot.", stats.swap_seconds),
        Reading("adapter_hits", "counter", "Needed adapters by the tier where they were.", stats.hits, "tier"),
        Reading("adapters_resident", "gauge", "Adapters in slots of the device.", stats.resident),
        Reading("adapters_hosted", "gauge", "Adapters in host memory.", stats.hosted),
        Reading("adapters_hosted_bytes", "gauge", "Their size.", stats.hosted_bytes),
    ]


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        for reading in readings(self._stats()):
            name, labels = PREFIX + reading.name, [reading.label] if reading.label else []
            if reading.kind == "histogram":
                histogram = HistogramMetricFamily(name, reading.description)
                histogram.add_metric([], _buckets(reading.value), reading.value.total)
                yield histogram
                continue
            make = CounterMetricFamily if reading.kind == "counter" else GaugeMetricFamily
            family = make(name, reading.description, labels=labels)
            for label, value in _labelled(reading):
                family.add_metric([label] if label else [], value)
            yield family

    def describe(self) -> Iterable[Any]:
        return []


def _labelled(reading: Reading) -> Iterable[tuple[str, float]]:
    return reading.value.items() if reading.label else [("", reading.value)]


def _buckets(snapshot: HistogramSnapshot) -> list[tuple[str, float]]:
    bounds = [*(f"{bound:g}" for bound in snapshot.bounds), "+Inf"]
    return list(zip(bounds, [*snapshot.at_most, snapshot.count], strict=True))


def samples(stats: EngineStats) -> Iterator[tuple[str, str, dict[str, str], float]]:
    """`readings` as single numbers (name, description, labels, value), for exporters without ready-made histograms."""
    for reading in readings(stats):
        if reading.kind != "histogram":
            for label, value in _labelled(reading):
                yield reading.name, reading.description, {reading.label: label} if label else {}, value
            continue
        for bound, count in _buckets(reading.value):
            yield f"{reading.name}_bucket", reading.description, {"le": bound}, count
        yield f"{reading.name}_sum", reading.description, {}, reading.value.total
        yield f"{reading.name}_count", reading.description, {}, reading.value.count
