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

DAMAGED = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)
"""What reading a table raises that is damaged, or is none: it depends on which of its bytes are wrong."""


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
            One of `DAMAGED`: it is no such table.
        """
        self._file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        schema = self._file.schema_arrow
        if not schema.equals(_SCHEMA):
            # Nothing but the pages has checksums.
            raise ValueError(f"it has the columns {schema.names}, not {_SCHEMA.names}")
        self.runs = frozenset(json.loads((schema.metadata or {}).get(_RUNS_KEY, b"[]")))
        self.count: int = self._file.metadata.num_rows

    def batches(self) -> Iterator[list[IndexRow]]:
        """Yield the rows, some thousands at a time, sorted by id.

        Raises:
            One of `DAMAGED`: a part of the table is damaged.
        """
        for group in range(self._file.num_row_groups):
            yield self._group(group)

    def whole_batches(self) -> Iterator[list[IndexRow]]:
        """Yield what `batches` yields, without the parts that are damaged."""
        for group in range(self._file.num_row_groups):
            try:
                rows = self._group(group)
            except DAMAGED:
                continue
            yield rows

    def is_whole(self) -> bool:
        """Whether all of the rows can be read, which reads them all."""
        try:
            return sum(map(len, self.batches())) == self.count
        except DAMAGED:
            return False

    def _group(self, number: int) -> list[IndexRow]:
        group = self._file.read_row_group(number, columns=_SCHEMA.names)
        columns = [group.column(name).to_pylist() for name in _SCHEMA.names]
        return list(map(IndexRow._make, zip(*columns, strict=True)))


def read_index(store: ArtifactStore) -> Index | None:
    """The store's index; None: it has none yet.

    Only its footer is looked at: rows may turn out to be damaged.

    Raises:
        One of `DAMAGED`: what is there is no index.
    """
    data = store.read_index()
    return None if data is None else Index(data)


def run_batches(store: ArtifactStore, run_id: str) -> Iterator[list[IndexRow]]:
    """Yield the rows of a run's results, some thousands at a time.

    Raises:
        StoreError: there are none, or not yet.
        One of `DAMAGED`: the file is no such table, or is damaged.
    """
    with store.open_run_file(run_id, RESULTS_FILE) as file:
        for batch in pq.ParquetFile(file).iter_batches(_ROWS_PER_BATCH):
            yield [_result_row(row) for row in batch.to_pylist()]


def compact(store: ArtifactStore) -> bool:
    """Bring the store's index up to date with its runs, unless what is new is little beside what is in it.

    A damaged index is written anew, of the runs' own tables and of what can still be read of it: a run's table may be
    gone.

    Memory does not grow with the index, but for the compressed table itself.

    Returns:
        Whether an index was written.

    Raises:
        StoreError: the storage keeps failing.
    """
    index = _readable_index(store)
    whole = index is not None and index.is_whole()
    there = index.runs if index is not None and whole else frozenset()
    runs = [run_id for run_id in store.run_ids() if run_id not in there]
    with tempfile.TemporaryDirectory(prefix="objdrive-index-") as folder:
        merged = sqlite3.connect(Path(folder) / "rows.sqlite")
        try:
            merged.executescript(
                "pragma journal_mode = off; pragma synchronous = off; "
                "create table rows (object_id text primary key, class_name text, words text) without rowid"
            )
            added = {run_id: number for run_id in runs if (number := _add_run(merged, store, run_id)) is not None}
            kept = 0
            if index is not None:
                few = len(added) < _FEW_RUNS and sum(added.values()) < _FEW_ROWS * index.count
                if whole and (few or not added):
                    return False
                for batch in index.whole_batches():
                    # What a run says is newer.
                    merged.executemany("insert or ignore into rows values (?, ?, ?)", batch)
                    kept += len(batch)
            if not added and not kept:
                return False
            store.write_index(_table(merged, sorted({*added, *there}), Path(folder) / "rows.parquet"))
        finally:
            merged.close()
    return True


def _readable_index(store: ArtifactStore) -> Index | None:
    try:
        return read_index(store)
    except DAMAGED:
        return None


def _add_run(merged: sqlite3.Connection, store: ArtifactStore, run_id: str) -> int | None:
    """Add a run's rows, and return how many; None: it has no table that can be read."""
    number = 0
    try:
        for batch in run_batches(store, run_id):
            merged.executemany("insert or replace into rows values (?, ?, ?)", batch)
            number += len(batch)
    except (StoreError, *DAMAGED):
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
