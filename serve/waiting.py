"""Waiting for pictures, until their time limit or until the client goes away."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, suppress
from typing import TypeVar

from fastapi import Request

from objdrive.sampling.requests import DrawRequest
from serve.auth import Spending
from serve.drawing import Accepted, FinishedPicture, PictureEvent, Refused
from serve.errors import ApiError
from serve.finishing import Finish
from serve.services import Services

_T = TypeVar("_T")
_WAS_DRAWN = ("cancelled", "drawing_failed", "internal_error", "timeout")
"""What ends a drawing that took its time: it counts for the key all the same."""


async def picture_events(
    services: Services, draw: DrawRequest, spending: Spending
) -> AsyncGenerator[PictureEvent, None]:
    """A drawing's events, within `Services.draw_seconds`; its outcome is counted, and for its key what was drawn.

    Raises:
        ApiError: the drawing is refused, or takes too long (408).
    """
    started = time.monotonic()
    outcome = "cancelled"
    try:
        with services.drain.drawing():
            async with aclosing(services.generators.draw(draw)) as events:
                while (event := await _next(events, started + services.draw_seconds)) is not None:
                    if isinstance(event, Refused):
                        raise ApiError(event.code, event.message, retry_after=event.retry_after)
                    if isinstance(event, Accepted):
                        spending.take()
                    if isinstance(event, FinishedPicture):
                        outcome = "ok"
                        services.meter.observe("picture_seconds", time.monotonic() - started)
                    yield event
    except ApiError as error:
        outcome = error.code
        if outcome not in _WAS_DRAWN:
            spending.give_back()
        raise
    except Exception:
        outcome = "internal_error"
        raise
    finally:
        services.meter.count("pictures", outcome=outcome)


async def finished_events(
    services: Services, draw: DrawRequest, finish: Finish, spending: Spending
) -> AsyncGenerator[PictureEvent, None]:
    """A drawing's events, as `finish` has them.

    Raises:
        ApiError: see `picture_events`.
    """
    if finish.transparent:
        yield Accepted()
        yield await services.finishing.run(finish.alone, draw)
        return
    async with aclosing(picture_events(services, draw, spending)) as events:
        async for event in events:
            # What needs no finishing waits for no other picture's.
            at_once = finish.as_drawn or isinstance(event, Accepted)
            yield event if at_once else await services.finishing.run(finish, event)


async def draw_all(
    services: Services, draws: Sequence[DrawRequest], finish: Finish, spending: Spending
) -> list[FinishedPicture]:
    """The pictures, drawn side by side. The first drawing that fails ends the others.

    Raises:
        ApiError: see `picture_events`.
    """
    tasks: list[asyncio.Task[FinishedPicture]] = []
    failed: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(_finished(services, draw, finish, spending)) for draw in draws]
        return [task.result() for task in tasks]
    except BaseExceptionGroup as errors:
        failed = errors.exceptions[0]
        # In it is the frame that raised the group, which has the group.
        errors.__traceback__ = None
    finally:
        # A failed task has an exception, which has this frame: they would keep each other, and the pictures of edits
        # with them, until the next full collection.
        tasks.clear()
        del group
    try:
        # Not where the group is handled, of which it is a part: it would be its own context.
        assert failed is not None
        raise failed
    finally:
        del failed


async def unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """The work's result; when the client goes away, the work is cancelled.

    Raises:
        ApiError: 499, for the log alone: nobody reads the answer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError("cancelled", "the client went away")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        # As in `draw_all`.
        del task, gone


async def _finished(services: Services, draw: DrawRequest, finish: Finish, spending: Spending) -> FinishedPicture:
    async with aclosing(finished_events(services, draw, finish, spending)) as events:
        async for event in events:
            if isinstance(event, FinishedPicture):
                return event
    raise ApiError("unavailable", "the drawing ended without a picture")


async def _next(events: AsyncIterator[_T], deadline: float) -> _T | None:
    with suppress(TimeoutError):
        return await asyncio.wait_for(anext(events, None), deadline - time.monotonic())
    # Not where that is handled: it has the task that waits, which gets this error and would have itself in it.
    raise ApiError("timeout", "the picture took too long", retry_after=5)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
