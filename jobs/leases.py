"""LeaseQueue: who works on what. Plain bookkeeping, without Ray and without a clock of its own."""

import math
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

MAX_ATTEMPTS = 3
"""A task that has taken this many workers down with it is given up."""
MAX_LOSSES = 10
"""So is one that was lost this many times for a reason outside of it, such as the end of its worker's node."""
MAX_STARTS = 3
"""A rank whose processes could not start this many times in a row is given up."""
Event = Literal[
    "leased",
    "leased_again",
    "finished",
    "worker_died",
    "worker_silent",
    "work_failed",
    "given_back",
    "worker_not_started",
    "queue_died",
]
"""What befalls leases, workers and the queue. A lease of a task that a worker had lost before is `leased_again`; one
that ends with its worker through no fault of its own is `given_back`."""


@dataclass(frozen=True)
class Task:
    """A unit of work: `key` is unique in a run."""

    key: str
    payload: Any


@dataclass(frozen=True)
class Lost:
    """The outcome of a task that was given up because no worker lived through it."""

    message: str


@dataclass(frozen=True)
class Death:
    """Of a worker's process: why, and whether its task may have caused it."""

    cause: str
    suspect: bool


class LeaseLostError(Exception):
    """The queue gave a worker's tasks to another one."""


class Alive(Protocol):
    """Says that work on a lease goes on: `done` of `of` steps, if it knows."""

    def __call__(self, done: int = 0, of: int = 0) -> None:
        """Tell the queue.

        Raises:
            LeaseLostError: the tasks are another worker's by now.
        """


@dataclass(frozen=True)
class Lease:
    """Tasks that one worker holds until it finishes them, dies or falls silent."""

    id: str
    tasks: tuple[Task, ...]


@dataclass
class _Holding:
    rank: int
    keys: tuple[str, ...]
    expires: float
    process: Any
    done: int = 0
    of: int = 0


@dataclass(frozen=True)
class InWork:
    """A lease under way: `done` of `of` steps; `of` is 0 until its worker has said how many there are."""

    keys: tuple[str, ...]
    done: int
    of: int


@dataclass(frozen=True)
class Collected:
    """What the driver learns at each poll: outcomes, what is in work, and what this incarnation has seen."""

    incarnation: str
    outcomes: dict[str, Any]
    in_work: tuple[InWork, ...] = ()
    broken: tuple[str, ...] = ()
    events: Counter[Event] = field(default_factory=Counter)


class LeaseQueue:
    """Leases tasks to ranks in groups; a lease ends by `finish`, by silence, or when its rank asks without naming it.

    A rank may hold several leases, each in another stage of its work. A task that took a worker down is leased alone,
    to a rank that holds nothing else as long as it holds that: so neither do others suffer by it, nor it by others.

    The driver is the authority: it keeps every task until it has its outcome, and offers all of them again to a new
    incarnation of the queue. So nothing here needs to survive. Workers that outlive the queue keep their leases by
    their next `beat`, which a new incarnation adopts.

    Args:
        workers: how many workers share the tail of the work at least.
        stall_seconds: a lease without a beat for so long is void.
        clock: seconds, monotonic.
        patience: seconds at the start during which nothing is leased, so that surviving workers' beats come first.
        kill: called with the process (as given to `lease`) of a void lease that fell silent.
        death: tells of the process of a lease whether and how it died.
    """

    def __init__(
        self,
        *,
        workers: int,
        stall_seconds: float,
        clock: Callable[[], float],
        patience: float = 0.0,
        kill: Callable[[Any], None] = lambda process: None,
        death: Callable[[Any], Death | None] = lambda process: None,
    ) -> None:
        self._workers = workers
        self._stall_seconds = stall_seconds
        self._clock = clock
        self._lease_from = clock() + patience
        self._kill = kill
        self._death = death
        self._incarnation = uuid.uuid4().hex
        self._tasks: dict[str, Task] = {}
        self._attempts: dict[str, int] = {}
        self._losses: Counter[str] = Counter()
        self._pending: deque[str] = deque()
        self._holdings: dict[str, _Holding] = {}
        self._outcomes: dict[str, Any] = {}
        self._broken: list[str] = []
        self._events: Counter[Event] = Counter()
        self._ranks: dict[int, Any] = {}
        self._replaced: set[Any] = set()
        self._failed_starts: Counter[int] = Counter()
        self._closed = False

    def offer(self, tasks: Sequence[Task], *, last: bool = False) -> str:
        """Take tasks in; those known already (pending, leased, finished) are not taken twice.

        Args:
            tasks: in the order in which they are to be leased.
            last: no further ones will come. `tasks` are then all that have no outcome yet, because this call may reach
                a new incarnation, which must not take an empty queue for the end.

        Returns:
            The incarnation that took them.
        """
        held = {key for holding in self._holdings.values() for key in holding.keys}
        for task in tasks:
            known = task.key in self._tasks or task.key in self._outcomes
            if task.key not in self._outcomes:
                self._tasks[task.key] = task
            if not known and task.key not in held:
                self._pending.append(task.key)
        self._closed = self._closed or last
        return self._incarnation

    def lease(
        self, rank: int, size: int, process: Any = None, *, held: Collection[str] = (), ahead: bool = False
    ) -> Lease | Literal["wait", "done"]:
        """Lease up to `size` tasks to a rank. What it held before, other than `held`, is void: it died with them.

        A process that another one has replaced, such as one on a node that was cut off, is told that all is done.

        Args:
            rank: which.
            size: of a group.
            process: of the rank.
            held: leases that this process still works on.
            ahead: whether it could not begin the tasks yet. It gets some only if every worker, this one too, could
                still take a whole group: at the end of a run nobody idles for tasks that lie waiting with another.
        """
        if process is not None and process in self._replaced:
            return "done"
        if self._ranks.get(rank) not in (None, process):
            self._replaced.add(self._ranks[rank])
        self._ranks[rank] = process
        self._failed_starts.pop(rank, None)
        self._bury()
        lost = [i for i, holding in self._holdings.items() if holding.rank == rank and i not in held]
        if lost:
            self._events["worker_died"] += 1
        for lease_id in lost:
            self._void(lease_id, f"the worker of rank {rank} died")
        self._expire()
        if self._closed and not self._pending and not self._holdings:
            return "done"
        if self._clock() < self._lease_from or not self._pending or not (self._closed or len(self._pending) >= size):
            return "wait"
        if not self._may_hold_more(rank) or (ahead and len(self._pending) < size * self._known_workers):
            return "wait"
        self._events["leased_again" if self._attempts.get(self._pending[0]) else "leased"] += 1
        keys = self._next_keys(size)
        lease = Lease(f"{self._incarnation}/{uuid.uuid4().hex}", tuple(self._tasks[key] for key in keys))
        self._holdings[lease.id] = _Holding(rank, keys, self._clock() + self._stall_seconds, process)
        return lease

    def beat(
        self, lease_id: str, rank: int, keys: Sequence[str], process: Any = None, *, done: int = 0, of: int = 0
    ) -> bool:
        """Say that work on a lease goes on: `done` of `of` steps.

        Returns:
            False if the lease is void: its tasks are another worker's by now, so the caller should drop them.
        """
        holding = self._holdings.get(lease_id)
        if holding is None:
            if not self._adoptable(lease_id, keys):
                return False
            holding = self._holdings[lease_id] = _Holding(rank, tuple(keys), 0.0, process)
            self._pending = deque(key for key in self._pending if key not in keys)
        holding.expires = self._clock() + self._stall_seconds
        holding.done, holding.of = done, of
        return True

    def finish(self, lease_id: str, outcomes: dict[str, Any]) -> None:
        """Take outcomes in, whether or not the lease still stands: what is done is done."""
        holding = self._holdings.pop(lease_id, None)
        self._outcomes.update(outcomes)
        for key in outcomes:
            self._forget(key)
        if holding:
            self._events["finished"] += 1
            self._requeue([key for key in holding.keys if key not in outcomes])
        else:
            # Only what nobody holds can be pending: to look through all of that at every end would be most of the work.
            self._pending = deque(key for key in self._pending if key not in outcomes)

    def give_back(self, lease_id: str) -> None:
        """Take a lease back whose worker ends for another one's sake; its tasks are leased anew, as they were."""
        if lease_id in self._holdings:
            self._return(lease_id)

    def abandon(self, lease_id: str, cause: str) -> None:
        """Take a lease back whose work failed as a whole; its tasks are tried again, each alone."""
        if lease_id in self._holdings:
            self._events["work_failed"] += 1
            self._void(lease_id, cause)

    def report_broken(self, rank: int, message: str) -> bool:
        """A worker could not start, and takes no leases.

        Returns:
            Whether another process is worth a try in its place: not after `MAX_STARTS` in a row.
        """
        self._broken.append(message)
        self._events["worker_not_started"] += 1
        self._failed_starts[rank] += 1
        return self._failed_starts[rank] < MAX_STARTS

    def collect(self, received: Iterable[str]) -> Collected:
        """Outcomes that the driver hasn't received yet; those named as received are forgotten."""
        for key in received:
            self._outcomes.pop(key, None)
        self._bury()
        self._expire()
        in_work = tuple(InWork(one.keys, one.done, one.of) for one in self._holdings.values())
        return Collected(self._incarnation, dict(self._outcomes), in_work, tuple(self._broken), self._events.copy())

    def _next_keys(self, size: int) -> tuple[str, ...]:
        # A task that took a worker down is leased alone, so that it can't take its neighbours down again.
        if self._attempts.get(self._pending[0]):
            return (self._pending.popleft(),)
        left = len(self._pending) + sum(len(holding.keys) for holding in self._holdings.values())
        fair = math.ceil(left / self._known_workers)
        keys: list[str] = []
        while self._pending and len(keys) < min(size, fair) and not self._attempts.get(self._pending[0]):
            keys.append(self._pending.popleft())
        return tuple(keys)

    @property
    def _known_workers(self) -> int:
        return max(self._workers, len(self._ranks))

    def _may_hold_more(self, rank: int) -> bool:
        """Whether the next task may be leased to a rank beside what it holds: not if either took a worker down."""
        held = [key for holding in self._holdings.values() if holding.rank == rank for key in holding.keys]
        return not held or not any(self._attempts.get(key) for key in (self._pending[0], *held))

    def _adoptable(self, lease_id: str, keys: Sequence[str]) -> bool:
        if lease_id.startswith(self._incarnation):
            return False
        held = {key for holding in self._holdings.values() for key in holding.keys}
        return not any(key in held or key in self._outcomes or self._attempts.get(key) for key in keys)

    def _bury(self) -> None:
        # A rank whose node is gone may not ask anew before the run's end: its lease is not to wait for that.
        processes = {holding.process for holding in self._holdings.values()}
        for process, death in [(process, self._death(process)) for process in processes]:
            if death is None:
                continue
            self._events["worker_died"] += 1
            for lease_id in [i for i, holding in self._holdings.items() if holding.process == process]:
                cause = f"the worker of rank {self._holdings[lease_id].rank} died: {death.cause}"
                self._void(lease_id, cause, suspect=death.suspect)

    def _expire(self) -> None:
        now = self._clock()
        for lease_id in [i for i, holding in self._holdings.items() if holding.expires < now]:
            holding = self._holdings.get(lease_id)
            if holding is None:
                continue
            cause = f"the worker of rank {holding.rank} was silent for {self._stall_seconds:g} s"
            self._events["worker_silent"] += 1
            self._void(lease_id, cause)
            # Its process ends for this lease alone.
            for other in [i for i, one in self._holdings.items() if _of_one_process(one, holding)]:
                self._return(other)
            self._kill(holding.process)

    def _void(self, lease_id: str, cause: str, *, suspect: bool = True) -> None:
        back = []
        for key in self._holdings.pop(lease_id).keys:
            if suspect:
                self._attempts[key] = self._attempts.get(key, 0) + 1
            self._losses[key] += 1
            if self._attempts.get(key, 0) < MAX_ATTEMPTS and self._losses[key] < MAX_LOSSES:
                back.append(key)
            else:
                self._outcomes[key] = Lost(f"given up after {self._losses[key]} attempts: {cause}")
                self._forget(key)
        self._requeue(back)

    def _return(self, lease_id: str) -> None:
        self._events["given_back"] += 1
        self._requeue(self._holdings.pop(lease_id).keys)

    def _requeue(self, keys: Sequence[str]) -> None:
        # Adopted tasks are unknown until the driver offers them again; that offer makes them pending.
        self._pending.extendleft(key for key in reversed(keys) if key in self._tasks)

    def _forget(self, key: str) -> None:
        self._tasks.pop(key, None)
        self._attempts.pop(key, None)
        self._losses.pop(key, None)


def _of_one_process(a: _Holding, b: _Holding) -> bool:
    return (a.rank, a.process) == (b.rank, b.process)
