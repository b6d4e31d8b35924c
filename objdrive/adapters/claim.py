"""The right to change a folder of the store, held by one writer at a time."""

import time
import uuid
from collections.abc import Collection, Iterable

from objdrive.adapters.storage import Files

CLAIM_PREFIX = ".claim-"


class WriteClaim:
    """One writer's claim to `folder`: a file ``.claim-<n>`` in it, created atomically; the highest n holds.

    A holder that changes nothing in the folder for `takeover_after` seconds, as watched by another writer's
    own clock, is taken for dead and outbid with ``.claim-<n+1>``. Of several bidders one succeeds, so that
    nobody ever removes a claim that may be somebody's. A holder asks `held` before every change, and so
    finds out when it was itself the one that stood still.
    """

    def __init__(self, files: Files, folder: str, takeover_after: float) -> None:
        self._files = files
        self._folder = folder
        self._takeover_after = takeover_after
        self._nonce = uuid.uuid4().hex.encode()
        self._number = -1
        self._seen: set[str] | None = None
        self._seen_since = 0.0
        self._moved = 0.0

    @property
    def name(self) -> str:
        """The claim's name in the folder."""
        return f"{CLAIM_PREFIX}{self._number}"

    def take(self) -> bool:
        """Try to become the holder. Call it again and again: between calls it watches the present holder."""
        now = time.monotonic()
        names = set(self._files.files(self._folder))
        if names != self._seen:
            self._seen, self._seen_since = names, time.monotonic()
        if _highest(names) >= 0 and now - self._seen_since < self._takeover_after:
            return False
        return self.outbid(names)

    def outbid(self, names: Collection[str]) -> bool:
        """Become the holder of a folder of these names, whose claims, if there are any, are known to be dead.

        False if somebody else claimed it meanwhile.
        """
        now = time.monotonic()
        number = _highest(names) + 1
        # A power failure ends the writer too: its claim may be lost with it.
        if not self._files.create(self._path(number), self._nonce, durable=False):
            return False
        self._number, self._moved, self._seen = number, now, None
        return True

    def held(self) -> bool:
        """Whether this writer may go on to change the folder."""
        # Nobody can have given up on a writer whose last change is younger than this: no need to ask the
        # storage.
        if time.monotonic() - self._moved < self._takeover_after / 2:
            return True
        return self._files.read(self._path(_highest(self._files.files(self._folder)))) == self._nonce

    def create(self, name: str, data: bytes) -> bool:
        """Create a file of the folder; False if it is there with other bytes, or the folder not held."""
        moved = time.monotonic()
        if not self.held() or not self._files.create(f"{self._folder}/{name}", data):
            return False
        self._moved = moved
        return True

    def remove(self, name: str) -> bool:
        """Remove a file of the folder; False if the folder is not held."""
        moved = time.monotonic()
        if not self.held():
            return False
        self._files.remove(f"{self._folder}/{name}")
        self._moved = moved
        return True

    def release(self) -> None:
        """Give the folder up, and clear away the claims of those that died holding it."""
        # The own claim goes last: until then it tells dead ones, should they wake up, that they were outbid.
        for number in range(self._number + 1):
            if not self.held():
                return
            self._files.remove(self._path(number))

    def _path(self, number: int) -> str:
        return f"{self._folder}/{CLAIM_PREFIX}{number}"


def _highest(names: Iterable[str]) -> int:
    numbers = (name.removeprefix(CLAIM_PREFIX) for name in names if name.startswith(CLAIM_PREFIX))
    return max((int(number) for number in numbers if number.isdecimal()), default=-1)
