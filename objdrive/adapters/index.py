"""What a catalog shows of every object, in one compacted table in the store, so that readers need not ask them all.

Every run leaves a table of what it has in the store (`RESULTS_FILE`). `compact` gathers these into one, sorted by id,
and notes which runs are in it; a reader reads the index, and then the tables of the runs that came later. Two runs that
end at once may each write an index without the other's rows: the run that is missing is then read by its own table,
and is in the next index.

Objects that were removed stay in the index. Which objects there are, the store's listing says.
"""

import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from objdrive.adapters.artifact import ArtifactMetadata
from objdrive.adapters.store import RESULTS_FILE, ArtifactStore
from objdrive.errors import StoreError

_ROWS_PER_BATCH = 5000
_FEW_RUNS = 32
_FEW_ROWS = 0.01
_RUNS_KEY = b"objdrive.runs"
_RESULT_COLUMNS = ("status", "digest", "scene", "where", "warning")
_SCHEMA = pa.schema([(name, pa.string()) for name in ("object_id", "class_name", "words")])


class IndexRow(NamedTuple):
    """An object's id, its class, and what a search looks at: id, class and free columns in lower case, a line each."""

    object_id: str
    class_name: str
    words: str


def index_row(artifact: ArtifactMetadata) -> IndexRow:
    """The row of an artifact's object."""
    return _row(artifact.object_id, artifact.class_name, artifact.row)


class Index:
    """The compacted table as it is in the store. `runs`: the ids of the runs whose rows it holds."""

    def __init__(self, data: bytes) -> None:
        """Read the table's footer.

        Raises:
            ValueError: it is no such table.
        """
        self._file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        self.runs = frozenset(json.loads((self._file.schema_arrow.metadata or {}).get(_RUNS_KEY, b"[]")))
        self.count: int = self._file.metadata.num_rows

    def batches(self) -> Iterator[list[IndexRow]]:
        """Yield the rows, some thousands at a time, sorted by id.

        Raises:
            OSError, ValueError: a part of the table is damaged.
        """
        for batch in self._file.iter_batches(_ROWS_PER_BATCH, columns=_SCHEMA.names):
            columns = [batch.column(name).to_pylist() for name in _SCHEMA.names]
            yield list(map(IndexRow._make, zip(*columns, strict=True)))

    def is_whole(self) -> bool:
        """Whether all of the rows can be read, which reads them all."""
        try:
            return sum(map(len, self.batches())) == self.count
        except (OSError, ValueError):
            return False


def read_index(store: ArtifactStore) -> Index | None:
    """The store's index; None: it has none yet, or what is there is none.

    Only its footer is looked at: rows may turn out to be damaged.
    """
    data = store.read_index()
    try:
        return None if data is None else Index(data)
    except (ValueError, OSError):
        # The next run writes it anew.
        return None


def run_batches(store: ArtifactStore, run_id: str) -> Iterator[list[IndexRow]]:
    """Yield the rows of a run's results, some thousands at a time.

    Raises:
        StoreError: there are none, or not yet.
        OSError, ValueError, KeyError: the file is no such table, or is damaged.
    """
    with store.open_run_file(run_id, RESULTS_FILE) as file:
        for batch in pq.ParquetFile(file).iter_batches(_ROWS_PER_BATCH):
            yield [_result_row(row) for row in batch.to_pylist()]


def compact(store: ArtifactStore) -> bool:
    """Bring the store's index up to date with its runs, unless what is new is little beside what is in it.

    A damaged index is written anew.

    Memory does not grow with the index, but for the compressed table itself.

    Returns:
        Whether an index was written.

    Raises:
        StoreError: the storage keeps failing.
    """
    index = read_index(store)
    if index is not None and not index.is_whole():
        # What it knew is read from the runs' own tables.
        index = None
    runs = [run_id for run_id in store.run_ids() if index is None or run_id not in index.runs]
    with tempfile.TemporaryDirectory(prefix="objdrive-index-") as folder:
        merged = sqlite3.connect(Path(folder) / "rows.sqlite")
        try:
            merged.executescript(
                "pragma journal_mode = off; pragma synchronous = off; "
                "create table rows (object_id text primary key, class_name text, words text) without rowid"
            )
            added = {run_id: number for run_id in runs if (number := _add_run(merged, store, run_id)) is not None}
            if not added:
                return False
            if index is not None:
                if len(added) < _FEW_RUNS and sum(added.values()) < _FEW_ROWS * index.count:
                    return False
                for batch in index.batches():
                    # What a run says is newer.
                    merged.executemany("insert or ignore into rows values (?, ?, ?)", batch)
            known = sorted({*added, *(index.runs if index else ())})
            store.write_index(_table(merged, known, Path(folder) / "rows.parquet"))
        finally:
            merged.close()
    return True


def _add_run(merged: sqlite3.Connection, store: ArtifactStore, run_id: str) -> int | None:
    """Add a run's rows, and return how many; None: it has no table that can be read."""
    number = 0
    try:
        for batch in run_batches(store, run_id):
            merged.executemany("insert or replace into rows values (?, ?, ?)", batch)
            number += len(batch)
    except (StoreError, OSError, ValueError, KeyError):
        return None
    return number


def _table(merged: sqlite3.Connection, runs: Iterable[str], path: Path) -> bytes:
    schema = _SCHEMA.with_metadata({_RUNS_KEY: json.dumps(list(runs)).encode()})
    rows = merged.execute("select object_id, class_name, words from rows order by object_id")
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        while some := rows.fetchmany(_ROWS_PER_BATCH):
            columns = [pa.array(column, pa.string()) for column in zip(*some, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return path.read_bytes()


def _result_row(row: dict[str, Any]) -> IndexRow:
    free = {name: value for name, value in row.items() if name not in _RESULT_COLUMNS}
    return _row(row["object_id"], row["class_name"], free)


def _row(object_id: str, class_name: str, free: dict[str, Any]) -> IndexRow:
    texts = [value for value in free.values() if isinstance(value, str)]
    # A free column may say the id or the class again.
    words = dict.fromkeys([object_id, class_name, *texts])
    return IndexRow(object_id, class_name, "\n".join(words).lower())
