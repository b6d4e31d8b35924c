"""A server for one machine: the API and the engine in one process."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from serve.api import create_app
from serve.auth import Gate
from serve.catalog import Catalog
from serve.connections import Server, configured
from serve.drain import Drain
from serve.drawing import LocalGenerators
from serve.engine import make_engine
from serve.metrics import PrometheusMeter
from serve.objects import Objects
from serve.services import Services
from serve.settings import Settings
from serve.signing import Signer


@contextmanager
def local_app(settings: Settings) -> Iterator[tuple[FastAPI, Drain]]:
    """The API over an engine in this process, and the switch that begins its shutdown."""
    store = settings.open_store()
    gate = Gate(settings.api_keys)
    signer = Signer(settings.signing_secret())
    base, engine = make_engine(settings)
    services = Services(
        generators=LocalGenerators(base, engine),
        objects=Objects(store),
        catalog=Catalog(store, refresh_seconds=settings.refresh_seconds),
        gate=gate,
        signer=signer,
        meter=PrometheusMeter(engine.stats),
        public_url=settings.public_url,
        model_aliases=settings.model_aliases,
        draw_seconds=settings.draw_seconds,
        metrics=settings.metrics,
    )
    try:
        yield create_app(services), services.drain
    finally:
        engine.close()


def run_server(settings: Settings, host: str, port: int) -> None:
    """Serve until a signal (SIGINT, SIGTERM) stops it."""
    with local_app(settings) as (app, drain):
        config = configured(
            app, host=host, port=port, connections=settings.connections, draw_seconds=settings.draw_seconds
        )
        print(f"objdrive serves {settings.store} at http://{host}:{port}", flush=True)
        Server(config, drain).run()
