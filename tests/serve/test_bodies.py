"""Bodies that do not arrive, against a small app behind the guard."""

import contextlib
import socket
import threading
import time

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI, Request
from raw import answer, connect

from serve.bodies import MAX_BODY_BYTES
from serve.drain import Drain
from serve.errors import add_error_handlers
from serve.guard import Guard

HEAD = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n"


class Nowhere:
    def count(self, *_, **__):
        pass

    observe = count


@contextlib.contextmanager
def serving(body_seconds):
    drain = Drain()
    app = FastAPI()
    add_error_handlers(app)

    @app.post("/")
    @app.post("/v1/images/edits")
    async def length(request: Request) -> int:
        return len(await request.body())

    app.add_middleware(Guard, meter=Nowhere(), drain=drain, local_only=False, body_seconds=body_seconds)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", drain
        finally:
            server.should_exit = True
            thread.join()


def test_a_body_that_never_comes_is_not_waited_for():
    with serving(0.2) as (url, _), connect(url) as connection:
        connection.sendall(HEAD + b"x")
        status, received = answer(connection)
    assert status == 408
    assert b"did not arrive" in received
    assert b"x-should-retry: false" in received


def test_a_body_in_pieces_is_read():
    with serving(60) as (url, _), connect(url) as connection:
        connection.sendall(HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"x" * 50)
        connection.sendall(b"y" * 50)
        status, received = answer(connection)
    assert (status, received[-3:]) == (200, b"100")


def test_an_edit_s_form_may_take_longer_and_be_larger():
    body = b"x" * (MAX_BODY_BYTES + 1)
    head = HEAD.replace(b" / ", b" /v1/images/edits ").replace(b": 100", f": {len(body)}\r\nConnection: close".encode())
    with serving(0) as (url, drain):
        with connect(url) as connection:
            connection.sendall(head)
            while not drain._cuts:
                time.sleep(0.01)
            connection.sendall(body)
            status, received = answer(connection)
        assert (status, received[-5:]) == (200, str(len(body)).encode())
        assert httpx2.post(url, content=body).status_code == 413


@pytest.mark.parametrize("before", [False, True])
def test_the_shutdown_waits_for_no_body(before):
    with serving(3600) as (url, drain), connect(url) as connection:
        if before:
            drain.begin()
        connection.sendall(HEAD + b"x")
        while not before and not drain._cuts:
            time.sleep(0.01)
        drain.begin()
        status, received = answer(connection)
    assert status == 503
    assert b"draining" in received
