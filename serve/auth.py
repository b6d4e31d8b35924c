"""API keys: which objects a key sees, and how many pictures it may draw."""

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from objdrive.errors import ObjdriveError
from serve.errors import ApiError

logger = logging.getLogger("objdrive.serve")

_KEY_PREFIX = "od-"
_KEY_BYTES = 32
_RELOAD_SECONDS = 5.0


class ApiKey(BaseModel):
    """An API key as the key file holds it.

    A key is 256 random bits, so its plain SHA-256 reveals nothing.

    Attributes:
        name: for logs, and to find the entry when the key is to be revoked.
        sha256: of the key, hexadecimal.
        prefix: the key sees only objects whose ids begin with it; empty: every object.
        requests_per_minute: pictures that may be drawn, on average. Requests that draw nothing are not counted.
        burst: pictures that may be drawn at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,128}$")] = ""
    requests_per_minute: Annotated[float, Field(gt=0)] = 600.0
    burst: Annotated[int, Field(ge=1)] = 60

    def may_see(self, object_id: str) -> bool:
        """Whether the object is within the key's prefix."""
        return object_id.startswith(self.prefix)


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[ApiKey]


ANYONE = ApiKey(name="anyone", sha256="0" * 64, requests_per_minute=1e9, burst=1_000_000)
"""The key of every request to a server without keys."""


def new_key(name: str, *, prefix: str = "") -> tuple[str, ApiKey]:
    """Make a key: its secret, which is stored nowhere, and its entry for the key file.

    Raises:
        ObjdriveError: the name or the prefix is not allowed.
    """
    secret = _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    try:
        return secret, ApiKey(name=name, sha256=_hash(secret), prefix=prefix)
    except ValidationError as error:
        raise ObjdriveError(f"can't make a key {name!r} for the prefix {prefix!r}: {error}") from error


def read_keys(path: Path) -> list[ApiKey]:
    """Read a key file: YAML or JSON, ``{keys: [{name, sha256, prefix, ...}]}``.

    Raises:
        ObjdriveError: the file can't be read, is not of that form, or has two keys of one name.
    """
    try:
        keys = _KeyFile.model_validate(yaml.safe_load(path.read_text())).keys
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ObjdriveError(f"the key file {path} can't be used: {error}") from error
    names = [key.name for key in keys]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ObjdriveError(
            f"the key file {path} names {', '.join(sorted(twice))} twice: give each key a name of its own"
        )
    return keys


class Gate:
    """Admits requests by their key. Safe for use from threads.

    A change of the key file takes effect within seconds: a key that was removed is refused. While the file can't be
    read, the keys stay as they were.

    Args:
        path: the key file; None: requests need no key.
        clock: seconds, never running backwards.
    """

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, TokenBucket] = {}
        self._keys = [] if path is None else read_keys(path)
        self._looked = clock()

    @property
    def open(self) -> bool:
        """Whether requests need no key."""
        return self._path is None

    def key(self, authorization: str | None) -> ApiKey:
        """The key of a request with this ``Authorization`` header.

        Raises:
            ApiError: 401.
        """
        if self._path is None:
            return ANYONE
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise ApiError("invalid_api_key", 'send your API key in a header "Authorization: Bearer <key>"')
        hashed = _hash(secret.strip())
        # Every key is compared: the time that it takes must not tell which one was nearly right.
        found = [key for key in self._current() if hmac.compare_digest(key.sha256, hashed)]
        if not found:
            raise ApiError("invalid_api_key", "this API key is not valid")
        return found[0]

    def named(self, name: str) -> ApiKey | None:
        """The key of this name; None if there is none such any more."""
        if self._path is None:
            return ANYONE if name == ANYONE.name else None
        return next((key for key in self._current() if key.name == name), None)

    def spend(self, key: ApiKey, amount: int = 1) -> None:
        """Count pictures that will be drawn for a key.

        Raises:
            ApiError: 429, the key has used up its rate.
        """
        with self._lock:
            bucket = self._buckets.get(key.name)
            if bucket is None or bucket.key != key:
                bucket = self._buckets[key.name] = TokenBucket(key, self._clock())
            wait = bucket.take(amount, self._clock())
        if wait:
            raise ApiError(
                "rate_limit_exceeded",
                f"the key {key.name!r} may draw {key.requests_per_minute:g} pictures a minute, {key.burst} at once",
                retry_after=max(1, round(wait + 0.5)),
            )

    def _current(self) -> list[ApiKey]:
        assert self._path is not None
        with self._lock:
            if self._clock() - self._looked >= _RELOAD_SECONDS:
                self._looked = self._clock()
                try:
                    self._keys = read_keys(self._path)
                except ObjdriveError:
                    logger.exception("the key file can't be read; the keys stay as they were")
            return self._keys


class TokenBucket:
    """Counts a key's pictures: `burst` at once, refilled at its rate."""

    def __init__(self, key: ApiKey, now: float) -> None:
        self.key = key
        self._rate = key.requests_per_minute / 60
        self._tokens = float(key.burst)
        self._filled = now

    def take(self, amount: int, now: float) -> float:
        """Take tokens and return 0.0. If there are too few, take none and return the seconds until there are enough."""
        self._tokens = min(self.key.burst, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        # A request for more than the bucket can hold is admitted when it is full, and leaves a debt.
        needed = min(amount, self.key.burst)
        if self._tokens < needed:
            return (needed - self._tokens) / self._rate
        self._tokens -= amount
        return 0.0


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
