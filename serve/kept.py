"""Drawings that outlast a client's patience: proxies give up on an answer after a minute or two, drawings go on.

Whoever asks again with the same fields and seed gets the picture, or waits for the drawing that is under way.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, fields
from typing import Any

from objdrive.sampling.requests import DrawRequest
from serve.drawing import FinishedPicture
from serve.errors import ApiError
from serve.finishing import Finish

PROXY_SECONDS = 55.0
"""Of the proxies that are met often, the least patient one gives up after 60 seconds."""
KEPT_SECONDS = 600.0
_MAX_BYTES = 64 * 2**20

Pictures = list[FinishedPicture]


@dataclass(eq=False)
class Work:
    """A request's pictures, finished or under way; `task` is None once it has failed and that was told."""

    task: "asyncio.Task[Pictures] | None"
    began: float
    waiting: int = 0
    ended: float | None = None

    @property
    def size(self) -> int:
        """Bytes of its pictures; 0 while they are drawn."""
        return 0 if self.ended is None or self.task is None else sum(len(one.data) for one in self.task.result())


class Kept:
    """Drawings that took longer than `proxy_seconds`, for ten minutes, 64 MiB of them. For one event loop.

    Args:
        proxy_seconds: a client that goes away earlier has changed its mind: its drawing ends.
        clock: seconds, never running backwards.
    """

    def __init__(self, *, proxy_seconds: float = PROXY_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._proxy_seconds = proxy_seconds
        self._clock = clock
        self._works: OrderedDict[str, Work] = OrderedDict()

    def find(self, name: str) -> Work | None:
        """The drawing of this name, if it has outlasted a proxy."""
        self._forget_old()
        work = self._works.get(name)
        return work if work and self._outlasted(work) else None

    def begin(self, name: str, drawing: Coroutine[Any, Any, Pictures]) -> Work:
        """Draw; the pictures are kept if that takes long."""
        task = asyncio.ensure_future(drawing)
        work = Work(task, self._clock())
        self._works.setdefault(name, work)
        task.add_done_callback(lambda task: self._ended(name, work, task))
        return work

    async def wait(self, work: Work) -> Pictures:
        """The pictures. Whoever stops waiting early, and was the last to wait, ends the drawing."""
        if work.task is None:
            raise ApiError("unavailable", "the drawing has failed: ask again")
        task = work.task
        work.waiting += 1
        try:
            return await asyncio.shield(task)
        finally:
            work.waiting -= 1
            if not work.waiting and not task.done() and not self._outlasted(work):
                task.cancel()
            if _failed(task):
                # Its exception has the frames of all that wait here, and these have the work: they would keep each
                # other, and the picture of an edit with them, until the next full collection.
                work.task = None
            del work, task

    def _outlasted(self, work: Work) -> bool:
        until = self._clock() if work.ended is None else work.ended
        return until - work.began >= self._proxy_seconds

    def _ended(self, name: str, work: Work, task: "asyncio.Task[Pictures]") -> None:
        if _failed(task):
            if self._works.get(name) is work:
                del self._works[name]
            return
        work.ended = self._clock()
        if self._works.get(name) is work and not self._outlasted(work):
            del self._works[name]
        self._forget_old()

    def _forget_old(self) -> None:
        ended = [(name, work) for name, work in self._works.items() if work.ended is not None]
        size = sum(work.size for _, work in ended)
        for name, work in ended:
            assert work.ended is not None
            if size > _MAX_BYTES or self._clock() - work.ended > KEPT_SECONDS:
                size -= work.size
                del self._works[name]


def _failed(task: "asyncio.Task[Pictures]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def name_of(draws: Sequence[DrawRequest], finish: Finish) -> str:
    """The same for requests that get the same pictures, to the file's bytes."""
    wanted: list[Any] = [finish.format, finish.quality, finish.transparent, finish.given, finish.exact]
    # Of a canvas, `given` tells.
    wanted += [getattr(draw, field.name) for draw in draws for field in fields(draw) if field.name != "canvas"]
    return hashlib.sha256(repr(wanted).encode()).hexdigest()
