"""Middleware that every request passes: size limit, refusal while draining, security headers, errors, metrics."""

import time
from collections.abc import MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.edit_form import MAX_FORM_BYTES
from serve.errors import OUTCOME, ApiError, api_error, error_response
from serve.metrics import Meter

MAX_BODY_BYTES = 64 * 1024
_LARGER_BODIES = {"/v1/images/edits": MAX_FORM_BYTES}
_ALWAYS_ANSWERED = ("/healthz", "/metrics")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Drain:
    """Whether the server is shutting down."""

    def __init__(self) -> None:
        self.begun = False

    def begin(self) -> None:
        """Refuse new requests; finish those that have begun."""
        self.begun = True


class Guard:
    """ASGI middleware over the whole app."""

    def __init__(self, app: ASGIApp, *, meter: Meter, drain: Drain) -> None:
        self._app = app
        self._meter = meter
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await error_response(refusal, scope)(scope, receive, answer)
            else:
                await self._app(scope, _limited(scope, receive), answer)
        except Exception as error:
            if status:
                raise
            await error_response(api_error(error), scope)(scope, receive, answer)
        finally:
            if not status:
                # The client went away before the answer.
                status, scope[OUTCOME] = 499, "cancelled"
            self._count(scope, status, time.monotonic() - started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._drain.begun and scope["path"] not in _ALWAYS_ANSWERED:
            return ApiError("draining", "this server is shutting down: try again")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > _most(scope):
            return _too_large(_most(scope))
        return None

    def _count(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        # The route's pattern, not its path: no label per object.
        route = getattr(scope.get("route"), "path", "other")
        self._meter.count("http_requests", route=route, status=str(status), outcome=scope.get(OUTCOME, "ok"))
        self._meter.observe("http_request_seconds", seconds, route=route)


def _limited(scope: Scope, receive: Receive) -> Receive:
    """Receive at most as much as the path takes, whatever the headers say."""
    received, most = 0, _most(scope)

    async def receive_some() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            # Of the kind that FastAPI lets through while it reads a body.
            error = _too_large(most)
            raise HTTPException(error.status, str(error))
        return message

    return receive_some


def _most(scope: Scope) -> int:
    return _LARGER_BODIES.get(scope["path"], MAX_BODY_BYTES)


def _too_large(most: int) -> ApiError:
    return ApiError("body_too_large", f"the body is longer than {most} bytes")
