"""The lease queue with a clock of the test's own; and in a small world where ranks and queues die at random."""

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from jobs.leases import MAX_ATTEMPTS, MAX_LOSSES, Death, Lease, LeaseQueue, Lost, Task

STALL = 30.0


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_queue(clock):
    def make(names="", *, last=True, workers=1, **options):
        queue = LeaseQueue(workers=workers, stall_seconds=STALL, clock=clock, **options)
        queue.offer(tasks(names), last=last)
        return queue

    return make


def tasks(names):
    return [Task(name, f"payload of {name}") for name in names]


def names(lease):
    assert isinstance(lease, Lease), lease
    return "".join(task.key for task in lease.tasks)


def finish(queue, lease):
    queue.finish(lease.id, {task.key: f"did {task.key}" for task in lease.tasks})


def did(names):
    return {name: f"did {name}" for name in names}


def outcomes(queue, received=()):
    return queue.collect(received).outcomes


# Leasing


def test_every_task_is_leased_once(make_queue):
    queue = make_queue("abcdefg")
    leased = ""
    while (lease := queue.lease(0, 3)) != "done":
        leased += names(lease)
        finish(queue, lease)
    assert leased == "abcdefg"
    assert outcomes(queue) == did("abcdefg")


def test_a_lease_carries_the_tasks_as_offered(make_queue):
    assert make_queue("ab").lease(0, 2).tasks == tuple(tasks("ab"))


def test_ranks_hold_different_tasks(make_queue):
    queue = make_queue("abcdefgh", workers=2)
    assert [names(queue.lease(rank, 4)) for rank in (0, 1)] == ["abcd", "efgh"]


def test_an_abandoned_lease_is_tried_again_task_by_task_and_keeps_its_cause(make_queue):
    queue = make_queue("ab")
    lease = queue.lease(0, 2)
    queue.abandon(lease.id, "ValueError: bad a")
    for _ in range(MAX_ATTEMPTS - 1):
        lease = queue.lease(0, 2)
        assert names(lease) == "a"
        queue.abandon(lease.id, "ValueError: bad a")
    finish(queue, queue.lease(0, 2))
    assert queue.lease(0, 2) == "done"
    found = outcomes(queue)
    assert "ValueError: bad a" in found.pop("a").message
    assert found == did("b")


def test_known_tasks_are_not_taken_twice(make_queue):
    queue = make_queue("abc")
    finished, held = queue.lease(0, 1), queue.lease(1, 1)
    finish(queue, finished)
    queue.offer(tasks("abc"))
    assert names(queue.lease(2, 3)) == "c"
    finish(queue, held)
    assert queue.lease(0, 3) == "wait"


def test_the_tail_is_shared_by_the_workers(make_queue):
    queue = make_queue("abcdefghij", workers=4)
    assert [names(queue.lease(rank, 4)) for rank in range(4)] == ["abc", "def", "ghi", "j"]


def test_the_tail_is_shared_by_more_ranks_than_were_expected(make_queue):
    queue = make_queue("abcdef", workers=1)
    for rank in (1, 2):
        queue.lease(rank, 1)
    assert names(queue.lease(0, 4)) == "cd"


# Waiting and being done


def test_ranks_wait_for_a_whole_group_while_tasks_still_come(make_queue):
    queue = make_queue("ab", last=False)
    assert queue.lease(0, 3) == "wait"
    queue.offer(tasks("c"))
    assert names(queue.lease(0, 3)) == "abc"


def test_nobody_waits_for_a_whole_group_once_the_last_tasks_came(make_queue):
    queue = make_queue("ab", last=False)
    assert queue.lease(0, 3) == "wait"
    queue.offer([], last=True)
    assert names(queue.lease(0, 3)) == "ab"


def test_done_is_said_only_when_nothing_can_come_back(make_queue):
    queue = make_queue("a")
    lease = queue.lease(0, 1)
    assert queue.lease(1, 1) == "wait"
    finish(queue, lease)
    assert queue.lease(1, 1) == "done"


def test_an_empty_queue_waits_for_tasks_until_the_last_came(make_queue):
    queue = make_queue(last=False)
    assert queue.lease(0, 1) == "wait"
    queue.offer([], last=True)
    assert queue.lease(0, 1) == "done"


# Finishing


def test_outcomes_are_told_until_they_are_received(make_queue):
    queue = make_queue("abc")
    finish(queue, queue.lease(0, 2))
    assert outcomes(queue) == outcomes(queue) == did("ab")
    finish(queue, queue.lease(0, 1))
    assert outcomes(queue, received="ab") == did("c")
    assert outcomes(queue, received="c") == {}


def test_tasks_without_an_outcome_come_back(make_queue):
    queue = make_queue("abcd")
    lease = queue.lease(0, 3)
    queue.finish(lease.id, did("b"))
    assert names(queue.lease(0, 4)) == "acd"


def test_what_is_done_counts_although_the_lease_is_void(make_queue, clock):
    queue = make_queue("ab")
    lost = queue.lease(0, 2)
    clock.now += STALL + 1
    assert outcomes(queue) == {}
    finish(queue, lost)
    assert outcomes(queue) == did("ab")
    assert queue.lease(1, 2) == "done"


def test_what_another_rank_holds_by_now_can_be_finished_by_both(make_queue, clock):
    queue = make_queue("a")
    first = queue.lease(0, 1)
    clock.now += STALL + 1
    second = queue.lease(1, 1)
    finish(queue, first)
    assert outcomes(queue) == did("a")
    assert outcomes(queue, received="a") == {}
    queue.finish(second.id, {"a": "did a again"})
    assert queue.lease(1, 1) == "done"


# Several leases in one worker's hands


def test_a_process_keeps_the_leases_that_it_names(make_queue):
    queue = make_queue("abcdef")
    first = queue.lease(0, 2, "process")
    second = queue.lease(0, 2, "process", held=[first.id])
    third = queue.lease(0, 2, "process", held=[first.id, second.id])
    assert [names(lease) for lease in (first, second, third)] == ["ab", "cd", "ef"]
    for lease in (second, first, third):
        finish(queue, lease)
    assert outcomes(queue) == did("abcdef")
    assert queue.lease(0, 2, "process") == "done"


def test_what_a_process_held_and_does_not_name_is_leased_anew(make_queue):
    queue = make_queue("abcd")
    first = queue.lease(0, 2, "process")
    second = queue.lease(0, 2, "process", held=[first.id])
    assert queue.lease(0, 2, "process", held=[second.id]) == "wait"  # a and b are suspect, and leased alone
    finish(queue, second)
    assert names(queue.lease(0, 2, "process")) == "a"


def test_nothing_is_leased_ahead_that_idle_workers_could_take_as_a_group(make_queue):
    queue = make_queue("abcdefghij", workers=2)
    held = queue.lease(0, 3, "one")
    assert names(held) == "abc"
    ahead = queue.lease(0, 3, "one", held=[held.id], ahead=True)
    assert names(ahead) == "def"
    # Four are left: fewer than a group for each of two workers.
    assert queue.lease(0, 3, "one", held=[held.id, ahead.id], ahead=True) == "wait"
    assert names(queue.lease(1, 3, "other")) == "ghi"
    # What it can begin at once it gets all the same.
    assert names(queue.lease(0, 3, "one", held=[held.id, ahead.id])) == "j"


def test_a_task_that_took_a_worker_down_is_the_only_thing_its_worker_holds(make_queue):
    queue = make_queue("abcdef")
    queue.lease(0, 2, "the first")
    suspect = queue.lease(0, 2, "the second")
    assert names(suspect) == "a"
    for ahead in (False, True):
        assert queue.lease(0, 2, "the second", held=[suspect.id], ahead=ahead) == "wait"
    finish(queue, suspect)
    other = queue.lease(1, 2, "another")
    assert names(other) == "b"
    finish(queue, other)
    held = queue.lease(1, 2, "another")
    assert names(held) == "cd"
    assert names(queue.lease(1, 2, "another", held=[held.id])) == "ef"


def test_a_killed_process_loses_all_that_it_held_and_that_counts_as_one_death(make_queue):
    deaths = {}
    queue = make_queue("abcdef", workers=2, death=deaths.get)
    held = []
    for _ in range(3):
        held.append(queue.lease(0, 2, "process", held=[lease.id for lease in held]))
    deaths["process"] = Death("it was killed", suspect=False)
    assert queue.collect(()).in_work == ()
    assert queue.collect(()).events["worker_died"] == 1
    left = ""
    while (lease := queue.lease(1, 2, "another")) != "done":
        left += names(lease)
        finish(queue, lease)
    assert sorted(left) == list("abcdef")
    assert outcomes(queue) == did("abcdef")


def test_silence_in_one_stage_ends_the_process_and_blames_that_lease_alone(make_queue, clock):
    killed = []
    queue = make_queue("abcdef", kill=killed.append)
    hung = queue.lease(0, 2, "process")
    others = [queue.lease(0, 2, "process", held=[hung.id])]
    others.append(queue.lease(0, 2, "process", held=[hung.id, others[0].id]))
    clock.now += STALL - 1
    for lease in others:
        assert queue.beat(lease.id, 0, [task.key for task in lease.tasks], "process")
    clock.now += 2
    assert queue.collect(()).events == {"leased": 3, "worker_silent": 1, "given_back": 2}
    assert killed == ["process"]
    assert not any(queue.beat(lease.id, 0, [task.key for task in lease.tasks], "process") for lease in others)
    leased = []
    while (lease := queue.lease(0, 2, "in its place")) != "done":
        leased.append(names(lease))
        finish(queue, lease)
    assert sorted(leased) == ["a", "b", "cd", "ef"]


def test_a_lease_that_is_given_back_is_leased_as_it_was(make_queue):
    queue = make_queue("abcd")
    lease = queue.lease(0, 2, "process")
    for _ in range(2):
        queue.give_back(lease.id)
    assert names(queue.lease(0, 2, "another")) == "ab"
    assert queue.collect(()).events == {"leased": 2, "given_back": 1}


# Deaths


def test_a_rank_that_asks_anew_gives_its_tasks_back_in_their_order_one_by_one(make_queue):
    queue = make_queue("abcdef")
    assert names(queue.lease(0, 3)) == "abc"
    assert [names(queue.lease(rank, 3)) for rank in range(4)] == ["a", "b", "c", "de"]


def test_a_task_is_given_up_after_three_attempts_and_its_neighbours_are_not(make_queue):
    queue = make_queue("apb")
    queue.lease(0, 3)  # and p kills the worker
    for _ in range(10):
        lease = queue.lease(0, 3)
        if lease == "done":
            break
        if names(lease) != "p":
            finish(queue, lease)
    ended = outcomes(queue)
    lost = ended.pop("p")
    assert ended == did("ab")
    assert lost == Lost("given up after 3 attempts: the worker of rank 0 died")


def test_attempts_are_counted_whatever_rank_they_killed(make_queue, clock):
    queue = make_queue("p")
    for rank in range(MAX_ATTEMPTS):
        assert names(queue.lease(rank, 1)) == "p"
        clock.now += STALL + 1
    assert queue.lease(0, 1) == "done"
    message = f"given up after 3 attempts: the worker of rank {MAX_ATTEMPTS - 1} was silent for 30 s"
    assert outcomes(queue) == {"p": Lost(message)}


def test_the_tasks_of_a_dead_process_are_leased_to_another_at_once(make_queue):
    deaths = {}
    queue = make_queue("ab", workers=2, death=deaths.get)
    assert names(queue.lease(0, 2, "process of rank 0")) == "a"
    finish(queue, queue.lease(1, 2, "process of rank 1"))
    assert queue.lease(1, 2, "process of rank 1") == "wait"
    # Its rank does not come back: Ray Train waits for a node to start it on.
    deaths["process of rank 0"] = Death("its worker process has died", suspect=True)
    assert names(queue.lease(1, 2, "process of rank 1")) == "a"


def test_a_process_that_was_replaced_takes_nothing_from_the_one_in_its_place(make_queue):
    queue = make_queue("ab")
    old = queue.lease(0, 1, "on a node that is cut off")
    new = queue.lease(0, 1, "in its place")
    # The node is back.
    assert not queue.beat(old.id, 0, ["a"], "on a node that is cut off")
    assert queue.lease(0, 1, "on a node that is cut off") == "done"
    assert queue.beat(new.id, 0, ["a"], "in its place")


def test_tasks_that_were_lost_with_their_node_are_leased_together_and_not_given_up_soon(make_queue):
    deaths = {}
    queue = make_queue("ab", death=deaths.get)
    for number in range(MAX_LOSSES - 1):
        assert names(queue.lease(0, 2, number)) == "ab"
        deaths[number] = Death("its node has died", suspect=False)
        assert queue.collect(()).in_work == ()
    assert outcomes(queue) == {}
    assert names(queue.lease(0, 2, "the last")) == "ab"
    deaths["the last"] = Death("its node has died", suspect=False)
    message = f"given up after {MAX_LOSSES} attempts: the worker of rank 0 died: its node has died"
    assert outcomes(queue) == {"a": Lost(message), "b": Lost(message)}
    assert queue.lease(0, 2) == "done"


def test_a_silent_lease_is_void_and_its_process_killed(make_queue, clock):
    killed = []
    queue = make_queue("ab", kill=killed.append)
    queue.lease(0, 2, "process of rank 0")
    clock.now += STALL
    assert (queue.lease(1, 2), killed) == ("wait", [])
    clock.now += 0.1
    assert names(queue.lease(1, 2)) == "a"
    assert killed == ["process of rank 0"]
    assert names(queue.lease(2, 2)) == "b"


def test_the_driver_s_polls_notice_silence_too(make_queue, clock):
    killed = []
    queue = make_queue("a", kill=killed.append)
    queue.lease(0, 1, "process of rank 0")
    clock.now += STALL + 1
    queue.collect([])
    queue.collect([])
    assert killed == ["process of rank 0"]


def test_beats_keep_a_lease(make_queue, clock):
    killed = []
    queue = make_queue("a", kill=killed.append)
    lease = queue.lease(0, 1, "process")
    for _ in range(5):
        clock.now += STALL - 1
        assert queue.beat(lease.id, 0, ["a"], "process")
        assert queue.lease(1, 1) == "wait"
    assert killed == []


def test_a_beat_on_a_void_lease_is_told_so(make_queue, clock):
    queue = make_queue("ab")
    silent = queue.lease(0, 1)
    clock.now += STALL + 1
    again = queue.lease(1, 1)
    assert names(again) == "a"
    assert not queue.beat(silent.id, 0, ["a"])
    finish(queue, again)
    assert not queue.beat(silent.id, 0, ["a"])
    assert outcomes(queue) == did("a")
    assert outcomes(queue, received="a") == {}
    assert not queue.beat(silent.id, 0, ["a"])


def test_a_worker_that_could_not_start_is_told_of(make_queue):
    queue = make_queue("a")
    queue.report_broken(0, "OSError: no such base")
    assert queue.collect([]).broken == ("OSError: no such base",)


def test_a_rank_whose_processes_can_not_start_is_given_up_unless_one_has_started_meanwhile(make_queue):
    queue = make_queue("a")
    assert [queue.report_broken(0, "no") for _ in range(2)] == [True, True]
    assert queue.report_broken(1, "no")
    queue.lease(0, 1)
    assert [queue.report_broken(0, "no") for _ in range(3)] == [True, True, False]


def test_what_is_in_work_is_told_with_its_steps(make_queue):
    queue = make_queue("abc")
    lease, other = queue.lease(0, 1), queue.lease(1, 1)
    assert {(one.keys, one.done, one.of) for one in queue.collect([]).in_work} == {(("a",), 0, 0), (("b",), 0, 0)}
    queue.beat(lease.id, 0, ["a"], done=3, of=9)
    finish(queue, other)
    assert [(one.keys, one.done, one.of) for one in queue.collect([]).in_work] == [(("a",), 3, 9)]


def test_what_befalls_leases_is_counted(make_queue, clock):
    queue = make_queue("abcde", workers=5)
    finish(queue, queue.lease(0, 1))
    queue.lease(0, 1)  # dies with b
    assert names(queue.lease(0, 1)) == "b"
    failed = queue.lease(1, 1)
    for _ in range(2):
        queue.abandon(failed.id, "ValueError: bad c")
    queue.report_broken(2, "no such base")
    clock.now += STALL + 1  # b's second worker is silent
    expected = {"leased": 3, "leased_again": 1, "finished": 1, "worker_died": 1, "work_failed": 1, "worker_silent": 1}
    assert queue.collect([]).events == expected | {"worker_not_started": 1}


# A new incarnation after the queue's death


def test_incarnations_can_be_told_apart(make_queue):
    first, second = make_queue(), make_queue()
    assert first.collect([]).incarnation == first.offer([]) != second.offer([])


def test_nothing_is_leased_before_the_survivors_had_time_to_beat(make_queue, clock):
    queue = make_queue("a", patience=5.0)
    assert queue.lease(0, 1) == "wait"
    clock.now += 5.0
    assert names(queue.lease(0, 1)) == "a"


@pytest.mark.parametrize("order", ["beat offer finish", "offer beat finish", "beat finish offer", "finish offer beat"])
def test_a_survivor_s_lease_is_adopted(make_queue, clock, order):
    held = make_queue("abc").lease(0, 2)
    queue = make_queue(last=False, patience=5.0)
    steps = {
        "beat": lambda: queue.beat(held.id, 0, ["a", "b"]),
        "offer": lambda: queue.offer(tasks("abc"), last=True),
        "finish": lambda: finish(queue, held),
    }
    for step in order.split():
        steps[step]()
    assert outcomes(queue) == did("ab")
    clock.now += 5.0
    assert names(queue.lease(0, 3)) == "c"


def test_an_adopted_lease_is_kept_by_beats_and_void_in_silence(make_queue, clock):
    held = make_queue("ab").lease(0, 2)
    killed = []
    queue = make_queue(last=False, kill=killed.append)
    assert queue.beat(held.id, 0, ["a", "b"], "process of rank 0")
    queue.offer(tasks("ab"), last=True)
    clock.now += STALL - 1
    assert queue.beat(held.id, 0, ["a", "b"], "process of rank 0")
    clock.now += STALL - 1
    assert queue.lease(1, 2) == "wait"
    clock.now += 2
    assert names(queue.lease(1, 2)) == "a"
    assert killed == ["process of rank 0"]
    assert not queue.beat(held.id, 0, ["a", "b"])


def test_an_adopted_lease_whose_rank_dies_before_the_driver_s_offer_is_not_forgotten(make_queue):
    held = make_queue("ab").lease(0, 2)
    queue = make_queue(last=False)
    queue.beat(held.id, 0, ["a", "b"])
    assert queue.lease(0, 2) == "wait"
    queue.offer(tasks("ab"), last=True)
    assert [names(queue.lease(rank, 2)) for rank in (0, 1)] == ["a", "b"]


def test_a_survivor_whose_tasks_are_held_by_another_rank_is_told_so(make_queue):
    held = make_queue("ab").lease(0, 2)
    queue = make_queue("ab")
    assert names(queue.lease(1, 2)) == "ab"
    assert not queue.beat(held.id, 0, ["a", "b"])


# Random worlds


@dataclass
class Call:
    """A method of the queue; `answered` once it was executed."""

    method: str
    arguments: tuple
    options: dict = field(default_factory=dict)
    answered: bool = False
    answer: object = None


@dataclass(eq=False)
class Process:
    """A generator that yields numbers (seconds to sleep) and calls (to wait for)."""

    name: str
    steps: object
    waits_for: Call | None = None
    sleeps_until: float = 0.0
    alive: bool = True


class World:
    """A driver, ranks and a queue, run in random order. Messages of one sender arrive in order, and survive the queue.

    Driver and workers do what `jobs.fanout` and `jobs.stages` do, and the queue that follows a dead one gets the calls
    that the dead one did not execute, as Ray does with an actor that restarts.
    """

    SIZE, WORKERS, WINDOW = 3, 3, 30

    def __init__(self, seed, *, faults, poison=0):
        self.random = random.Random(seed)
        self.clock = Clock()
        self.names = [f"task-{number:02}" for number in range(self.random.randint(1, 40))]
        self.poison = set(self.random.sample(self.names, min(poison, len(self.names))))
        self.faults = self.random.choices(faults, k=self.random.randint(1, 8)) if faults else []
        self.mail: dict[str, deque[Call]] = {}
        self.out: dict[str, Task] = {}
        self.outcomes: dict[str, list] = {name: [] for name in self.names}
        self.fed = False
        self.told: set[str] = set()
        self.left: set[int] = set()
        self.begun: Counter[str] = Counter()
        self.died_of: Counter[str] = Counter()
        self.lost_with_a_queue: Counter[str] = Counter()
        self.holds: dict[str, list[str]] = {}
        self.queue = self._new_queue(patience=0.0)
        self.driver = [self._start("feed", self._feed()), self._start("collect", self._collect())]
        self.workers = [self._start_worker(rank) for rank in range(self.WORKERS)]

    def run(self):
        deadline = self.clock.now + 2000
        while len(self.left) < self.WORKERS:
            assert self.clock.now < deadline, "somebody waits for ever"
            self._step()
        last_polls = self.clock.now + 2
        while self.clock.now < last_polls:
            self._step()

    def _step(self):
        self.clock.now += self.random.uniform(0.0, 0.05)
        if self.faults and self.random.random() < 0.02 and len(self.left) < self.WORKERS:
            self.faults.pop()(self)
        processes = [*self.driver, *self.workers]
        ready = [process for process in processes if self._is_ready(process)]
        senders = [sender for sender, calls in self.mail.items() if calls]
        if not ready and not senders:
            asleep = [p.sleeps_until for p in processes if p.alive and not p.waits_for]
            self.clock.now = max(self.clock.now, min(asleep))
            return
        chosen = self.random.choice([*ready, *senders])
        if isinstance(chosen, str):
            self._deliver(self.mail[chosen].popleft())
        else:
            self._advance(chosen)

    def _is_ready(self, process):
        waiting = process.waits_for is not None and not process.waits_for.answered
        return process.alive and not waiting and process.sleeps_until <= self.clock.now

    def _advance(self, process):
        answer = process.waits_for.answer if process.waits_for else None
        process.waits_for = None
        try:
            asked = process.steps.send(answer)
        except StopIteration:
            process.alive = False
            return
        if isinstance(asked, Call):
            process.waits_for = self._send(process.name, asked)
        else:
            process.sleeps_until = self.clock.now + asked

    def _send(self, sender, call):
        self.mail.setdefault(sender, deque()).append(call)
        return call

    def _deliver(self, call):
        call.answer = getattr(self.queue, call.method)(*call.arguments, **call.options)
        call.answered = True
        if call.method == "finish":
            self.told.update(call.arguments[1])
        if call.method == "lease" and call.answer != "wait":
            self._note_lease(call.arguments[0], call.arguments[2], call.answer)

    def _note_lease(self, rank, process, answer):
        if answer == "done":
            if process.alive:
                self.left.add(rank)
            return
        keys = [task.key for task in answer.tasks]
        if process.alive:
            self.holds.setdefault(process.name, []).extend(keys)
        else:
            self.died_of.update(keys)

    def _start(self, name, steps):
        return Process(name, steps)

    def _new_queue(self, patience):
        return LeaseQueue(
            workers=self.WORKERS, stall_seconds=STALL, clock=self.clock, patience=patience, kill=self._die
        )

    # The driver

    def _feed(self):
        for name in self.names:
            while len(self.out) >= self.WINDOW:
                yield 0.1
            self.out[name] = Task(name, name)
            self._send("feed", Call("offer", ([self.out[name]],)))
            yield self.random.choice([0.0, 0.1, 2.0])
        self.fed = True

    def _collect(self):
        received, incarnation, last_offered = [], "", False
        while True:
            collected = yield Call("collect", (received,))
            received = list(collected.outcomes)
            for key, outcome in collected.outcomes.items():
                if self.out.pop(key, None):
                    self.outcomes[key].append(outcome)
            if collected.incarnation != incarnation or self.fed != last_offered:
                last_offered = self.fed
                incarnation = yield Call("offer", (list(self.out.values()),), {"last": last_offered})
            yield 0.2

    # A rank

    def _start_worker(self, rank):
        process = self._start(f"rank {rank}, {self.random.random()}", None)
        process.steps = self._work(rank, process)
        process.sleeps_until = self.clock.now + self.random.uniform(0, 3)
        return process

    def _work(self, rank, me):
        """Up to three leases, one behind the other; only the first gets on."""
        line, beats, done = [], {}, False
        while line or not done:
            if not done and len(line) < 3:
                ids = [lease.id for lease in line]
                lease = yield Call("lease", (rank, self.SIZE, me), {"held": ids, "ahead": bool(line)})
                done = lease == "done"
                if isinstance(lease, Lease):
                    line.append(lease)
                    self.begun.update(task.key for task in lease.tasks)
            yield self.random.uniform(0.2, 1.0)
            for lease in list(line):
                keys = [task.key for task in lease.tasks]
                if self.poison & set(keys):
                    self._die(me)
                    yield 0.0
                beat = beats.get(lease.id)
                if beat is None or beat.answered:
                    if beat is not None and not beat.answer:
                        line.remove(lease)
                        self._let_go(me, keys)
                        continue
                    beats[lease.id] = self._send(me.name, Call("beat", (lease.id, rank, keys, me)))
            if line and self.random.random() < 0.3:
                lease = line.pop(0)
                keys = [task.key for task in lease.tasks]
                yield Call("finish", (lease.id, {key: f"did {key}" for key in keys}))
                self._let_go(me, keys)

    def _let_go(self, me, keys):
        self.holds[me.name] = [key for key in self.holds[me.name] if key not in keys]

    # Faults

    def _die(self, process):
        if process not in self.workers or not process.alive:
            return
        process.alive = False
        self.died_of.update(self.holds.pop(process.name, []))
        if self.random.random() < 0.5:
            self.mail.pop(process.name, None)
        rank = self.workers.index(process)
        self.left.discard(rank)
        self.workers[rank] = self._start_worker(rank)

    def kill_rank(self):
        self._die(self.random.choice(self.workers))

    def stop_rank(self):
        """As SIGSTOP does, for shorter or longer than the queue bears."""
        self.random.choice(self.workers).sleeps_until = self.clock.now + self.random.uniform(5, 3 * STALL)

    def kill_queue(self):
        self.lost_with_a_queue.update(self.told & self.out.keys())
        self.told.clear()
        self.queue = self._new_queue(patience=5.0)


@pytest.mark.parametrize("first_seed", range(0, 120, 30))
def test_a_world_without_faults_does_every_task_once(first_seed):
    for seed in range(first_seed, first_seed + 30):
        world = World(seed, faults=[])
        world.run()
        assert world.outcomes == {name: [f"did {name}"] for name in world.names}, seed
        assert world.begun == Counter(world.names), seed


def test_workers_that_hold_three_leases_are_not_taken_down_by_others_tasks_twice():
    for seed in range(60):
        world = World(seed, faults=[], poison=2)
        world.run()
        innocent = [name for name in world.names if name not in world.poison]
        assert all(world.outcomes[name] == [f"did {name}"] for name in innocent), seed
        assert all(world.died_of[name] <= 1 for name in innocent), seed
        assert all(isinstance(world.outcomes[name][0], Lost) for name in world.poison), seed


@pytest.mark.parametrize("first_seed", range(0, 300, 50))
def test_queues_that_die_cost_at_most_what_they_alone_knew(first_seed):
    for seed in range(first_seed, first_seed + 50):
        world = World(seed, faults=[World.kill_queue])
        world.run()
        assert world.outcomes == {name: [f"did {name}"] for name in world.names}, seed
        assert world.begun <= Counter(world.names) + world.lost_with_a_queue, seed


@pytest.mark.parametrize("first_seed", range(0, 400, 50))
def test_whatever_dies_every_task_ends_once_and_nobody_waits_for_ever(first_seed):
    for seed in range(first_seed, first_seed + 50):
        world = World(seed, faults=[World.kill_queue, World.kill_rank, World.stop_rank], poison=2)
        world.run()
        for name in world.names:
            (outcome,) = world.outcomes[name]
            if name in world.poison:
                assert isinstance(outcome, Lost), (seed, name)
            elif isinstance(outcome, Lost):
                assert world.died_of[name] >= MAX_ATTEMPTS, (seed, name)
            else:
                assert outcome == f"did {name}", (seed, name)
