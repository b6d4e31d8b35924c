"""A real HTTP server over a small random base and a store of random adapters, in this process."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
import torch
import uvicorn
import yaml
from random_store import RANK, commit

from objdrive.adapters.store import ArtifactStore
from objdrive.base.stable_diffusion import Base
from objdrive.sampling.engine import Engine
from serve.api import create_app
from serve.auth import Gate, new_key
from serve.catalog import Catalog
from serve.drawing import LocalGenerators
from serve.metrics import PrometheusMeter
from serve.objects import Objects
from serve.services import Services
from serve.signing import Signer

OBJECTS = {"acme-mug-1": "mug", "acme-mug-2": "mug", "acme-lamp-1": "lamp", "other-chair-1": "chair"}


@pytest.fixture(scope="session")
def small_base(sd15):
    """A base of 128 x 128 pixels with random weights, for one engine at a time; `serving` has its own."""
    snapshot, clip = sd15
    return Base.load(str(snapshot), clip=str(clip), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def filled(small_base, tmp_path_factory):
    """A folder with a store of `OBJECTS`, for reading."""
    store = ArtifactStore(str(tmp_path_factory.mktemp("filled")))
    for object_id, class_name in OBJECTS.items():
        commit(store, small_base, object_id, class_name=class_name, row={"title": f"Fine {class_name} %_"})
    return store


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 1_700_000_000.0

    def __call__(self):
        return self.now


@dataclass
class Server:
    """A server under test."""

    url: str
    services: Services
    clock: Clock
    secrets: dict[str, str] = field(default_factory=dict)

    def client(self, name=None, **options):
        headers = {"authorization": f"Bearer {self.secrets[name]}"} if name else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def draw(self, client, **asked):
        return client.post("/v1/images/generations", json={"prompt": "a photo of {}", **asked})


@contextlib.contextmanager
def serving(base, store, tmp_path, *, keys=(), queue_limit=16, batch_size=4, draw_seconds=60.0, **more):
    """Serve a store. `keys` are entries of the key file, each a name with what it may do; `more` is for `Services`."""
    clock, secrets, path = Clock(), {}, None
    if keys:
        entries = []
        for name, limits in keys:
            secrets[name], entry = new_key(name)
            entries.append({**entry.model_dump(), **limits})
        path = Path(tmp_path) / "keys.yaml"
        path.write_text(yaml.safe_dump({"keys": entries}))
    # An engine takes a base for itself.
    own = Base.load(base.name, clip=str(base.files.clip), device="cpu", dtype=torch.float32)
    engine = Engine(own, store, batch_size=batch_size, slots=6, rank=RANK, host_bytes=2**26, queue_limit=queue_limit)
    services = Services(
        generators=LocalGenerators(own, engine),
        objects=Objects(store),
        catalog=Catalog(store, refresh_seconds=0.2),
        gate=Gate(path, clock=clock),
        signer=Signer(b"s" * 32, clock=clock),
        meter=PrometheusMeter(engine.stats),
        draw_seconds=draw_seconds,
        **more,
    )
    services.catalog.refresh()
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(services), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", services, clock, secrets)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
        engine.close()


@pytest.fixture(scope="module")
def open_server(small_base, filled, tmp_path_factory):
    """A server without keys over `filled`."""
    with serving(small_base, filled, tmp_path_factory.mktemp("open")) as server:
        yield server
