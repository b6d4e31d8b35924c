"""Fan tasks out to Ray Train workers that hold something expensive and pull leases from a queue actor.

Ray Train's own data sharding, restarts and `report` each lose or stall items (a death restarts the whole group, equal
shards drop rows, report is a barrier), so the workers share nothing but the queue: the backend makes no process group,
a dead rank is replaced alone, and tasks are leased.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray
from pyarrow.fs import FileSystem
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.leases import Alive, Collected, Event, InWork, Lease, LeaseLostError, Lost, Task
from jobs.queue_actor import QueueActor
from jobs.ray_private.train import PerWorkerConfig, PerWorkerTrainer
from jobs.room import Workers
from jobs.stages import Job, work_off
from objdrive.errors import ObjdriveError

_POLL_SECONDS = 0.2
_BEAT_SECONDS = 1.0
_FEEDER_SECONDS = 1.0
_LAST_SECONDS = 10.0
_PAUSES_SECONDS = (1.0, 4.0)
"""Between tries of making a worker's work: storage may be away for a moment."""


class Work(Protocol):
    """What a worker does: made once per worker."""

    group_size: int

    def begin(self, payloads: list[Any], alive: Alive) -> Job:
        """What is to be done with the payloads of a lease; it calls `alive` now and then in each of its stages."""


@dataclass(frozen=True)
class Leased:
    """Tasks in work together: `done` of `of` steps; `of` is 0 until their worker has said how many there are."""

    tasks: tuple[Task, ...]
    done: int
    of: int


def fan_out(
    tasks: Iterable[Task],
    make_work: Callable[[], Work],
    *,
    workers: Workers,
    on_outcome: Callable[[Task, Any], None],
    on_progress: Callable[[Sequence[Leased]], None] = lambda leased: None,
    on_events: Callable[[Mapping[Event, int]], None] = lambda events: None,
    storage: tuple[FileSystem, str],
    stall_seconds: float,
    window: int,
) -> None:
    """Work off a stream of tasks, each exactly once as seen by `on_outcome`, whatever dies meanwhile.

    If Ray Train still starts a worker in place of a lost one when all is done, it is left to itself, with the queue. It
    ends when the worker has learned that all is done, or with the driver.

    Args:
        tasks: read lazily, at most `window` ahead of the outcomes.
        make_work: makes a worker's `Work`; sent to the workers, so it must be picklable.
        workers: how many, with what.
        on_outcome: called in the driver for each task, with what `Work` returned or `Lost`.
        on_progress: called in the driver again and again with what is in work.
        on_events: called in the driver with how often what has happened since it was called before.
        storage: filesystem and path that all nodes share, where Ray Train keeps the state of its run.
        stall_seconds: a worker that shows no progress for so long is killed and its tasks are leased anew.
        window: most tasks that are out at any time.

    Raises:
        ObjdriveError: no worker could start, or Ray Train gave up before all tasks were read and done.
    """
    # Beside the driver, without which the run is over anyway: the loss of another node does not stop the queue.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = QueueActor
    queue: ActorHandle[Any] = actor.options(scheduling_strategy=here).remote(
        workers=workers.least, stall_seconds=stall_seconds
    )
    pump = _Pump(queue, iter(tasks), on_outcome, on_progress, on_events, window)
    filesystem, path = storage
    trainer = PerWorkerTrainer(
        _worker_loop,
        train_loop_config={"queue": queue, "make_work": make_work, "window": window},
        torch_config=PerWorkerConfig(),
        scaling_config=_scaling(workers),
        run_config=RunConfig(
            name="train",
            storage_filesystem=filesystem,
            storage_path=path,
            failure_config=FailureConfig(max_failures=-1),
        ),
    )
    pump.start()
    fit = _Fit(trainer)
    try:
        fit.wait(pump)
    finally:
        pump.stop()
        # A worker that starts late would fail without it, and Ray Train would start the next one, on and on.
        if fit.over:
            ray.kill(queue)
    if pump.failure is not None:
        raise pump.failure
    if pump.unfinished or not pump.fed:
        cause = "; ".join(sorted(set(pump.broken))) or fit.failure or "all the workers left"
        unread = "" if pump.fed else ", and others had not been read yet"
        raise ObjdriveError(f"{pump.unfinished} task(s) were left undone{unread}: {cause}")


def _scaling(workers: Workers) -> ScalingConfig:
    count: Any = workers.least if workers.least == workers.most else (workers.least, workers.most)
    return ScalingConfig(num_workers=count, use_gpu=workers.gpus > 0, resources_per_worker=workers.share())


class _Fit:
    """A trainer at work, in a thread: in the main one, Ray Train would take Ctrl-C for itself and end the process."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self.failure: BaseException | None = None
        self._trainer = trainer
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether the trainer has come to its end."""
        return not self._thread.is_alive()

    def wait(self, pump: "_Pump") -> None:
        """Wait for the trainer's end, or for a while after the end of the work."""
        while not self.over and time.monotonic() - pump.done_since < _LAST_SECONDS:
            self._thread.join(_BEAT_SECONDS)

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self.failure = error


class _Pump:
    """The driver's side: feeds tasks, collects outcomes, and offers everything again when the queue was reborn."""

    def __init__(
        self,
        queue: "ActorHandle[Any]",
        tasks: Iterator[Task],
        on_outcome: Callable[[Task, Any], None],
        on_progress: Callable[[Sequence[Leased]], None],
        on_events: Callable[[Mapping[Event, int]], None],
        window: int,
    ) -> None:
        self._queue = queue
        self._tasks = tasks
        self._on_outcome = on_outcome
        self._on_progress = on_progress
        self._on_events = on_events
        self._counted_of = ""
        self._counted: Counter[Event] = Counter()
        self._room = threading.Semaphore(window)
        self._lock = threading.Lock()
        self._out: dict[str, Task] = {}
        self._fresh: list[Task] = []
        self._fed = False
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._feed, self._collect)]
        self.done_since = math.inf
        """When all tasks had been read and done, on the monotonic clock."""
        self.failure: BaseException | None = None
        self.broken: tuple[str, ...] = ()

    @property
    def unfinished(self) -> int:
        """Tasks without an outcome."""
        return len(self._out)

    @property
    def fed(self) -> bool:
        """Whether all tasks have been read."""
        return self._fed

    def start(self) -> None:
        """Start feeding and collecting."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Collect what is there and end; a source of tasks that hangs is left to itself."""
        self._stopping.set()
        self._room.release()
        feeder, collector = self._threads
        feeder.join(_FEEDER_SECONDS)
        collector.join()

    def _feed(self) -> None:
        try:
            for task in self._tasks:
                self._room.acquire()
                if self._stopping.is_set():
                    return
                with self._lock:
                    self._out[task.key] = task
                    self._fresh.append(task)
        except BaseException as error:
            # What was fed before is still worked off; the caller learns of the failure after that.
            self.failure = error
        self._fed = True

    def _collect(self) -> None:
        try:
            self._collect_until_stopped()
        except BaseException as error:
            self.failure = error
            self._stopping.set()
            self._room.release()
            ray.get(self._queue.offer.remote([], last=True))

    def _collect_until_stopped(self) -> None:
        received: list[str] = []
        incarnation, last_offered = "", False
        while True:
            last = self._stopping.is_set()
            self._offer_fresh()
            answer: Any = self._queue.collect.remote(received)
            collected: Collected = ray.get(answer)
            received = list(collected.outcomes)
            self.broken = collected.broken or self.broken
            for key, outcome in collected.outcomes.items():
                with self._lock:
                    task = self._out.pop(key, None)
                if task is not None:
                    self._on_outcome(task, outcome if isinstance(outcome, Lost) else cloudpickle.loads(outcome))
                    self._room.release()
            self._on_progress(self._leased(collected.in_work))
            if events := self._news(collected):
                self._on_events(events)
            if self._fed and not self._out:
                self.done_since = min(self.done_since, time.monotonic())
            if collected.incarnation != incarnation or self._fed != last_offered:
                # Looked at before the tasks: once it is set, none comes to them any more.
                last_offered = self._fed
                incarnation = self._offer_all(last=last_offered)
            if last:
                return
            self._stopping.wait(_POLL_SECONDS)

    def _news(self, collected: Collected) -> Counter[Event]:
        """What has happened since the last poll; every incarnation of the queue counts from zero."""
        if collected.incarnation == self._counted_of:
            news = collected.events - self._counted
        else:
            news = collected.events + (Counter({"queue_died": 1}) if self._counted_of else Counter())
        self._counted_of, self._counted = collected.incarnation, collected.events
        return news

    def _leased(self, in_work: Sequence[InWork]) -> list[Leased]:
        with self._lock:
            return [
                Leased(tuple(self._out[key] for key in one.keys if key in self._out), one.done, one.of)
                for one in in_work
            ]

    def _offer_fresh(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, []
        if fresh:
            self._queue.offer.remote(_packed(fresh))

    def _offer_all(self, *, last: bool) -> str:
        # Only between two polls: the queue forgets what the driver received, and would take it for new.
        with self._lock:
            out = list(self._out.values())
        return str(ray.get(self._queue.offer.remote(_packed(out), last=last)))


def _packed(tasks: list[Task]) -> list[Task]:
    # The queue looks at keys only: bytes spare it the unpacking, and the imports that it takes.
    return [Task(task.key, cloudpickle.dumps(task.payload)) for task in tasks]


def _worker_loop(config: dict[str, Any]) -> None:
    queue, rank = config["queue"], get_context().get_world_rank()
    work = _made(config["make_work"], queue, rank)
    if work is not None:
        desk = _Desk(queue, rank, work, config["window"], ray.get_runtime_context().current_actor)
        # After a failure nobody knows what state this process is in: it ends with it, and another one goes on.
        work_off(desk.take, poll_seconds=_POLL_SECONDS)


def _made(make_work: Callable[[], Work], queue: "ActorHandle[Any]", rank: int) -> Work | None:
    """The worker's work; None if the queue has given the rank up.

    Raises:
        Exception: it could not be made. Ray Train then replaces this process.
    """
    for pause in (*_PAUSES_SECONDS, None):
        try:
            return make_work()
        except Exception as error:
            if pause is not None:
                time.sleep(pause)
            elif ray.get(queue.report_broken.remote(rank, f"{type(error).__name__}: {error}")):
                raise
    return None


class _Desk:
    """Where a worker takes its leases: the queue, which is told what the worker still holds."""

    def __init__(
        self, queue: "ActorHandle[Any]", rank: int, work: Work, window: int, process: "ActorHandle[Any]"
    ) -> None:
        self.queue = queue
        self.rank = rank
        self.process = process
        self.held: set[str] = set()
        self._work = work
        self._window = window

    def take(self, ahead: bool) -> "_InHand | Literal['wait', 'done']":
        """Lease a group, if there is one."""
        # A group larger than the window would never be full.
        size = min(self._work.group_size, self._window)
        answer: Any = self.queue.lease.remote(self.rank, size, self.process, held=tuple(self.held), ahead=ahead)
        lease: Lease | Literal["wait", "done"] = ray.get(answer)
        return _InHand(self, self._work, lease) if isinstance(lease, Lease) else lease


class _InHand:
    """A lease of this worker's, and its beats: at most one a second, and without waiting for the answer."""

    def __init__(self, desk: _Desk, work: Work, lease: Lease) -> None:
        self._desk = desk
        self._id = lease.id
        self._keys = [task.key for task in lease.tasks]
        self._last = time.monotonic()
        self._answer: ray.ObjectRef[bool] | None = None
        self._progress = 0, 0
        desk.held.add(lease.id)
        self.job = work.begin([cloudpickle.loads(task.payload) for task in lease.tasks], self._alive)

    def waits(self) -> None:
        self._alive(*self._progress)

    def finish(self, outcomes: list[Any]) -> None:
        packed = map(cloudpickle.dumps, outcomes)
        self._end(self._desk.queue.finish.remote(self._id, dict(zip(self._keys, packed, strict=True))))

    def abandon(self, error: Exception) -> None:
        self._end(self._desk.queue.abandon.remote(self._id, f"{type(error).__name__}: {error}"))

    def give_back(self) -> None:
        self._end(self._desk.queue.give_back.remote(self._id))

    def drop(self) -> None:
        self._desk.held.discard(self._id)

    def _end(self, told: "ray.ObjectRef[None]") -> None:
        ray.get(told)
        self.drop()

    def _alive(self, done: int = 0, of: int = 0) -> None:
        self._progress = done, of
        if time.monotonic() - self._last < _BEAT_SECONDS:
            return
        if self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            if not ready:
                return
            if not ray.get(self._answer):
                raise LeaseLostError
        desk = self._desk
        self._answer = desk.queue.beat.remote(self._id, desk.rank, self._keys, desk.process, done=done, of=of)
        self._last = time.monotonic()
