"""A drawing as server-sent events, in OpenAI's terms."""

import base64
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from objdrive.sampling.requests import DrawRequest
from serve.auth import Spending
from serve.drawing import Accepted, BaseInfo, FinishedPicture, PartialPicture, PictureEvent, model_id
from serve.errors import api_error
from serve.finishing import Finish
from serve.schema import CompletedEvent, PartialImageEvent
from serve.services import Services
from serve.waiting import finished_events, unless_gone


async def streamed(
    request: Request,
    services: Services,
    draw: DrawRequest,
    base: BaseInfo,
    finish: Finish,
    headers: dict[str, str],
    link: Callable[[DrawRequest, bytes], str | None],
    spending: Spending,
) -> StreamingResponse:
    """Answer with the drawing's events. A drawing that is refused at once has the refusal's own status.

    `link` makes the picture's address, if one is wanted.

    Raises:
        ApiError: see `serve.waiting.finished_events`.
    """
    events = finished_events(services, draw, finish, spending)
    try:
        accepted = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    assert isinstance(accepted, Accepted)
    size = finish.edit.picture.size if finish.edit else draw.size or base.sizes.square
    common = {"size": f"{size[0]}x{size[1]}", "seed": draw.seed, "model": model_id(draw)}
    common |= {"output_format": finish.format, "background": finish.background}
    family = "image_edit" if finish.edit else "image_generation"
    body = _server_sent(request, events, family, common, lambda data: link(draw, data))
    return StreamingResponse(body, media_type="text/event-stream", headers=headers | {"cache-control": "no-store"})


async def _server_sent(
    request: Request,
    events: AsyncGenerator[PictureEvent, None],
    family: str,
    common: dict[str, Any],
    link: Callable[[bytes], str | None],
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        try:
            while (event := await unless_gone(request, anext(events, None))) is not None:
                if isinstance(event, PartialPicture):
                    told = common | _file(event.data) | {"type": f"{family}.partial_image"}
                    yield _sse(PartialImageEvent(**told, partial_image_index=event.index))
                elif isinstance(event, FinishedPicture):
                    told = common | _file(event.data) | {"type": f"{family}.completed", "url": link(event.data)}
                    yield _sse(CompletedEvent(**told, revised_prompt=event.prompt))
        except Exception as error:
            # The error has this frame: a variable that has the error would keep both, and the picture of an edit.
            if event_of_it := _error_event(error):
                yield event_of_it


def _error_event(error: Exception) -> bytes:
    """Empty where nobody reads it."""
    failed = api_error(error)
    return (
        b"" if failed.code == "cancelled" else f"event: error\ndata: {failed.document.model_dump_json()}\n\n".encode()
    )


def _file(data: bytes) -> dict[str, Any]:
    return {"b64_json": base64.b64encode(data).decode(), "created_at": int(time.time())}


def _sse(event: PartialImageEvent | CompletedEvent) -> bytes:
    return f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n".encode()
