"""For operators: whether the server answers, whether it can draw, and what it has measured."""

from fastapi import APIRouter
from fastapi.responses import Response

from objdrive.adapters.artifact import BaseRef
from serve.dependencies import Serving, described, media
from serve.errors import error_responses
from serve.metrics import PrometheusMeter
from serve.schema import Health

_READY_SECONDS = 5.0

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def health() -> Health:
    """Whether the server answers at all."""
    return Health(base=None, resolution=None)


@router.get("/readyz", responses=error_responses(503))
async def ready(services: Serving) -> Health:
    """Whether the server can draw, and with which base."""
    base = await described(services.generators, _READY_SECONDS)
    return Health(base=BaseRef(id=base.id, fingerprint=base.fingerprint), resolution=base.resolution)


def metrics_router(meter: PrometheusMeter) -> APIRouter:
    """The endpoint that Prometheus asks a server of one process; on a cluster it asks Ray."""
    router = APIRouter(tags=["operations"])

    @router.get("/metrics", response_class=Response, responses={200: media("text/plain", "The measurements.")})
    async def metrics() -> Response:
        """The server's measurements, in Prometheus' format."""
        return Response(meter.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
