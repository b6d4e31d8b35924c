"""HTTP for sources: hosts that may not be asked are not, wherever a name resolves to and a redirect leads."""

import fnmatch
import ipaddress
import socket
from functools import cache
from typing import Any

import aiohttp

_METADATA = {ipaddress.ip_address(one) for one in ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200")}
"""Where clouds tell machines their credentials, besides link-local addresses (AWS, Google, Alibaba)."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class ForbiddenHost(OSError):
    """A host that may not be asked; the message says why."""


@cache
def web_options(hosts: tuple[str, ...]) -> dict[str, Any]:
    """Options of fsspec's HTTP file system that let it ask some hosts only.

    Link-local addresses and those of clouds' metadata are asked only if `hosts` has the address itself.

    Args:
        hosts: names, addresses or patterns such as ``*.shop.example``; empty: all others.
    """

    async def check_host(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        # Runs for every request of a chain of redirects.
        host = (request.url.host or "").lower()
        if hosts and not any(fnmatch.fnmatchcase(host, pattern.lower()) for pattern in hosts):
            raise ForbiddenHost(f"the host {host!r} is none of those allowed: {', '.join(hosts)}")
        return await handler(request)

    def make_socket(address: Any) -> socket.socket:
        # Called with the very address that is connected to, so a name can't resolve to another one afterwards.
        family, kind, protocol, _, (ip, *_) = address
        if _is_internal(ip) and ip not in hosts:
            raise ForbiddenHost("its host has a link-local or metadata address, which are not asked")
        return socket.socket(family, kind, protocol)

    async def get_client(**options: Any) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(socket_factory=make_socket)
        return aiohttp.ClientSession(connector=connector, middlewares=(check_host,), **options)

    return {"get_client": get_client}


def _is_internal(address: str) -> bool:
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip)
    return ip.is_link_local or ip in _METADATA
