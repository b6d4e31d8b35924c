"""Whether the server is shutting down, and what it still waits for."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Drain:
    """The switch that begins a server's shutdown. `drawings` counts those under way, which are finished."""

    def __init__(self) -> None:
        self.begun = False
        self.drawings = 0
        self._cuts: set[Callable[[], object]] = set()

    def begin(self) -> None:
        """Refuse new requests and those whose body is not here yet; finish what is being drawn. From any thread."""
        self.begun = True
        for cut in tuple(self._cuts):
            cut()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While a picture is drawn."""
        self.drawings += 1
        try:
            yield
        finally:
            self.drawings -= 1

    @contextmanager
    def cutting_short(self, wait: "asyncio.Future[Any]") -> Iterator[None]:
        """Cancel `wait`, of the running event loop, when the shutdown begins."""
        loop = asyncio.get_running_loop()

        def cut() -> None:
            loop.call_soon_threadsafe(wait.cancel)

        self._cuts.add(cut)
        try:
            if self.begun:
                wait.cancel()
            yield
        finally:
            self._cuts.discard(cut)
