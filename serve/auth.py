"""API keys: which objects a key sees, and how many pictures it may draw."""

import hashlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from objdrive.errors import ObjdriveError
from serve.errors import ApiError, logger

_KEY_PREFIX = "od-"
_KEY_BYTES = 32
_RELOAD_SECONDS = 5.0
# PyYAML's own parser takes a second for a few thousand keys; wheels bring libyaml's.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ApiKey(BaseModel):
    """An API key as the key file holds it.

    A key is 256 random bits, so its plain SHA-256 reveals nothing.

    Attributes:
        name: for logs, and to find the entry when the key is to be revoked.
        sha256: of the key, hexadecimal.
        prefix: the key sees only objects whose ids begin with it; empty: every object.
        requests_per_minute: pictures that may be drawn, on average. What is refused is not counted.
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
        keys = _KeyFile.model_validate(yaml.load(path.read_text(), _Loader)).keys
    # PyYAML fails with half a dozen kinds of exception.
    except Exception as error:
        raise ObjdriveError(f"the key file {path} can't be used: {error}") from error
    twice = [name for name, count in Counter(key.name for key in keys).items() if count > 1]
    if twice:
        raise ObjdriveError(
            f"the key file {path} names {', '.join(sorted(twice))} twice: give each key a name of its own"
        )
    return keys


@dataclass(frozen=True)
class _Keys:
    """The keys of a key file, as it was when it had this mark."""

    by_hash: Mapping[str, ApiKey]
    by_name: Mapping[str, ApiKey]
    mark: object = None

    @classmethod
    def of(cls, keys: Sequence[ApiKey], mark: object) -> "_Keys":
        return cls({key.sha256: key for key in keys}, {key.name: key for key in keys}, mark)


class Gate:
    """Admits requests by their key. Safe for use from threads; no request waits for the key file.

    A change of the key file takes effect within seconds: a key that was removed is refused. While the file can't be
    read, the keys stay as they were.

    Args:
        path: the key file; None: requests need no key.
        clock: seconds, never running backwards.
        reload_seconds: time between two looks at the file, once `start` was called.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        reload_seconds: float = _RELOAD_SECONDS,
    ) -> None:
        self._path = path
        self._clock = clock
        self._reload_seconds = reload_seconds
        self._lock = threading.Lock()
        self._buckets: dict[str, TokenBucket] = {}
        self._keys = _Keys({}, {}) if path is None else _Keys.of(read_keys(path), _mark(path))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="keys", daemon=True)

    @property
    def open(self) -> bool:
        """Whether requests need no key."""
        return self._path is None

    def start(self) -> None:
        """Start to follow the key file, in a thread."""
        if self._path is not None:
            self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def refresh(self) -> None:
        """Read the key file if it has changed."""
        if self._path is None:
            return
        try:
            # Looked at first: a change while the file is read is found by the next look.
            mark = _mark(self._path)
            if mark != self._keys.mark:
                self._keys = _Keys.of(read_keys(self._path), mark)
        except (OSError, ObjdriveError) as error:
            logger.error("the key file can't be read, and the keys stay as they were: %s", error)
        except Exception:
            # The thread lives on, or no change would count any more.
            logger.exception("the key file can't be read, and the keys stay as they were")

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
        # By hash: how long a look-up takes tells of the guess's own hash alone.
        found = self._keys.by_hash.get(_hash(secret.strip()))
        if found is None:
            raise ApiError("invalid_api_key", "this API key is not valid")
        return found

    def named(self, name: str) -> ApiKey | None:
        """The key of this name; None if there is none such any more."""
        if self._path is None:
            return ANYONE if name == ANYONE.name else None
        return self._keys.by_name.get(name)

    def spend(self, key: ApiKey, amount: int = 1) -> "Spending":
        """Ask to draw pictures for a key. They are counted when the first of them is let in.

        Raises:
            ApiError: 429, the key has used up its rate.
        """
        self._take(key, amount, only_ask=True)
        return Spending(self, key, amount)

    def _take(self, key: ApiKey, amount: int, *, only_ask: bool = False) -> None:
        with self._lock:
            bucket = self._buckets.get(key.name)
            if bucket is None or bucket.key != key:
                bucket = self._buckets[key.name] = TokenBucket(key, self._clock())
            wait = bucket.wait(amount, self._clock())
            if not wait and not only_ask:
                bucket.add(-amount)
        if wait:
            raise ApiError(
                "rate_limit_exceeded",
                f"the key {key.name!r} may draw {key.requests_per_minute:g} pictures a minute, {key.burst} at once",
                retry_after=max(1, round(wait + 0.5)),
            )

    def _give_back(self, key: ApiKey, amount: int) -> None:
        with self._lock:
            bucket = self._buckets.get(key.name)
            if bucket is not None and bucket.key == key:
                bucket.add(amount)

    def _follow(self) -> None:
        while not self._stop.wait(self._reload_seconds):
            self.refresh()


class Spending:
    """The pictures of one request, as they count for its key: those that are refused do not.

    They are counted only once one of them has a place: of many requests at once, those for which there is no place
    must not use up the rate of the others.
    """

    def __init__(self, gate: Gate, key: ApiKey, amount: int) -> None:
        self._gate = gate
        self._key = key
        self._amount = amount
        self._taken = False
        self._refused = False

    def take(self) -> None:
        """Count them, once.

        Raises:
            ApiError: 429, others have used up the key's rate meanwhile.
        """
        if not self._taken and not self._refused:
            self._gate._take(self._key, self._amount)
            self._taken = True

    def give_back(self) -> None:
        """The request was refused as a whole: count none of them."""
        if self._taken and not self._refused:
            self._gate._give_back(self._key, self._amount)
        self._refused = True


class TokenBucket:
    """Counts a key's pictures: `burst` at once, refilled at its rate."""

    def __init__(self, key: ApiKey, now: float) -> None:
        self.key = key
        self._rate = key.requests_per_minute / 60
        self._tokens = float(key.burst)
        self._filled = now

    def wait(self, amount: int, now: float) -> float:
        """The seconds until there are enough tokens; 0.0: there are. Of none there are enough even in debt."""
        self._tokens = min(self.key.burst, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        # A request for more than the bucket can hold is admitted when it is full, and leaves a debt.
        needed = min(amount, self.key.burst)
        return max(0.0, (needed - self._tokens) / self._rate) if amount else 0.0

    def add(self, amount: int) -> None:
        """Give tokens back, or take them (less than 0)."""
        self._tokens = min(self.key.burst, self._tokens + amount)


def _mark(path: Path) -> object:
    """What changes with every change of a file."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
