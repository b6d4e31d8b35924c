"""A stream read ahead onto the disk."""

import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path


def spooled(lines: Iterable[str]) -> Iterator[str]:
    """Yield the same lines, none of which may hold a line break.

    `lines` is read by a thread of its own, as fast as it comes and however slowly it is consumed here: what is ahead
    lies in a temporary file. If it fails, its error is raised after the lines that came before. Closing the generator
    closes `lines` after its next line.
    """
    with tempfile.TemporaryDirectory(prefix="objdrive-spool-") as folder:
        spool = _Spool(Path(folder) / "lines")
        reader = threading.Thread(target=spool.fill, args=(lines,), daemon=True)
        reader.start()
        try:
            yield from spool.drain()
        finally:
            spool.closed = True
            reader.join()


class _Spool:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.touch()
        self._changed = threading.Condition()
        self._written = 0
        self._failure: BaseException | None = None
        self._full = False
        self.closed = False

    def fill(self, lines: Iterable[str]) -> None:
        """Write all lines, until closed."""
        try:
            # Line buffered: what is counted can be read.
            with self._path.open("w", buffering=1, encoding="utf-8") as file:
                for line in lines:
                    if self.closed:
                        return
                    file.write(line + "\n")
                    with self._changed:
                        self._written += 1
                        self._changed.notify_all()
        except BaseException as error:
            self._failure = error
        finally:
            with self._changed:
                self._full = True
                self._changed.notify_all()

    def drain(self) -> Iterator[str]:
        """Yield all lines, waiting for those to come."""
        read = 0
        with self._path.open(encoding="utf-8") as file:
            while True:
                with self._changed:
                    while not self._full and self._written == read:
                        self._changed.wait()
                    ready = self._written
                while read < ready:
                    yield file.readline().removesuffix("\n")
                    read += 1
                if self._full and read == self._written:
                    break
        if self._failure is not None:
            raise self._failure
