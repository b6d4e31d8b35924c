"""Bodies of requests, within limits of size and time."""

import asyncio
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from serve.drain import Drain
from serve.errors import ApiError

MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 20.0


@dataclass(frozen=True)
class BodyLimit:
    """How long a body may be, and how long it may take to arrive."""

    nbytes: int
    seconds: float


def limited(receive: Receive, drain: Drain, limit: BodyLimit) -> Receive:
    """Receive a body within the limit, whatever the headers say, or until the shutdown."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit.seconds
    received = 0
    complete = False

    async def receive_some() -> Message:
        nonlocal received, complete
        if complete:
            # What comes now is that the client goes away; that may take as long as the answer.
            return await receive()
        waiting = asyncio.ensure_future(receive())
        with drain.cutting_short(waiting):
            await asyncio.wait((waiting,), timeout=deadline - loop.time())
        if waiting.cancelled():
            raise _refused(draining())
        if not waiting.done():
            waiting.cancel()
            raise _refused(ApiError("timeout", f"the body of the request did not arrive within {limit.seconds:g} s"))
        message = waiting.result()
        received += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if received > limit.nbytes:
            raise _refused(too_large(limit.nbytes))
        return message

    return receive_some


def too_large(most: int) -> ApiError:
    """The refusal of a body that is too long."""
    return ApiError("body_too_large", f"the body is longer than {most} bytes")


def draining() -> ApiError:
    """The refusal of a server that shuts down."""
    return ApiError("draining", "this server is shutting down: try again")


def _refused(error: ApiError) -> HTTPException:
    # Of the kind that FastAPI lets through while it reads a body. What is left of the body is not waited for.
    return HTTPException(error.status, str(error), headers={**error.headers, "connection": "close"})
