"""The HTTP API as an ASGI app: OpenAI's images API over a store's objects, the catalog, and the page."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from serve.errors import add_error_handlers
from serve.guard import Guard
from serve.metrics import PrometheusMeter
from serve.routes import catalog, edits, images, models, operations, page
from serve.services import Services


def create_app(services: Services) -> FastAPI:
    """The API over these services. It starts the catalog with the server, and ends it with the server."""
    app = FastAPI(
        title="objdrive",
        description="Pictures of any product of a catalog, in any context. Speaks OpenAI's images API.",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.services = services
    add_error_handlers(app)
    for routes in (images, edits, models, catalog, operations, page):
        app.include_router(routes.router)
    if services.metrics and isinstance(services.meter, PrometheusMeter):
        app.include_router(operations.metrics_router(services.meter))
    app.add_middleware(Guard, meter=services.meter, drain=services.drain, local_only=services.gate.open)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    services.catalog.start()
    services.gate.start()
    yield
    services.drain.begin()
    await asyncio.to_thread(services.catalog.close)
    await asyncio.to_thread(services.gate.close)
    services.objects.close()
    for pool in (services.decoding, services.finishing, services.photos):
        pool.close()
