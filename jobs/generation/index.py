"""The index of pictures: Parquet files of one schema in one folder, each written once and whole."""

import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.generation.scores import SCORES
from jobs.generation.settings import INDEX
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
    for _, table in _parts(files, ["key", SCORES[0]]):
        yield _keys(table)


def drop_unscored(files: Files, scored: Callable[[str], bool]) -> None:
    """Take rows without scores out of the index where another row of their key has scores.

    Args:
        files: where the index is.
        scored: tells of a key whether it has such a row.

    Raises:
        ObjdriveError: a part can't be read, or can't be written.
    """
    for name, table in _parts(files, SCHEMA.names):
        kept = [has_scores or not scored(key) for key, has_scores in _keys(table)]
        if all(kept):
            continue
        if any(kept):
            files.replace(f"{INDEX}/{name}", _written(table.filter(pa.array(kept))))
        else:
            files.remove(f"{INDEX}/{name}")


def _parts(files: Files, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    names = sorted(name for name in files.files(INDEX) if name.endswith(_SUFFIX) and not name.startswith("."))

    def read(name: str) -> pa.Table:
        data = files.read(f"{INDEX}/{name}")
        try:
            return pq.read_table(io.BytesIO(data or b""), columns=columns).select(columns)
        # Damaged pages are an OSError.
        except (pa.ArrowException, KeyError, OSError) as error:
            raise ObjdriveError(
                f"the index's part {files.url}/{INDEX}/{name} can't be read ({error}): remove it; what it lists is "
                "found again"
            ) from error

    for name, table in in_parallel(read, names):
        yield name, table.result()


def _keys(table: pa.Table) -> list[tuple[str, bool]]:
    scores = table[SCORES[0]].is_valid().to_pylist()
    return [(str(key), bool(has_scores)) for key, has_scores in zip(table["key"].to_pylist(), scores, strict=True)]


def _written(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()
