"""Links to pictures that need no key, and expire.

A link carries all that the picture depends on, signed. Any replica that knows the secret answers it, after any
restart, and nothing is stored: what is no longer in the replica's memory is drawn again, and comes out the same.
"""

import base64
import binascii
import hashlib
import hmac
import json
import time
import zlib
from collections.abc import Callable
from typing import Any

from serve.errors import ApiError

LIFETIME_SECONDS = 3600


class Signer:
    """Signs and reads links (HMAC with SHA-256).

    Args:
        secret: the same in every replica.
        clock: seconds since the epoch.
    """

    def __init__(self, secret: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._clock = clock

    def sign(self, claims: dict[str, Any]) -> str:
        """A token of URL-safe characters that carries the claims (JSON) for an hour."""
        expires = int(self._clock()) + LIFETIME_SECONDS
        document = json.dumps({"expires": expires, "claims": claims}, separators=(",", ":"), sort_keys=True)
        payload = _encode(zlib.compress(document.encode(), 9))
        return f"{payload}.{_encode(self._mac(payload))}"

    def read(self, token: str) -> dict[str, Any]:
        """The claims of a token.

        Raises:
            ApiError: 403, it was not signed here, or has expired.
        """
        payload, _, signature = token.partition(".")
        if not hmac.compare_digest(_decode(signature), self._mac(payload)):
            raise ApiError("invalid_signature", "the link is not one that was given out here")
        document = json.loads(zlib.decompress(_decode(payload)))
        if self._clock() >= document["expires"]:
            raise ApiError("link_expired", "the link has expired: ask for the picture again")
        claims: dict[str, Any] = document["claims"]
        return claims

    def _mac(self, payload: str) -> bytes:
        return hmac.digest(self._secret, payload.encode(), hashlib.sha256)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4))
    except (binascii.Error, UnicodeEncodeError, ValueError):
        return b""
