"""uvicorn's connections, with a limit on how long the head of a request may take, and a shutdown that ends."""

import asyncio
import logging
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.drain import Drain

HEAD_SECONDS = 10.0
"""How long the head of a request may take to arrive."""
MAX_HEAD_BYTES = 64 * 1024
"""What a connection may hold of an incomplete head. `serve.guard` refuses less, with an answer that says so."""
_LAST_SECONDS = 5.0
_POLL_SECONDS = 0.1


class BoundedProtocol(H11Protocol):
    """A connection that is closed when the head of a request takes too long: uvicorn itself waits for ever."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what came. Bytes of a head that goes on and on do not prolong the wait for its end."""
        super().data_received(data)
        if self._answers():
            self._unwatch()
        elif self._late is None:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the wait."""
        self._unwatch()
        super().connection_lost(exc)

    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """uvicorn's server, whose shutdown waits for what is being drawn, and for little else."""

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests, on open connections too, and finish the pictures that are being drawn."""
        self._drain.begin()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        """Wait for drawings; whoever does not take an answer within a few seconds after the last is cut off."""
        cutting = asyncio.create_task(self._cut_off())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut_off(self) -> None:
        while self._drain.drawings:
            await asyncio.sleep(_POLL_SECONDS)
        await asyncio.sleep(_LAST_SECONDS)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def configured(app: Any, *, host: str, port: int, connections: int, draw_seconds: float) -> uvicorn.Config:
    """uvicorn's configuration, with limits for those who have not yet shown a key."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        # httptools, which uvicorn prefers, takes a head of any length.
        http=BoundedProtocol,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws="none",
        limit_concurrency=connections,
        log_level=logging.WARNING,
        access_log=False,
        timeout_graceful_shutdown=int(draw_seconds + 2 * _LAST_SECONDS),
    )
