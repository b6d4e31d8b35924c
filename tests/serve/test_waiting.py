import asyncio
import json
import socket
import time
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from answers import error
from conftest import serving
from starlette.testclient import TestClient

from serve.api import create_app


@pytest.mark.parametrize("stream", [True, False])
def test_the_drawing_of_a_client_that_goes_away_is_cancelled(small_base, filled, tmp_path, stream):
    with serving(small_base, filled, tmp_path, batch_size=1) as server:
        url = urlsplit(server.url)
        body = json.dumps({"model": "acme-mug-1", "prompt": "{}", "steps": 100, "stream": stream}).encode()
        head = (
            f"POST /v1/images/generations HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((url.hostname, url.port)) as connection:
            connection.sendall(head.encode() + body)
            while not server.services.generators._engine.stats().running:
                time.sleep(0.01)
        deadline = time.monotonic() + 10
        with server.client() as client:
            while 'objdrive_engine_requests_total{outcome="cancelled"} 1.0' not in client.get("/metrics").text:
                assert time.monotonic() < deadline
                time.sleep(0.02)


def test_a_drawing_that_breaks_is_counted_as_broken(open_server):
    class Broken:
        async def describe(self):
            return await open_server.services.generators.describe()

        async def draw(self, request):
            raise RuntimeError("the generator is gone")
            yield

    services = replace(open_server.services, generators=Broken())
    app = create_app(services)
    client = TestClient(app, "http://127.0.0.1", client=("127.0.0.1", 4711), raise_server_exceptions=False)
    assert client.post("/v1/images/generations", json={"prompt": "a mug"}).status_code == 500
    assert 'objdrive_pictures_total{outcome="internal_error"} 1.0' in client.get("/metrics").text


def test_without_a_generator_a_drawing_is_refused_in_time(open_server):
    class Starting:
        async def describe(self):
            await asyncio.Event().wait()

    services = replace(open_server.services, generators=Starting(), draw_seconds=0.05)
    client = TestClient(create_app(services), "http://127.0.0.1", client=("127.0.0.1", 4711))
    assert error(client.post("/v1/images/generations", json={"prompt": "a mug"}), 503) == "unavailable"
