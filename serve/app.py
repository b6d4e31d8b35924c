"""The Serve application: ``serve run serve.app:build store=s3://bucket/adapters api_keys=keys.yaml``."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve.api import create_app
from serve.auth import Gate
from serve.catalog import Catalog
from serve.generator import Generator, RayGenerators, RayMeter
from serve.objects import Objects
from serve.services import Services
from serve.settings import Settings
from serve.signing import Signer

_INGRESS_REQUESTS = 1000
_INGRESS_TARGET = 100
_DRAIN_MARGIN_SECONDS = 10.0


@serve.ingress()
class Api:
    """A replica of the ingress. It makes the app itself: an app holds connections, threads and an index."""

    def __init__(self, settings: Settings, secret: bytes, generator: "DeploymentHandle[Any]") -> None:
        self._settings = settings
        self._secret = secret
        self._generator = generator

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app; Serve calls this after the constructor."""
        settings = self._settings
        store = settings.open_store()
        return create_app(
            Services(
                generators=RayGenerators(self._generator),
                objects=Objects(store),
                catalog=Catalog(store, refresh_seconds=settings.refresh_seconds),
                gate=Gate(settings.api_keys),
                signer=Signer(self._secret),
                meter=RayMeter(),
                public_url=settings.public_url,
                model_aliases=settings.model_aliases,
                draw_seconds=settings.draw_seconds,
            )
        )


def build(args: dict[str, Any]) -> Application:
    """The application with these settings (see `serve.settings.Settings`).

    Raises:
        ObjdriveError: a setting is unknown, or its value is not allowed.
    """
    settings = Settings.of(**args)
    settings = settings.model_copy(update={"base": settings.base_name()})
    grace = settings.draw_seconds + _DRAIN_MARGIN_SECONDS
    generator: Any = serve.deployment(
        # The engine queues, those that wait for the store beside those that wait for a place.
        max_ongoing_requests=2 * settings.queue_limit + settings.batch_size,
        max_queued_requests=settings.queue_limit,
        autoscaling_config=_scaled(settings.generators, target=settings.batch_size),
        ray_actor_options={"num_cpus": 1},
        request_router_config={
            "request_router_class": "serve.router:WarmRouter",
            "request_router_kwargs": {
                "spill_at": 2 * settings.batch_size,
                "full_at": settings.queue_limit + settings.batch_size,
            },
        },
        health_check_period_s=10,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=grace,
    )
    api: Any = serve.deployment(
        max_ongoing_requests=_INGRESS_REQUESTS,
        # Beyond this, Serve itself refuses, with a message of its own.
        max_queued_requests=_INGRESS_REQUESTS,
        autoscaling_config=_scaled(settings.ingress, target=_INGRESS_TARGET),
        ray_actor_options={"num_cpus": 0.5},
        graceful_shutdown_timeout_s=grace,
    )
    bound: Application = api(Api).bind(settings, settings.signing_secret(), generator(Generator).bind(settings))
    return bound


def _scaled(replicas: str, *, target: int) -> dict[str, int]:
    """Serve's configuration for a number of replicas, as MIN or MIN:MAX, each with about `target` requests."""
    least, _, most = replicas.partition(":")
    return {
        "min_replicas": int(least),
        "max_replicas": int(most or least),
        "target_ongoing_requests": target,
    }
