"""Which names and addresses are this machine's own, and under which one a request asks for the server."""

import ipaddress
import re
from collections.abc import Iterable

_HOST = re.compile(rb"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9._-]{1,253}))(?::[0-9]{1,5})?")

_ORIGIN = re.compile(rb"https?://" + _HOST.pattern)


def is_loopback(host: str) -> bool:
    """Whether the address, or the name ``localhost``, is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_own_page(origin: bytes) -> bool:
    """Whether an ``Origin`` header tells of a page of this machine; ``null``, and what can't be read, does not."""
    found = _ORIGIN.fullmatch(origin)
    return found is not None and is_loopback((found["v6"] or found["name"]).decode().lower())


def asked_host(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The one name or address in a request's ``Host`` header, as it was sent; None: there is no such, or no single one.

    Not Starlette's: where it can't read the header, it says the address of the socket.
    """
    values = [value for name, value in headers if name == b"host"]
    found = _HOST.fullmatch(values[0]) if len(values) == 1 else None
    return (found["v6"] or found["name"]).decode().lower() if found else None
