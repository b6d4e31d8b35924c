"""What an engine counts."""

from collections.abc import Mapping
from dataclasses import dataclass

from objdrive.sampling.histogram import HistogramSnapshot
from objdrive.sampling.residency import Tier


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine's start, and gauges.

    Attributes:
        requests: ended requests by outcome: ``drawn`` or an error's code (refused ones included).
        waiting: requests that wait for a place in the batch.
        running: requests in the batch.
        queue_seconds: from `submit` to the first step.
        batch_size: requests in a step.
        batch_limit: most requests in a step.
        step_seconds: a step's forward pass and update.
        decode_seconds: decoding a batch of pictures.
        swap_seconds: copying one adapter into a slot.
        hits: needed adapters by the tier where they were found.
        resident: adapters in slots.
        hosted: adapters in host memory.
        hosted_bytes: their size.
    """

    requests: Mapping[str, int]
    waiting: int
    running: int
    queue_seconds: HistogramSnapshot
    batch_size: HistogramSnapshot
    batch_limit: int
    step_seconds: HistogramSnapshot
    decode_seconds: HistogramSnapshot
    swap_seconds: HistogramSnapshot
    hits: Mapping[Tier, int]
    resident: int
    hosted: int
    hosted_bytes: int
