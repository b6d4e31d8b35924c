"""How many workers a cluster has room for. Counted node by node, because a worker lies on one node."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from jobs.cluster import is_joined
from jobs.ray_private import node_groups
from objdrive.errors import ObjdriveError

_WORKER_CPUS = 0.9
# Of each worker's core, a tenth is left for reading rows: Ray Data would wait for ever on a full cluster.
_LOOK_SECONDS = 1.0

Answer = TypeVar("Answer")
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Workers:
    """How many Ray Train workers, from `least` to `most`, and how many GPUs each takes, beside one core."""

    least: int
    most: int
    gpus: float = 0.0

    def share(self) -> dict[str, float]:
        """What each takes, as Ray counts it."""
        return _share(self.gpus)


@dataclass(frozen=True)
class WorkersRequest:
    """How many workers a user wants, of how many GPUs each; None: as the cluster suggests.

    `memory` is what a worker without a GPU takes, in bytes. It bounds their number where the user names none.
    """

    least: int | None = None
    most: int | None = None
    gpus: float | None = None
    memory: int = 0

    @classmethod
    def of(cls, count: str | None, gpus: float | None) -> "WorkersRequest":
        """Read ``--workers MIN[:MAX]`` and ``--gpus-per-worker``.

        Raises:
            ObjdriveError: not of that form.
        """
        if gpus is not None and gpus > 1 and gpus % 1:
            raise ObjdriveError(f"--gpus-per-worker {gpus:g}: a worker takes a part of one GPU, or whole GPUs")
        if count is None:
            return cls(gpus=gpus)
        least, colon, most = count.partition(":")
        try:
            request = cls(int(least), int(most) if colon else int(least), gpus)
        except ValueError:
            raise ObjdriveError(f"--workers {count}: give a number, or MIN:MAX") from None
        if not 1 <= (request.least or 0) <= (request.most or 0):
            raise ObjdriveError(f"--workers {count}: MIN must be at least 1 and at most MAX")
        return request


def fit_workers(
    request: WorkersRequest, nodes: Sequence[Resources], groups: Sequence[Resources], *, may_grow: bool
) -> Workers | str:
    """The workers to start on these nodes, or in words what has to join them first.

    Without a number in the request, it is one worker for each GPU, or without any for each core, as far as the memory
    goes.

    Args:
        request: what is wanted.
        nodes: what each node has.
        groups: what a node of each kind has that an autoscaler may start; empty if there is none.
        may_grow: whether further nodes may join.

    Raises:
        ObjdriveError: no node that there is, or that may come, has room for a worker.
    """
    gpus = min(1.0, _most("GPU", nodes)) if request.gpus is None else request.gpus
    room, least = sum(_fitting(node, gpus) for node in nodes), request.least or 1
    if room >= least:
        if request.least is None and not gpus:
            room = max(1, min(room, sum(_holding(node, request.memory) for node in nodes)))
        return Workers(request.least or room, request.most or room, gpus)
    seen = [*nodes, *groups]
    if gpus and (groups or _most("GPU", nodes)) and not any(_fitting(node, gpus) for node in seen):
        raise ObjdriveError(
            f"--gpus-per-worker {gpus:g}: no worker fits a node, the largest has {_most('GPU', seen):g} GPU(s) "
            f"and {_most('CPU', seen):g} core(s); ask for less, or start a larger node first"
        )
    each = f"{gpus:g} GPU(s) and a core" if gpus else "a core"
    wanted = f"{least} worker(s) of {each} each"
    there = f"the cluster has room for {room}: {_describe(nodes)}"
    if not may_grow:
        raise ObjdriveError(f"{wanted} were asked for, and {there}")
    return f"{wanted}; {there}"


def idle_gpus(workers: Workers, nodes: Sequence[Resources]) -> float:
    """GPUs that no worker can take, because of what is left over on each node."""
    if not workers.gpus:
        return 0.0
    return sum(node.get("GPU", 0.0) - workers.gpus * _fitting(node, workers.gpus) for node in nodes)


def find_workers(request: WorkersRequest, on_wait: Callable[[str], None]) -> Workers:
    """The workers to start on the cluster that Ray is connected to. Waits until it has room for them.

    As long as it waits, an autoscaler knows what for, and `on_wait` is told every second: what is waited for, for how
    long by now, and what the cluster has.

    Raises:
        ObjdriveError: see `fit_workers`.
    """
    return _await(
        lambda: fit_workers(request, _nodes(), node_groups(), may_grow=is_joined()),
        [_share(request.gpus or 0.0)] * (request.least or 1),
        on_wait,
    )


def find_cores(on_wait: Callable[[str], None]) -> int:
    """How many cores the cluster has to read rows with, at least 1. Waits as `find_workers` does."""

    def cores() -> int | str:
        nodes = _nodes()
        return max(1, int(sum(node.get("CPU", 0.0) for node in nodes))) if _most("CPU", nodes) else "a node with cores"

    return _await(cores, [{"CPU": 1 - _WORKER_CPUS}], on_wait)


def describe(workers: Workers) -> str:
    """One line for the user: how many workers there will be, of what, and what stays idle."""
    count = f"{workers.least}" if workers.least == workers.most else f"{workers.least} to {workers.most}"
    if not workers.gpus:
        return f"{count}, without GPU"
    idle = idle_gpus(workers, _nodes())
    unused = f"; {idle:g} GPU(s) stay idle, because workers of {workers.gpus:g} do not fill their nodes" if idle else ""
    return f"{count} of {workers.gpus:g} GPU(s){unused}"


def _await(look: Callable[[], Answer | str], bundles: list[dict[str, float]], on_wait: Callable[[str], None]) -> Answer:
    answer = look()
    if not isinstance(answer, str):
        return answer
    started = time.monotonic()
    with _demand(bundles):
        while isinstance(answer, str):
            on_wait(f"waiting for {answer}; {time.monotonic() - started:.0f} s so far")
            time.sleep(_LOOK_SECONDS)
            answer = look()
    on_wait("")
    return answer


@contextmanager
def _demand(bundles: list[dict[str, float]]) -> Iterator[None]:
    """Have an autoscaler see that these are wanted."""
    group = placement_group(bundles)
    try:
        yield
    finally:
        remove_placement_group(group)


def _nodes() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fitting(node: Resources, gpus: float) -> int:
    cores = int(node.get("CPU", 0.0))
    # Shares such as 0.1 are no exact binary fractions.
    return min(cores, math.floor(node.get("GPU", 0.0) / gpus + 1e-6)) if gpus else cores


def _holding(node: Resources, memory: int) -> int:
    """For how many workers without a GPU a node has cores and memory."""
    cores = _fitting(node, 0.0)
    return min(cores, int(node["memory"] // memory)) if memory and "memory" in node else cores


def _most(name: str, nodes: Sequence[Resources]) -> float:
    return max((node.get(name, 0.0) for node in nodes), default=0.0)


def _share(gpus: float) -> dict[str, float]:
    return {"CPU": _WORKER_CPUS, **({"GPU": gpus} if gpus else {})}


def _describe(nodes: Sequence[Resources]) -> str:
    kinds = Counter((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes)
    shown = [f"{count} node(s) of {cpus:g} core(s) and {gpus:g} GPU(s)" for (cpus, gpus), count in kinds.most_common()]
    return ", ".join(shown)
