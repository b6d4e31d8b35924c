"""A worker's leases, one behind the other: while one trains, the next is prepared and the one before is committed.

The training stays in the caller's thread, and is the only stage that uses the device and the base: their hooks are not
safe for threads. So a worker holds three leases at most, and each is beaten for its own progress alone. One that waits
for the next stage is beaten by the thread that waits; what it waits for is not.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

from jobs.leases import LeaseLostError

_WAIT_SECONDS = 1.0
_AHEAD_POLLS = 25


class Job(Protocol):
    """The work of one lease. Its stages follow one another; those of several leases overlap."""

    def prepare(self) -> None:
        """Do what needs neither device nor base, before the training."""

    def train(self) -> None:
        """Do what needs the device or the base."""

    def commit(self) -> list[Any]:
        """Do what needs neither, after the training; returns one outcome per payload."""


class InHand(Protocol):
    """A lease that the worker holds."""

    job: Job

    def waits(self) -> None:
        """Say that the lease waits for its next stage.

        Raises:
            LeaseLostError: its tasks are another worker's by now.
        """

    def finish(self, outcomes: list[Any]) -> None:
        """Deliver what came of it."""

    def abandon(self, error: Exception) -> None:
        """Give it up, because its own work failed as a whole."""

    def give_back(self) -> None:
        """Give it up, because this worker ends for another lease's sake."""

    def drop(self) -> None:
        """Forget it: it is another worker's."""


Take = Callable[[bool], InHand | Literal["wait", "done"]]
"""Takes a lease; called with whether it is ahead of one that trains."""


def work_off(take: Take, *, poll_seconds: float) -> None:
    """Work off leases until all is done.

    A lease that is lost is dropped at its next step, in whatever stage it is. A stage that fails ends its own lease,
    and no further ones are taken or begin their training; of the others, those that have begun it are finished, and one
    that waits for it is given back.

    Args:
        take: where leases come from.
        poll_seconds: between two tries when there is none.

    Raises:
        Exception: what a stage, or `take`, raised first.
    """
    _Line(take, poll_seconds).run()


class _Line:
    def __init__(self, take: Take, poll_seconds: float) -> None:
        self._take = take
        self._poll_seconds = poll_seconds
        self._prepared, self._trained = _Handover(), _Handover()
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._failures: list[BaseException] = []
        # Each is written by one thread only.
        self._trainings_begun = self._trainings_ended = 0

    def run(self) -> None:
        loops = (self._prepare_all, self._commit_all)
        threads = [threading.Thread(target=self._guarded, args=(loop,), daemon=True) for loop in loops]
        for thread in threads:
            thread.start()
        self._guarded(self._train_all)
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failures.append(error)
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        self._wake.set()

    def _prepare_all(self) -> None:
        try:
            while not self._stopping.is_set():
                ahead = self._trainings_begun > self._trainings_ended
                lease = self._take(ahead)
                if lease == "done":
                    return
                if isinstance(lease, str):
                    # At the end of a run all workers ask in vain, and one queue answers them.
                    self._wake.wait(_AHEAD_POLLS * self._poll_seconds if ahead else self._poll_seconds)
                    self._wake.clear()
                elif _through(lease, lease.job.prepare) and _passed_on(lease, self._prepared):
                    self._trainings_begun += 1
        finally:
            self._prepared.close()

    def _train_all(self) -> None:
        try:
            while not self._stopping.is_set() and (lease := self._prepared.take()) is not None:
                if _through(lease, lease.job.train):
                    _passed_on(lease, self._trained)
                self._trainings_ended += 1
                self._wake.set()
        finally:
            self._stop()
            self._prepared.close()
            self._trained.close()

    def _commit_all(self) -> None:
        try:
            while (lease := self._trained.take()) is not None:
                try:
                    _through(lease, partial(_commit, lease))
                except Exception as error:
                    # What has been trained meanwhile is committed all the same.
                    self._fail(error)
        finally:
            self._trained.close()


def _through(lease: InHand, stage: Callable[[], None]) -> bool:
    """Whether the lease came through a stage; else it is another worker's."""
    try:
        stage()
    except LeaseLostError:
        lease.drop()
        return False
    except Exception as error:
        lease.abandon(error)
        raise
    return True


def _commit(lease: InHand) -> None:
    lease.finish(lease.job.commit())


def _passed_on(lease: InHand, handover: "_Handover") -> bool:
    """Whether the next stage took the lease; else it is given up."""
    try:
        taken = handover.give(lease)
    except LeaseLostError:
        lease.drop()
        return False
    if not taken:
        lease.give_back()
    return taken


class _Handover:
    """Where one stage gives a lease to the next: one at a time, and from hand to hand."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._offered: InHand | None = None
        self._closed = False

    def give(self, lease: InHand) -> bool:
        """Wait until it is taken; False if nothing is taken any more.

        Raises:
            LeaseLostError: it was another worker's before it was taken.
        """
        with self._changed:
            self._offered = lease
            self._changed.notify_all()
            try:
                while self._offered is lease and not self._closed:
                    if not self._changed.wait(_WAIT_SECONDS):
                        lease.waits()
                return self._offered is not lease
            finally:
                if self._offered is lease:
                    self._offered = None

    def take(self) -> InHand | None:
        """Wait for a lease; None if none follows."""
        with self._changed:
            self._changed.wait_for(lambda: self._offered is not None or self._closed)
            lease, self._offered = self._offered, None
            self._changed.notify_all()
            return lease

    def close(self) -> None:
        """Give or take no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
