"""Middleware for Serve's HTTP proxies, which a request passes before Serve reads it.

Ray finds it by the environment of its processes:
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares``.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.request_ids import HEADER

_NOT_FOR_CLIENTS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id")


class StripHeaders:
    """ASGI middleware that removes headers by which a client could change Serve's time limits and routing.

    Serve puts a request's id into the answer, and so does `serve.guard`: one of them is enough.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on without these headers."""
        if scope["type"] == "http":
            kept = [(name, value) for name, value in scope["headers"] if _dashed(name) not in _NOT_FOR_CLIENTS]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, _with_one_id(send))


def _with_one_id(send: Send) -> Send:
    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            ids = [pair for pair in headers if pair[0].lower() == HEADER]
            message["headers"] = [pair for pair in headers if pair[0].lower() != HEADER] + ids[:1]
        await send(message)

    return answer


def _dashed(name: bytes) -> bytes:
    return name.lower().replace(b"_", b"-")


def middlewares() -> list[Middleware]:
    """The middlewares, as Serve's proxies take them."""
    return [Middleware(StripHeaders)]
