"""Links to pictures that need no key, and expire.

A link carries all that the picture depends on, signed. Any replica that knows the secret answers it, after any
restart, and nothing is stored: what is no longer in the replica's memory is drawn again, and comes out the same.
"""

import hashlib
import hmac
import time
from collections.abc import Callable
from typing import Any

from itsdangerous import BadData, TimestampSigner, URLSafeTimedSerializer
from itsdangerous.encoding import want_bytes

from serve.errors import ApiError

LIFETIME_SECONDS = 3600


class Signer:
    """Signs and reads links: itsdangerous' URL-safe tokens, with SHA-256.

    Args:
        secret: the same in every replica.
        clock: seconds since the epoch.
    """

    def __init__(self, secret: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._tokens = URLSafeTimedSerializer(
            secret,
            salt="objdrive.link",
            signer=_ExactSigner,
            signer_kwargs={"clock": clock, "key_derivation": "hmac", "digest_method": hashlib.sha256},
        )

    def sign(self, claims: dict[str, Any]) -> str:
        """A token of URL-safe characters that carries the claims (JSON) for an hour."""
        return self._tokens.dumps(claims)

    def read(self, token: str) -> dict[str, Any]:
        """The claims of a token.

        Raises:
            ApiError: 403, the token was not signed with this secret, or has expired.
        """
        try:
            claims, signed = self._tokens.loads(token, return_timestamp=True)
        except BadData as error:
            raise ApiError("invalid_signature", "the link is not one that this server gave out") from error
        # Not by the serializer's max_age: it refuses the links of a replica whose clock is a second ahead.
        if self._clock() >= signed.timestamp() + LIFETIME_SECONDS:
            raise ApiError("link_expired", "the link has expired: ask for the picture again")
        found: dict[str, Any] = claims
        return found


class _ExactSigner(TimestampSigner):
    """Takes a signature only as it was written, and the time from a clock of its own."""

    def __init__(self, *args: Any, clock: Callable[[], float], **options: Any) -> None:
        super().__init__(*args, **options)
        self._clock = clock

    def get_timestamp(self) -> int:
        return int(self._clock())

    def verify_signature(self, value: str | bytes, sig: str | bytes) -> bool:
        # As text: other texts decode to the same bytes, and a link would have many spellings.
        return hmac.compare_digest(want_bytes(sig), self.get_signature(value))
