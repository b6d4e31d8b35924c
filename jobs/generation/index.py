"""The index of pictures: Parquet files of one schema in one folder, each written once and whole."""

import io
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.generation.scores import SCORES
from jobs.generation.settings import INDEX
from objdrive.adapters.index import DAMAGED
from objdrive.adapters.parallel import in_parallel
from objdrive.adapters.storage import Files
from objdrive.errors import ObjdriveError

ABOUT: list[tuple[str, pa.DataType]] = [
    ("object_id", pa.string()),
    ("digest", pa.string()),
    ("class_name", pa.string()),
    ("prompt_id", pa.string()),
    ("prompt", pa.string()),
    ("seed", pa.int64()),
    ("steps", pa.int64()),
    ("guidance_scale", pa.float64()),
]
"""The columns that say what a picture is of; see `jobs.generation.settings.PlannedPicture`."""
FILE: list[tuple[str, pa.DataType]] = [
    ("sha256", pa.string()),
    ("size", pa.int64()),
    ("width", pa.int64()),
    ("height", pa.int64()),
]
"""The columns on its file."""
MEASURED: list[tuple[str, pa.DataType]] = [(name, pa.float64()) for name in SCORES]
SCHEMA = pa.schema([*ABOUT, ("address", pa.string()), *FILE, ("key", pa.string()), *MEASURED])
"""`size` is in bytes; `key` is of all that the file depends on: pictures of one key are one picture."""

_SUFFIX = ".parquet"
_MOST_ROWS = 5_000
_LEAST_SECONDS = 10.0
_SHARE_OF_TIME = 0.01


class IndexWriter:
    """Writes rows as they come, in parts that the run's id and a number name.

    A part is written every ten seconds, later every hundredth of the run's time: a long run makes few parts, and one
    that is killed has lost few rows. Their pictures are there, and the next run finds them.
    """

    def __init__(self, files: Files, run_id: str) -> None:
        self._files = files
        self._run_id = run_id
        self._rows: list[dict[str, Any]] = []
        self._parts = 0
        self._began = self._written = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Note a picture."""
        self._rows.append(row)
        now = time.monotonic()
        pause = max(_LEAST_SECONDS, _SHARE_OF_TIME * (now - self._began))
        if len(self._rows) >= _MOST_ROWS or now - self._written >= pause:
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet."""
        self._written = time.monotonic()
        if not self._rows:
            return
        data = _written(pa.Table.from_pylist(self._rows, SCHEMA))
        self._files.replace(f"{INDEX}/{self._run_id}-{self._parts:06}{_SUFFIX}", data)
        self._parts += 1
        self._rows = []


def indexed_keys(files: Files) -> Iterator[list[tuple[str, bool]]]:
    """The keys of all pictures in the index, each with whether it has scores; part by part.

    Raises:
        ObjdriveError: a part can't be read.
    """
    for part in _parts(files, ["key", SCORES[0]]):
        yield part.keys


def drop_repeated(files: Files, stays: Callable[[str, bool], bool]) -> None:
    """Take rows out of the index whose key has another row that is better or newer.

    Args:
        files: where the index is.
        stays: tells of a row, the newest first, whether it stays, by its key and whether it has scores.

    Raises:
        ObjdriveError: a part can't be read, or can't be written.
    """
    for name, table, keys in _parts(files, SCHEMA.names, newest_first=True):
        kept = [stays(key, has_scores) for key, has_scores in keys]
        if all(kept):
            continue
        if any(kept):
            files.replace(f"{INDEX}/{name}", _written(table.filter(pa.array(kept))))
        else:
            files.remove(f"{INDEX}/{name}")


class _Part(NamedTuple):
    name: str
    table: pa.Table
    keys: list[tuple[str, bool]]


def _parts(files: Files, columns: list[str], *, newest_first: bool = False) -> Iterator[_Part]:
    names = [name for name in files.files(INDEX) if name.endswith(_SUFFIX) and not name.startswith(".")]

    def read(name: str) -> _Part | None:
        data = files.read(f"{INDEX}/{name}")
        if data is None:
            # Another run has dropped it meanwhile: its rows are in newer parts.
            return None
        try:
            table = pq.read_table(io.BytesIO(data), columns=columns, page_checksum_verification=True).select(columns)
            return _Part(name, table, _keys(table))
        except DAMAGED as error:
            raise ObjdriveError(
                f"the index's part {files.url}/{INDEX}/{name} can't be read ({error}): remove it; what it lists is "
                "found again"
            ) from error

    for _, called in in_parallel(read, sorted(names, reverse=newest_first)):
        part = called.result()
        if part is not None:
            yield part


def _keys(table: pa.Table) -> list[tuple[str, bool]]:
    scores = table[SCORES[0]].is_valid().to_pylist()
    return [(str(key), bool(has_scores)) for key, has_scores in zip(table["key"].to_pylist(), scores, strict=True)]


def _written(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()
