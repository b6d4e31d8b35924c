"""Requests as bytes, for what no client library sends."""

import socket
from urllib.parse import urlsplit


def connect(url):
    """A connection to the server at that address."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def exchange(url, *lines):
    """Send a head of these lines (bytes), and return the status and the whole answer; (0, b"") if there was none."""
    with connect(url) as connection:
        connection.sendall(b"\r\n".join([*lines, b"Connection: close", b"", b""]))
        return answer(connection)


def answer(connection):
    """What comes until the server closes."""
    received = b""
    try:
        while some := connection.recv(65536):
            received += some
    except ConnectionResetError:
        pass
    return (int(received.split(b" ", 2)[1]) if received else 0), received
