"""Middleware that every request passes: its head, its body's limits, refusal while draining, errors, metrics."""

import time
from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.bodies import BODY_SECONDS, MAX_BODY_BYTES, BodyLimit, draining, limited, too_large
from serve.drain import Drain
from serve.edit_form import FORM_SECONDS, MAX_FORM_BYTES
from serve.errors import OUTCOME, ApiError, api_error, error_response
from serve.hosts import asked_host, is_loopback, is_own_page
from serve.metrics import Meter
from serve.request_ids import HEADER, enter_request

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024
_LARGER_BODIES = {"/v1/images/edits": BodyLimit(MAX_FORM_BYTES, FORM_SECONDS)}
_ONLY_READING = ("GET", "HEAD")
_ALWAYS_ANSWERED = ("/healthz", "/metrics")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """ASGI middleware over the whole app.

    Args:
        app: what answers the requests that pass.
        meter: counts them.
        drain: whether the server is shutting down.
        local_only: whether only this machine is answered, under a name of its own. A page of another site may have a
            name of its own lead here, or send a form, for which browsers ask nobody; both are refused. Whether the
            process lives is told to everybody.
        body_seconds: how long a body may take to arrive; an edit's has longer.
    """

    def __init__(
        self, app: ASGIApp, *, meter: Meter, drain: Drain, local_only: bool, body_seconds: float = BODY_SECONDS
    ) -> None:
        self._app = app
        self._meter = meter
        self._drain = drain
        self._local_only = local_only
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0
        added = [*_HEADERS, (HEADER, enter_request(scope["headers"]))]

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await error_response(refusal, scope)(scope, receive, answer)
            else:
                await self._app(scope, limited(receive, self._drain, self._limit(scope)), answer)
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
        headers = scope["headers"]
        refusal = _wrong_head(headers) or self._wrong_place(scope)
        if refusal is not None:
            return refusal
        if self._drain.begun and scope["path"] not in _ALWAYS_ANSWERED:
            return draining()
        length = dict(headers).get(b"content-length", b"0")
        most = self._limit(scope).nbytes
        return too_large(most) if length.isdigit() and int(length) > most else None

    def _limit(self, scope: Scope) -> BodyLimit:
        return _LARGER_BODIES.get(scope["path"], BodyLimit(MAX_BODY_BYTES, self._body_seconds))

    def _wrong_place(self, scope: Scope) -> ApiError | None:
        host = asked_host(scope["headers"])
        if host is None:
            return ApiError("invalid_request", "send one Host header, with a name or an address, and perhaps a port")
        if not self._local_only or scope["path"] == "/healthz":
            return None
        peer = (scope.get("client") or ("",))[0]
        if not is_loopback(host) or not is_loopback(peer):
            return ApiError(
                "invalid_api_key", "this server has no API keys, so it answers only requests from its own machine"
            )
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        if scope["method"] in _ONLY_READING or all(map(is_own_page, origins)):
            return None
        # A browser that asks before it lets a page ask (CORS) gets the answer that the page would get.
        return ApiError(
            "forbidden_origin",
            "this server has no API keys, so it draws for no page of another site: "
            "open the page from this machine, or start the server with keys",
        )

    def _count(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        # The route's pattern, not its path: no label per object.
        route = getattr(scope.get("route"), "path", "other")
        self._meter.count("http_requests", route=route, status=str(status), outcome=scope.get(OUTCOME, "ok"))
        self._meter.observe("http_request_seconds", seconds, route=route)


def _wrong_head(headers: Iterable[tuple[bytes, bytes]]) -> ApiError | None:
    sizes = [len(name) + len(value) for name, value in headers]
    if len(sizes) <= MAX_HEADERS and sum(sizes) <= MAX_HEADER_BYTES:
        return None
    return ApiError(
        "headers_too_large", f"the request has more than {MAX_HEADERS} headers, or {MAX_HEADER_BYTES} bytes of them"
    )
