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
from serve.finishing import Finish

PROXY_SECONDS = 55.0
"""Of the proxies that are met often, the least patient one gives up after 60 seconds."""
KEPT_SECONDS = 600.0
_MAX_BYTES = 64 * 2**20

Pictures = list[FinishedPicture]


@dataclass(eq=False)
class Work:
    """A request's pictures, finished or under way."""

    task: "asyncio.Task[Pictures]"
    began: float
    waiting: int = 0
    ended: float | None = None

    @property
    def size(self) -> int:
        """Bytes of its pictures; 0 while they are drawn."""
        return 0 if self.ended is None else sum(len(picture.data) for picture in self.task.result())


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
        work = Work(asyncio.ensure_future(drawing), self._clock())
        self._works.setdefault(name, work)
        work.task.add_done_callback(lambda task: self._ended(name, work))
        return work

    async def wait(self, work: Work) -> Pictures:
        """The pictures. Whoever stops waiting early, and was the last to wait, ends the drawing."""
        work.waiting += 1
        try:
            return await asyncio.shield(work.task)
        finally:
            work.waiting -= 1
            if not work.waiting and not work.task.done() and not self._outlasted(work):
                work.task.cancel()

    def _outlasted(self, work: Work) -> bool:
        until = self._clock() if work.ended is None else work.ended
        return until - work.began >= self._proxy_seconds

    def _ended(self, name: str, work: Work) -> None:
        failed = work.task.cancelled() or work.task.exception() is not None
        if failed:
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


def name_of(draws: Sequence[DrawRequest], finish: Finish) -> str:
    """The same for requests that get the same pictures, to the file's bytes."""
    wanted: list[Any] = [finish.format, finish.quality, finish.transparent, finish.given, finish.exact]
    # Of a canvas, `given` tells. Around an object's own pixels no adapter draws, whatever its scale.
    untold = {"canvas", "adapter_scale"} if finish.exact else {"canvas"}
    wanted += [getattr(draw, field.name) for draw in draws for field in fields(draw) if field.name not in untold]
    return hashlib.sha256(repr(wanted).encode()).hexdigest()
