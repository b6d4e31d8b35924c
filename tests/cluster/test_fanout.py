"""The fan-out on real Ray Train workers: deaths, hangs and failures, injected for real."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import assert_nothing_left_running, ray_processes
from pyarrow.fs import LocalFileSystem

from jobs import fanout
from jobs.fanout import fan_out
from jobs.leases import MAX_STARTS, Event, Lost, Task
from jobs.room import Workers
from objdrive.errors import ObjdriveError

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


@dataclass(frozen=True)
class Slow:
    """Work that takes a while, notes each task in `log` with its process, and dies of tasks named "poison"."""

    log: str
    group_size: int = 3
    seconds: float = 0.3

    def begin(self, payloads: list[str], alive: Callable[[], None]) -> "SlowJob":
        return SlowJob(self, payloads, alive)

    def work_off(self, payloads: list[str], alive: Callable[[], None]) -> list[str]:
        done = []
        for payload in payloads:
            if payload == "poison":
                os.kill(os.getpid(), signal.SIGKILL)
            if payload == "broken":
                raise ValueError("cannot do this")
            for _ in range(5):
                time.sleep(self.seconds / 5)
                alive()
            with Path(self.log).open("a") as log:
                log.write(f"{payload} {os.getpid()}\n")
            done.append(f"did {payload}")
        return done


class SlowJob:
    """All of its work is done in its second stage."""

    def __init__(self, work: Slow, payloads: list[str], alive: Callable[[], None]) -> None:
        self._work, self._payloads, self._alive = work, payloads, alive

    def prepare(self) -> None:
        self._alive()

    def train(self) -> None:
        self._done = self._work.work_off(self._payloads, self._alive)

    def commit(self) -> list[str]:
        return self._done


@dataclass(frozen=True)
class MakeSlow:
    log: str
    failure: str = ""

    def __call__(self) -> Slow:
        if self.failure:
            raise ValueError(self.failure)
        return Slow(self.log)


@dataclass
class DiesWithThree:
    """Dies once, in a training, when the next lease is prepared and the one before is being committed."""

    folder: Path
    group_size: int = 2
    prepared: int = 0
    trainings: int = 0
    committing: threading.Event = field(default_factory=threading.Event)

    def begin(self, payloads: list[str], alive: Callable[[], None]) -> "DiesWithThreeJob":
        return DiesWithThreeJob(self, payloads, alive)


@dataclass
class DiesWithThreeJob:
    work: DiesWithThree
    payloads: list[str]
    alive: Callable[[], None]

    @property
    def again(self) -> bool:
        return (self.work.folder / "died").exists()

    def prepare(self) -> None:
        self.work.prepared += 1

    def train(self) -> None:
        self.work.trainings += 1
        while not self.again and self.work.trainings == 2:
            self.alive()
            if self.work.prepared == 3 and self.work.committing.is_set():
                (self.work.folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)

    def commit(self) -> list[str]:
        self.work.committing.set()
        while not self.again:
            self.alive()
            time.sleep(0.01)
        with (self.work.folder / "log").open("a") as log:
            log.write("".join(f"{payload} {os.getpid()}\n" for payload in self.payloads))
        return [f"did {payload}" for payload in self.payloads]


@dataclass(frozen=True)
class MakeDiesWithThree:
    folder: str

    def __call__(self) -> DiesWithThree:
        return DiesWithThree(Path(self.folder))


@dataclass(frozen=True)
class MakeAway:
    """Making the work fails the first `times` times, over all processes: storage that is away for a while."""

    log: str
    tries: str
    times: int

    def __call__(self) -> Slow:
        for number in range(self.times):
            try:
                Path(self.tries, str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            raise OSError("the storage is away")
        return Slow(self.log)


class Run:
    """A fan-out over named tasks, with a fault that strikes when some outcomes are there."""

    def __init__(self, folder: Path, names: list[str], fault: Callable[["Run"], None] = lambda run: None) -> None:
        self.folder = folder
        self.names = names
        self.fault = fault
        self.outcomes: list[tuple[str, Any]] = []
        self.events: Counter[Event] = Counter()
        self.struck = threading.Event()

    def work_off(
        self, *, workers: Workers | None = None, make: Callable[[], Any] | None = None, stall: float = 60.0
    ) -> None:
        fan_out(
            self.tasks(),
            make or MakeSlow(str(self.folder / "log")),
            workers=workers or Workers(2, 2),
            on_outcome=self.on_outcome,
            on_events=self.events.update,
            storage=(LocalFileSystem(), str(self.folder / "train")),
            stall_seconds=stall,
            window=12,
        )

    def tasks(self) -> Iterator[Task]:
        return (Task(name, name) for name in self.names)

    def on_outcome(self, task: Task, outcome: Any) -> None:
        self.outcomes.append((task.key, outcome))
        # Both workers have finished something by then, and there is work left for each.
        if len(self.outcomes) >= 6 and len(self.pids()) == 2 and not self.struck.is_set():
            self.struck.set()
            self.fault(self)

    def pids(self) -> list[int]:
        return sorted({int(line.split()[1]) for line in (self.folder / "log").read_text().splitlines()})


NAMES = [f"task-{number}" for number in range(24)]


def assert_all_done_once(run: Run) -> None:
    assert run.struck.is_set()
    assert sorted(run.outcomes) == sorted((name, f"did {name}") for name in NAMES)


def test_a_killed_worker_loses_only_its_lease(cluster: str, tmp_path: Path) -> None:
    workers, lines_before = [], []

    def kill_one(run: Run) -> None:
        workers.extend(run.pids())
        lines_before.extend((tmp_path / "log").read_text().splitlines())
        os.kill(workers[0], signal.SIGKILL)

    run = Run(tmp_path, NAMES, kill_one)
    run.work_off()
    assert_all_done_once(run)
    # The survivor kept its process and went on working.
    lines_after = (tmp_path / "log").read_text().splitlines()[len(lines_before) :]
    assert any(line.endswith(f" {workers[1]}") for line in lines_after)
    assert run.events["worker_died"] == 1
    # It held up to three: one in each stage.
    assert 1 <= run.events["leased"] + run.events["leased_again"] - run.events["finished"] <= 3
    assert run.events.keys() == {"leased", "leased_again", "finished", "worker_died"}


def test_a_worker_killed_with_three_leases_in_hand_loses_none(cluster: str, tmp_path: Path) -> None:
    run = Run(tmp_path, NAMES[:10])
    run.work_off(workers=Workers(1, 1), make=MakeDiesWithThree(str(tmp_path)))
    assert sorted(run.outcomes) == sorted((name, f"did {name}") for name in NAMES[:10])
    assert run.events["worker_died"] == 1
    assert run.events["leased"] + run.events["leased_again"] == run.events["finished"] + 3
    assert sorted(line.split()[0] for line in (tmp_path / "log").read_text().splitlines()) == sorted(NAMES[:10])


def test_a_killed_queue_is_filled_again(cluster: str, tmp_path: Path) -> None:
    def kill_queue(run: Run) -> None:
        (queue,) = ray_processes("ray::QueueActor")
        queue.kill()

    run = Run(tmp_path, NAMES, kill_queue)
    run.work_off()
    assert_all_done_once(run)
    # The workers outlived the queue, and kept what they held.
    assert len(run.pids()) == 2
    assert len((tmp_path / "log").read_text().splitlines()) == len(NAMES)
    assert run.events["queue_died"] == 1


def test_a_worker_that_stands_still_is_replaced(cluster: str, tmp_path: Path) -> None:
    stopped = []

    def stop_one(run: Run) -> None:
        stopped.append(psutil.Process(run.pids()[0]))
        stopped[0].suspend()

    run = Run(tmp_path, NAMES, stop_one)
    run.work_off(stall=4.0)
    assert_all_done_once(run)
    assert_nothing_left_running()
    assert not stopped[0].is_running() or stopped[0].status() == psutil.STATUS_ZOMBIE
    assert run.events["worker_silent"] == 1


def test_tasks_that_take_their_workers_down_are_given_up_alone(cluster: str, tmp_path: Path) -> None:
    run = Run(tmp_path, ["a", "b", "poison", "c", "d", "broken", "e"])
    run.work_off()
    outcomes = dict(run.outcomes)
    assert len(run.outcomes) == 7
    lost = {name: outcomes.pop(name) for name in ("poison", "broken")}
    assert all(isinstance(outcome, Lost) and "3 attempts" in outcome.message for outcome in lost.values())
    assert "ValueError: cannot do this" in lost["broken"].message
    assert run.events["worker_died"] >= 2
    assert run.events["work_failed"] >= 2
    assert outcomes == {name: f"did {name}" for name in "abcde"}


def test_an_elastic_number_of_workers(cluster: str, tmp_path: Path) -> None:
    run = Run(tmp_path, NAMES)
    run.work_off(workers=Workers(1, 2))
    assert sorted(name for name, _ in run.outcomes) == sorted(NAMES)


def test_workers_that_can_not_start_are_an_error_that_says_why(cluster: str, tmp_path: Path) -> None:
    run = Run(tmp_path, NAMES)
    with pytest.raises(ObjdriveError, match=r"\d+ task\(s\) were left undone.*: ValueError: no such base"):
        run.work_off(make=MakeSlow(str(tmp_path / "log"), failure="no such base"))
    assert run.outcomes == []
    assert run.events == {"worker_not_started": 2 * MAX_STARTS}


def test_a_source_of_tasks_that_fails_does_not_lose_those_before(cluster: str, tmp_path: Path) -> None:
    class Failing(Run):
        def tasks(self) -> Iterator[Task]:
            yield from (Task(name, name) for name in "abcd")
            raise ObjdriveError("part-7.parquet is truncated")

    run = Failing(tmp_path, [])
    with pytest.raises(ObjdriveError, match=r"part-7\.parquet is truncated"):
        run.work_off()
    assert sorted(name for name, _ in run.outcomes) == list("abcd")


def test_workers_whose_work_can_not_be_made_for_a_while_are_tried_again(cluster: str, tmp_path: Path) -> None:
    run = Run(tmp_path, NAMES)
    # More than the tries of two processes, so that one at least is replaced.
    (tmp_path / "tries").mkdir()
    run.work_off(make=MakeAway(str(tmp_path / "log"), str(tmp_path / "tries"), times=7))
    assert sorted(name for name, _ in run.outcomes) == sorted(NAMES)
    assert len(list((tmp_path / "tries").iterdir())) == 7
    assert len(run.pids()) == 2


def test_training_that_fails_while_tasks_are_still_read_is_an_error_at_once(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    class Fails(fanout.PerWorkerTrainer):
        def fit(self) -> None:
            raise RuntimeError("the controller died")

    class Reading(Run):
        def tasks(self) -> Iterator[Task]:
            over.wait()
            yield Task("late", "late")

    monkeypatch.setattr(fanout, "PerWorkerTrainer", Fails)
    try:
        with pytest.raises(ObjdriveError, match="had not been read yet: the controller died"):
            Reading(tmp_path, []).work_off()
    finally:
        over.set()
