"""Ctrl-C and SIGTERM as an exception, so that a run can say how far it has come."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process was asked to end; `exit_status` is what a shell reports for the signal, 130 or 143."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Have the first SIGINT or SIGTERM raise `Interrupted` in the main thread, which must call this.

    A second one ends the process at once.
    """
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}

    def interrupt(signum: int, frame: FrameType | None) -> None:
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        raise Interrupted(signum)

    for signum in _SIGNALS:
        signal.signal(signum, interrupt)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
