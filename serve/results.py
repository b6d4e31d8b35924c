"""The pictures behind links, as far as memory holds them."""

from collections import OrderedDict


class Results:
    """The latest pictures drawn for links, 64 MiB of them. What a link shows beyond these is drawn again."""

    _MAX_BYTES = 64 * 2**20

    def __init__(self) -> None:
        self._pictures: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def keep(self, token: str, data: bytes) -> None:
        """Remember a picture; the oldest ones make room for it."""
        self._bytes += len(data) - len(self._pictures.pop(token, b""))
        self._pictures[token] = data
        while self._bytes > self._MAX_BYTES:
            self._bytes -= len(self._pictures.popitem(last=False)[1])

    def get(self, token: str) -> bytes | None:
        """The picture, if it is still there."""
        return self._pictures.get(token)
