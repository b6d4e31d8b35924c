"""uvicorn with our connections, in front of an app that answers at once, or draws."""

import contextlib
import signal
import socket
import threading
import time

import pytest
from raw import answer, connect, exchange

from serve import connections
from serve.connections import Server, configured
from serve.drain import Drain


async def app(scope, receive, send):
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Running:
    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.drain = Drain()
        self.url = f"http://127.0.0.1:{self.port}"
        config = configured(app, host="127.0.0.1", port=self.port, connections=8, draw_seconds=3600)
        config.lifespan = "off"
        self.server = Server(config, self.drain)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def stop(self):
        self.server.handle_exit(signal.SIGTERM, None)


@pytest.fixture
def running():
    running = Running()
    yield running
    running.server.force_exit = True
    running.stop()
    running.thread.join()


def test_answers(running):
    assert exchange(running.url, b"GET / HTTP/1.1", b"Host: a") == exchange(running.url, b"GET / HTTP/1.1", b"Host: b")
    assert exchange(running.url, b"GET / HTTP/1.1", b"Host: a")[0] == 200


def test_a_head_of_many_megabytes_is_not_taken(running):
    sent = 0
    with connect(running.url) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: ")
        while sent < 60 * 2**20:
            connection.sendall(b"a" * 2**16)
            sent += 2**16
    # What the kernel's buffers hold on top of the limit is no more than a few megabytes.
    assert sent < 30 * 2**20


def test_a_head_that_goes_on_and_on_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    running = Running()
    try:
        with connect(running.url) as silent, connect(running.url) as slow, contextlib.suppress(OSError):
            for piece in [b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 1000]:
                slow.sendall(piece)
                time.sleep(0.02)
            pytest.fail("the server waits on")
        assert silent.recv(1) == b"" if silent.fileno() >= 0 else True
    finally:
        running.stop()
        running.thread.join()


def test_too_many_connections_are_told_so(running):
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(running.url))
        assert exchange(running.url, b"GET / HTTP/1.1", b"Host: a")[0] == 503


def test_the_shutdown_waits_for_drawings_and_for_nobody_else(running, monkeypatch):
    monkeypatch.setattr(connections, "_LAST_SECONDS", 0.1)
    with connect(running.url) as headless, connect(running.url) as bodiless:
        headless.sendall(b"GET / HTTP/1.1\r\nHos")
        bodiless.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx")
        while not running.server.server_state.tasks:
            time.sleep(0.01)
        with running.drain.drawing():
            running.stop()
            running.thread.join(1.0)
            assert running.thread.is_alive()
        # Without the cut it would wait for an hour.
        running.thread.join(60)
        assert not running.thread.is_alive()
        assert answer(bodiless)[0] == 0
