"""Middleware for Serve's HTTP proxies, which a request passes before Serve reads it.

Ray finds it by the environment of its processes:
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares``.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

_NOT_FOR_CLIENTS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id")


class StripHeaders:
    """ASGI middleware that removes headers by which a client could change Serve's time limits and routing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on without these headers."""
        if scope["type"] == "http":
            kept = [(name, value) for name, value in scope["headers"] if _dashed(name) not in _NOT_FOR_CLIENTS]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


def _dashed(name: bytes) -> bytes:
    return name.lower().replace(b"_", b"-")


def middlewares() -> list[Middleware]:
    """The middlewares, as Serve's proxies take them."""
    return [Middleware(StripHeaders)]
