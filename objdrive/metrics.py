"""What a metric is. Which there are, and how they are exported, is said by what is built on the library."""

from dataclasses import dataclass
from typing import Literal

PREFIX = "objdrive_"


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        kind: as Prometheus knows it.
        unit: what its value counts.
        description: what it measures.
        labels: names of its labels. None has a value per object, so that the number of time series stays bounded.
    """

    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    description: str
    labels: tuple[str, ...] = ()
