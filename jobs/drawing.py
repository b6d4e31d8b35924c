"""What jobs that draw pictures share: a pool of Ray Data's workers, and the engine that each of them holds."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import torch

from jobs.bases import load_planned
from objdrive.adapters.store import ArtifactStore
from objdrive.base.memory import limit_memory
from objdrive.errors import AdapterTooLarge, ObjdriveError
from objdrive.sampling.engine import Engine
from objdrive.sampling.requests import Drawing, DrawRequest, Picture
from objdrive.sampling.sampler import fitting_batch_size

_FIRST_RANK = 8
_HIGHEST_RANK = 256
_MOST_IN_BATCH = 64
_MOST_SLOTS = 16
_HOST_BYTES = 2**30
_ENDLESS_QUEUE = 2**31


@dataclass(frozen=True)
class Pool:
    """How many processes work at once, each with how many GPUs."""

    workers: int
    gpus: float

    def options(self, blocks: int) -> dict[str, Any]:
        """As Ray Data's `map_batches` takes it for so many blocks."""
        return {
            "compute": ray.data.ActorPoolStrategy(size=max(1, min(self.workers, blocks))),
            "num_cpus": 0.9,
            "num_gpus": self.gpus,
            "batch_format": "pyarrow",
            # As blocks are cut, so are batches.
            "batch_size": None,
        }

    def prepare(self) -> str:
        """Set a worker up; the device for it."""
        if self.gpus:
            limit_memory(self.gpus)
            return "cuda"
        torch.set_num_threads(1)
        return "cpu"


@dataclass(frozen=True)
class PlannedBase:
    """The base that a job draws on: its name, its fingerprint, its CLIP and autoencoder (see `find_base`)."""

    name: str
    clip: str | None
    fingerprint: str
    vae: str | None = None


class Drawer:
    """A base that draws, with an engine whose adapters stay where they are from one call to the next.

    Others may use `base` while nothing is being drawn.

    Raises:
        ObjdriveError: the base here is another one than was planned.
    """

    def __init__(self, base: PlannedBase, pool: Pool) -> None:
        self.base = load_planned(base.name, base.fingerprint, clip=base.clip, vae=base.vae, device=pool.prepare())
        self._rank = _FIRST_RANK
        self._store = ""
        self._engine: Engine | None = None

    def draw(self, store: str, requests: Sequence[DrawRequest]) -> Iterator[Picture | ObjdriveError]:
        """Draw objects of the store at that address, many in a batch.

        Yields:
            For each request in its turn the picture, or why there is none.
        """
        left = deque(requests)
        while left:
            for outcome in _draw(self._on(store), left):
                if isinstance(outcome, AdapterTooLarge) and self._rank < _HIGHEST_RANK:
                    # Nobody knows the highest rank of a store: the bank grows when it is met.
                    self._rank *= 2
                    self._close()
                    break
                left.popleft()
                yield outcome

    def _on(self, store: str) -> Engine:
        if self._engine is None or self._store != store:
            self._close()
            batch_size = min(fitting_batch_size(self.base), _MOST_IN_BATCH)
            self._store = store
            self._engine = Engine(
                self.base,
                ArtifactStore(store),
                batch_size=batch_size,
                slots=min(batch_size, _MOST_SLOTS),
                rank=self._rank,
                host_bytes=_HOST_BYTES,
                queue_limit=_ENDLESS_QUEUE,
            )
        return self._engine

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None


def _draw(engine: Engine, requests: Sequence[DrawRequest]) -> Iterator[Picture | ObjdriveError]:
    under_way = deque(_submit(engine, request) for request in requests)
    while under_way:
        # Taken out of the queue, so that a picture goes when its reader has done with it.
        drawing = under_way.popleft()
        try:
            yield drawing if isinstance(drawing, ObjdriveError) else drawing.result()
        except ObjdriveError as error:
            yield error


def _submit(engine: Engine, request: DrawRequest) -> Drawing | ObjdriveError:
    try:
        return engine.submit(request)
    except ObjdriveError as error:
        return error
