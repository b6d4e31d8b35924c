"""What a run exports by way of Ray's metrics, which Prometheus reads from every node."""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from jobs.leases import Event
from objdrive.metrics import PREFIX, Metric

MEASURED = {
    "run_rows_read": Metric("counter", "rows", "Rows read from the manifest.", ("run",)),
    "run_rows": Metric("counter", "rows", "Rows by what became of them.", ("run", "status")),
    "run_rejects": Metric("counter", "rows", "Rows that were rejected or failed, by reason code.", ("run", "reason")),
    "run_object_seconds": Metric(
        "histogram", "seconds", "An object's fine-tune: its share of its group's time.", ("run",)
    ),
    "run_leases": Metric("gauge", "leases", "Groups that workers hold.", ("run",)),
    "run_rows_in_work": Metric("gauge", "rows", "Rows in those groups.", ("run",)),
    "run_last_outcome_timestamp_seconds": Metric(
        "gauge", "seconds since 1970", "When a worker last finished a row, or the fan-out began.", ("run",)
    ),
    "run_events": Metric("counter", "events", "What befell leases, workers and the queue.", ("run", "event")),
}
"""What a run measures. A counter of Ray's is there from its first increment on, not from zero."""
_OBJECT_SECONDS = (1.0, 3.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)


class RunMetrics:
    """A run's metrics. Safe for use from threads.

    Ray forgets a gauge 20 seconds after it was last set; a counter stays as long as the node. The cluster must be
    connected before this is made.

    Args:
        run_id: the value of the label `run`.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._metrics = {name: _made(name, metric) for name, metric in MEASURED.items()}
        for metric in self._metrics.values():
            metric.set_default_tags({"run": run_id})

    def read_row(self) -> None:
        """A row was read from the manifest."""
        self._metrics["run_rows_read"].inc()

    def row(self, status: str, reason: str = "") -> None:
        """A row is dealt with; `reason` is the code of one that is not in the store."""
        self._metrics["run_rows"].inc(tags={"status": status})
        if reason:
            self._metrics["run_rejects"].inc(tags={"reason": reason})

    def object_seconds(self, seconds: float) -> None:
        """An object was fine-tuned."""
        self._metrics["run_object_seconds"].observe(seconds)

    def working(self, leases: int, rows: int, last_outcome: float) -> None:
        """What is in work; `last_outcome` is in seconds since 1970. Call it again and again."""
        self._metrics["run_leases"].set(leases)
        self._metrics["run_rows_in_work"].set(rows)
        self._metrics["run_last_outcome_timestamp_seconds"].set(last_outcome)

    def happened(self, events: Mapping[Event, int]) -> None:
        """Count events."""
        for event, count in events.items():
            self._metrics["run_events"].inc(count, {"event": event})


def _made(name: str, metric: Metric) -> Any:
    if metric.kind == "histogram":
        return Histogram(PREFIX + name, metric.description, list(_OBJECT_SECONDS), metric.labels)
    make = Counter if metric.kind == "counter" else Gauge
    return make(PREFIX + name, metric.description, metric.labels)
