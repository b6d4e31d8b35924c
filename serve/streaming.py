"""A drawing as server-sent events, in OpenAI's terms."""

import base64
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from objdrive.sampling.requests import DrawRequest
from serve.auth import Spending
from serve.drawing import Accepted, BaseInfo, FinishedPicture, PartialPicture, PictureEvent, model_id
from serve.errors import api_error
from serve.schema import CompletedEvent, PartialImageEvent
from serve.services import Services
from serve.waiting import picture_events, unless_gone


async def streamed(
    request: Request,
    services: Services,
    draw: DrawRequest,
    base: BaseInfo,
    headers: dict[str, str],
    spending: Spending,
) -> StreamingResponse:
    """Answer with the drawing's events. A drawing that is refused at once has the refusal's own status.

    Raises:
        ApiError: see `serve.waiting.picture_events`.
    """
    events = picture_events(services, draw, spending)
    try:
        accepted = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    assert isinstance(accepted, Accepted)
    body = _server_sent(request, events, draw, f"{base.resolution}x{base.resolution}")
    return StreamingResponse(body, media_type="text/event-stream", headers=headers | {"cache-control": "no-store"})


async def _server_sent(
    request: Request, events: AsyncGenerator[PictureEvent, None], draw: DrawRequest, size: str
) -> AsyncGenerator[bytes, None]:
    common: dict[str, Any] = {"size": size, "seed": draw.seed, "model": model_id(draw)}
    async with aclosing(events):
        try:
            while (event := await unless_gone(request, anext(events, None))) is not None:
                if isinstance(event, PartialPicture):
                    yield _sse(PartialImageEvent(**common, **_png(event.png), partial_image_index=event.index))
                elif isinstance(event, FinishedPicture):
                    yield _sse(CompletedEvent(**common, **_png(event.png), revised_prompt=event.prompt))
        except Exception as error:
            failed = api_error(error)
            if failed.code != "cancelled":
                yield f"event: error\ndata: {failed.document.model_dump_json()}\n\n".encode()


def _png(png: bytes) -> dict[str, Any]:
    return {"b64_json": base64.b64encode(png).decode(), "created_at": int(time.time())}


def _sse(event: PartialImageEvent | CompletedEvent) -> bytes:
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()
