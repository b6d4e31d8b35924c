"""Metrics for Prometheus. No label names an object, so that their number stays bounded."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from objdrive.metrics import PREFIX, Metric
from objdrive.sampling.histogram import HistogramSnapshot
from objdrive.sampling.stats import EngineStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


MEASURED = {
    "http_requests": Metric(
        "counter", "requests", "HTTP requests by outcome: ok, or an error's code.", ("route", "status", "outcome")
    ),
    "http_request_seconds": Metric("histogram", "seconds", "Until a request's answer was complete.", ("route",)),
    "pictures": Metric("counter", "drawings", "Drawings by outcome: ok, or an error's code.", ("outcome",)),
    "picture_seconds": Metric("histogram", "seconds", "From a drawing's request to its picture."),
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
    """An engine's measurement, and how its statistics give it: a number, a histogram, or numbers by a label's value."""

    metric: Metric
    of: Callable[[EngineStats], Any]


READ = {
    "engine_requests": Reading(
        Metric("counter", "requests", "Requests to the engine by outcome.", ("outcome",)), lambda stats: stats.requests
    ),
    "engine_waiting": Reading(
        Metric("gauge", "requests", "Requests that wait for a place in the batch."), lambda stats: stats.waiting
    ),
    "engine_running": Reading(Metric("gauge", "requests", "Requests in the batch."), lambda stats: stats.running),
    "queue_seconds": Reading(
        Metric("histogram", "seconds", "From a request to its first step."), lambda stats: stats.queue_seconds
    ),
    "batch_size": Reading(Metric("histogram", "requests", "Requests in a step."), lambda stats: stats.batch_size),
    "batch_limit": Reading(Metric("gauge", "requests", "Most requests in a step."), lambda stats: stats.batch_limit),
    "step_seconds": Reading(
        Metric("histogram", "seconds", "A denoising step of a batch."), lambda stats: stats.step_seconds
    ),
    "decode_seconds": Reading(
        Metric("histogram", "seconds", "Decoding a batch of pictures."), lambda stats: stats.decode_seconds
    ),
    "swap_seconds": Reading(
        Metric("histogram", "seconds", "Copying an adapter into a slot."), lambda stats: stats.swap_seconds
    ),
    "adapter_hits": Reading(
        Metric("counter", "adapters", "Needed adapters by the tier where they were.", ("tier",)),
        lambda stats: stats.hits,
    ),
    "adapters_resident": Reading(
        Metric("gauge", "adapters", "Adapters in slots of the device."), lambda stats: stats.resident
    ),
    "adapters_hosted": Reading(Metric("gauge", "adapters", "Adapters in host memory."), lambda stats: stats.hosted),
    "adapters_hosted_bytes": Reading(
        Metric("gauge", "bytes", "Adapters in host memory."), lambda stats: stats.hosted_bytes
    ),
}
"""What is read from an engine."""


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        stats = self._stats()
        for name, reading in READ.items():
            metric, value = reading.metric, reading.of(stats)
            if metric.kind == "histogram":
                histogram = HistogramMetricFamily(PREFIX + name, metric.description)
                histogram.add_metric([], _buckets(value), value.total)
                yield histogram
                continue
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(PREFIX + name, metric.description, labels=metric.labels)
            for labels, number in _numbers(metric, value):
                family.add_metric(list(labels.values()), number)
            yield family

    def describe(self) -> Iterable[Any]:
        return []


def _numbers(metric: Metric, value: Any) -> Iterable[tuple[dict[str, str], float]]:
    if not metric.labels:
        return [({}, value)]
    [label] = metric.labels
    return [({label: its}, number) for its, number in value.items()]


def _buckets(snapshot: HistogramSnapshot) -> list[tuple[str, float]]:
    bounds = [*(f"{bound:g}" for bound in snapshot.bounds), "+Inf"]
    return list(zip(bounds, [*snapshot.at_most, snapshot.count], strict=True))


def samples(stats: EngineStats) -> Iterator[tuple[str, str, dict[str, str], float]]:
    """What is `READ` as single numbers (name, description, labels, value), named as Prometheus names them.

    For exporters without ready-made counters and histograms.
    """
    for name, reading in READ.items():
        metric, value = reading.metric, reading.of(stats)
        if metric.kind != "histogram":
            suffix = "_total" if metric.kind == "counter" else ""
            for labels, number in _numbers(metric, value):
                yield name + suffix, metric.description, labels, number
            continue
        for bound, count in _buckets(value):
            yield f"{name}_bucket", metric.description, {"le": bound}, count
        yield f"{name}_sum", metric.description, {}, value.total
        yield f"{name}_count", metric.description, {}, value.count
