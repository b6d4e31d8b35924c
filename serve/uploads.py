"""Memory for the pictures that clients send: a bound on all of them together."""

import threading
import weakref

from serve.errors import ApiError

MAX_BYTES = 2 * 2**30
"""Of all edits under way: their files and what these are decoded to. The largest edit takes about 0.7 GiB."""
_RETRY_SECONDS = 5


class Uploads:
    """Counts the memory of edits under way. Safe for use from threads."""

    def __init__(self, most: int = MAX_BYTES) -> None:
        self._most = most
        # A picture may go while the same thread counts.
        self._lock = threading.RLock()
        self.nbytes = 0

    def room(self) -> "Room":
        """Room for one edit, empty as yet."""
        return Room(self)

    def add(self, nbytes: int, own: int) -> None:
        """For `Room`: take memory for an edit that has `own` bytes already."""
        with self._lock:
            others = self.nbytes - own
            # One edit alone always has room.
            if others and self.nbytes + nbytes > self._most:
                raise ApiError(
                    "queue_full", "too many pictures are being edited: try again", retry_after=_RETRY_SECONDS
                )
            self.nbytes += nbytes

    def remove(self, nbytes: int) -> None:
        """For `Room`: give memory back."""
        with self._lock:
            self.nbytes -= nbytes


class Room:
    """The memory of one edit. It is given back at the end of the context, or when the picture goes that it is for."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._nbytes = 0

    def __enter__(self) -> "Room":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._uploads.remove(self._nbytes)
        self._nbytes = 0

    def take(self, nbytes: int) -> None:
        """Take more memory.

        Raises:
            ApiError: 429, others have so much that there is no room.
        """
        self._uploads.add(nbytes, self._nbytes)
        self._nbytes += nbytes

    def until_gone(self, picture: object) -> None:
        """Keep the memory until nothing refers to the picture any more, which may be long after the request."""
        weakref.finalize(picture, self._uploads.remove, self._nbytes).atexit = False
        self._nbytes = 0
