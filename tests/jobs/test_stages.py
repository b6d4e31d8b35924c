"""A worker's line of leases, with stages that wait for one another's events: none waits for luck."""

import threading
import time
from collections import Counter, defaultdict

import pytest

from jobs import stages
from jobs.leases import Lease, LeaseLostError, LeaseQueue, Task
from jobs.stages import work_off

LONG = 20.0


class Bench:
    """Leases by name, what becomes of them, and when: ``(name, what)`` is an event of each."""

    def __init__(self, names, *, after=None, raising=None):
        self.names = list(names)
        self.after = after or {}
        """Of a stage: an event that it waits for, before it ends."""
        self.raising = raising or {}
        """Of a stage: what it raises."""
        self.happened = defaultdict(threading.Event)
        self.log = []
        self.asked = []
        self.in_hand = 0
        self.most = 0
        self.lock = threading.Lock()

    def take(self, ahead):
        self.asked.append(ahead)
        if not self.names:
            return "done" if self.in_hand == 0 else "wait"
        name = self.names.pop(0)
        if name in self.raising:
            raise self.raising[name]
        with self.lock:
            self.in_hand += 1
            self.most = max(self.most, self.in_hand)
        return OnBench(self, name)

    def note(self, name, what):
        with self.lock:
            self.log.append((name, what))
        self.happened[name, what].set()

    def wait_for(self, event):
        assert self.happened[event].wait(LONG), event

    def run(self):
        work_off(self.take, poll_seconds=0.01)
        return self.ends()

    def ends(self):
        return {name: what for name, what in self.log if what in ("finished", "abandoned", "given back", "dropped")}


class OnBench:
    """A lease, and its own job."""

    def __init__(self, bench, name):
        self.bench = bench
        self.name = name
        self.job = self
        self.waited = 0

    def prepare(self):
        self._stage("prepared")

    def train(self):
        self.bench.note(self.name, "training")
        self._stage("trained")

    def commit(self):
        self.bench.note(self.name, "committing")
        self._stage("committed")
        return [self.name]

    def _stage(self, what):
        if event := self.bench.after.get((self.name, what)):
            self.bench.wait_for(event)
        if error := self.bench.raising.get((self.name, what)):
            raise error
        self.bench.note(self.name, what)

    def waits(self):
        self.waited += 1
        self.bench.note(self.name, f"waited {self.waited}")
        if error := self.bench.raising.get((self.name, "waiting")):
            raise error

    def finish(self, outcomes):
        assert outcomes == [self.name]
        self._end("finished")

    def abandon(self, error):
        self._end("abandoned")

    def give_back(self):
        self._end("given back")

    def drop(self):
        self._end("dropped")

    def _end(self, what):
        with self.bench.lock:
            self.bench.in_hand -= 1
        self.bench.note(self.name, what)


def test_while_one_trains_the_next_is_prepared_and_the_one_before_is_committed():
    # Each of these would wait for ever if its neighbours' stages had to wait for it.
    overlaps = {
        ("b", "trained"): ("c", "prepared"),
        ("a", "committed"): ("c", "prepared"),
        ("c", "trained"): ("d", "prepared"),
        ("b", "committed"): ("d", "prepared"),
    }
    bench = Bench("abcd", after=overlaps)
    assert bench.run() == dict.fromkeys("abcd", "finished")
    assert bench.most == 3
    for name in "abcd":
        stages = [what for one, what in bench.log if one == name and not what.startswith("waited")]
        assert stages == ["prepared", "training", "trained", "committing", "committed", "finished"]
    trained = [name for name, what in bench.log if what == "training"]
    assert trained == list("abcd")


def test_the_first_lease_is_not_ahead_and_one_beside_a_training_is():
    bench = Bench("ab", after={("a", "trained"): ("b", "prepared")})
    bench.run()
    assert bench.asked[:2] == [False, True]


def test_who_gets_nothing_ahead_asks_again_when_its_training_ends(monkeypatch):
    # Long past the test's end, if it were for the next poll.
    monkeypatch.setattr(stages, "_AHEAD_POLLS", 10**6)
    bench = Bench("abc")
    take = bench.take
    bench.take = lambda ahead: "wait" if ahead else take(ahead)
    assert bench.run() == dict.fromkeys("abc", "finished")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(stages, "_WAIT_SECONDS", 0.01)


def test_a_lease_that_waits_says_so_and_speaks_for_no_other(quick):
    bench = Bench("ab", after={("a", "trained"): ("b", "waited 3")})
    bench.run()
    assert ("b", "waited 3") in bench.log
    training = bench.log[bench.log.index(("a", "training")) : bench.log.index(("a", "trained"))]
    assert not [what for name, what in training if name == "a" and what.startswith("waited")]


@pytest.mark.parametrize("stage", ["prepared", "trained", "committed"])
def test_a_lost_lease_is_dropped_in_whatever_stage_and_the_others_go_on(stage):
    bench = Bench("abc", raising={("b", stage): LeaseLostError()})
    assert bench.run() == {"a": "finished", "b": "dropped", "c": "finished"}


def test_a_lease_that_is_lost_while_it_waits_is_dropped_before_it_trains(quick):
    bench = Bench(
        "abc", after={("a", "trained"): ("b", "dropped")}, raising={("b", "waiting"): LeaseLostError()}
    )  # fmt: skip
    assert bench.run() == {"a": "finished", "b": "dropped", "c": "finished"}
    assert ("b", "training") not in bench.log


def broken(bench):
    with pytest.raises(ValueError, match="broken"):
        bench.run()
    return bench.ends()


def test_what_fails_ahead_ends_only_its_own_lease():
    bench = Bench(
        "abcd",
        after={("b", "trained"): ("c", "abandoned"), ("a", "committed"): ("c", "abandoned")},
        raising={("c", "prepared"): ValueError("broken")},
    )
    assert broken(bench) == {"a": "finished", "b": "finished", "c": "abandoned"}
    assert bench.names == ["d"]


def test_after_a_training_that_fails_none_is_begun_and_what_was_trained_is_committed():
    bench = Bench(
        "abcd",
        after={("b", "trained"): ("c", "prepared"), ("a", "committed"): ("b", "abandoned")},
        raising={("b", "trained"): ValueError("broken")},
    )
    assert broken(bench) == {"a": "finished", "b": "abandoned", "c": "given back"}
    assert bench.names == ["d"]


def test_after_a_commit_that_fails_what_is_in_training_is_committed(quick):
    bench = Bench(
        "abcd",
        after={("a", "committed"): ("c", "prepared"), ("b", "trained"): ("a", "abandoned")},
        raising={("a", "committed"): ValueError("broken")},
    )
    assert broken(bench) == {"a": "abandoned", "b": "finished", "c": "given back"}


def test_a_queue_that_fails_ends_the_line_when_what_is_in_hand_is_done():
    bench = Bench(["a", "gone"], raising={"gone": ValueError("broken")})
    assert broken(bench) == {"a": "finished"}


class Worker:
    """A rank on a real queue: what it holds, and a job that notes its stages. It fails in the stages of `failing`."""

    def __init__(self, rank, queue, lock, failing=()):
        self.rank = rank
        self.queue = queue
        self.lock = lock
        self.failing = failing
        self.held = set()
        self.done = []

    def ask(self, method, *arguments, **options):
        with self.lock:
            return getattr(self.queue, method)(*arguments, **options)

    def take(self, ahead):
        lease = self.ask("lease", self.rank, 2, self, held=tuple(self.held), ahead=ahead)
        return OfWorker(self, lease) if isinstance(lease, Lease) else lease


class OfWorker:
    def __init__(self, worker, lease):
        self.worker = worker
        self.lease = lease
        self.keys = [task.key for task in lease.tasks]
        self.job = self
        worker.held.add(lease.id)

    def prepare(self):
        self.stage("prepare")

    def train(self):
        self.stage("train")

    def commit(self):
        self.stage("commit")
        self.worker.done += self.keys
        return self.keys

    def stage(self, name):
        if any((name, key) in self.worker.failing for key in self.keys):
            raise ValueError(f"{name} of {self.keys}")
        if not self.worker.ask("beat", self.lease.id, self.worker.rank, self.keys, self.worker):
            raise LeaseLostError

    def waits(self):
        self.stage("wait")

    def finish(self, outcomes):
        self.end("finish", dict(zip(self.keys, outcomes, strict=True)))

    def abandon(self, error):
        self.end("abandon", str(error))

    def give_back(self):
        self.end("give_back")

    def drop(self):
        self.worker.held.discard(self.lease.id)

    def end(self, method, *arguments):
        self.worker.ask(method, self.lease.id, *arguments)
        self.drop()


@pytest.mark.parametrize("stage", ["", "prepare", "train", "commit"])
def test_lines_on_one_queue_do_every_task_once_and_one_that_always_fails_is_given_up(stage):
    names = [f"task-{number:02}" for number in range(40)]
    lock, done = threading.Lock(), []
    queue = LeaseQueue(workers=3, stall_seconds=60, clock=time.monotonic)
    queue.offer([Task(name, name) for name in names], last=True)

    def rank(number):
        # As Ray Train does, with another process in place of one that failed.
        while True:
            worker = Worker(number, queue, lock, failing={(stage, "task-07")})
            try:
                work_off(worker.take, poll_seconds=0.001)
            except ValueError:
                continue
            finally:
                done.extend(worker.done)
            return

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(60)
        assert not one.is_alive()
    lost = {"task-07"} if stage else set()
    outcomes = queue.collect([]).outcomes
    assert outcomes.keys() == set(names)
    assert {name for name, outcome in outcomes.items() if outcome != name} == lost
    assert Counter(done) == Counter(set(names) - lost)
