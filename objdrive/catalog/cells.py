"""Pictures inside of Parquet files, read a few at a time."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from objdrive.catalog.addresses import Cell
from objdrive.catalog.records import BUFFER_BYTES, opened

_MAX_BATCH_ROWS = 1024
_BATCH_BYTES = 8 * 2**20
_OPEN_COLUMNS = 2


def batch_rows(parquet: Any, group: int, columns: list[str]) -> int:
    """How many rows of a row group to read at once, so that these columns (paths of leaves) take little memory."""
    chunks = parquet.metadata.row_group(group)
    rows: int = _BATCH_BYTES * chunks.num_rows // max(column_bytes(chunks, columns), 1)
    return max(1, min(_MAX_BATCH_ROWS, rows))


def column_bytes(group: Any, columns: list[str]) -> int:
    """How many bytes these columns (paths of leaves) of a row group take, uncompressed."""
    chunks = (group.column(index) for index in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)


def picture_leaf(field: Any) -> str:
    """The path of the bytes in a column of pictures: of ``bytes`` or of a struct with ``bytes``; ``""`` for others."""
    kind = field.type
    if holds_bytes(kind):
        return str(field.name)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type):
        return f"{field.name}.bytes"
    return ""


def holds_bytes(kind: Any) -> bool:
    """Whether an Arrow type is of bytes that are not text."""
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(is_a(kind) for is_a in tests)


def read_cell(cell: Cell, mark: str) -> bytes:
    """The bytes of a cell.

    Parquet can't be entered in the middle of a row group. So a process keeps the columns that it reads open where it
    is, and reads on from there as rows are asked for in order. Memory is bounded by a few rows and by what the file's
    writer made one page: by default pyarrow puts 1,024 rows into one, whatever their size.

    Args:
        cell: which.
        mark: changes when the file does.

    Raises:
        LookupError: there is no such row or column, or no bytes in it.
    """
    key = (cell.table, cell.column, mark)
    with _lock:
        column = _open.pop(key, None) or _Column(cell)
        _open[key] = column
        closing = [_open.popitem(last=False)[1] for _ in range(len(_open) - _OPEN_COLUMNS)]
    for one in closing:
        one.close()
    return column.read(cell.row)


class _Column:
    """A column of pictures, open at some row; for use by several threads."""

    def __init__(self, cell: Cell) -> None:
        self._lock = threading.Lock()
        with ExitStack() as stack:
            file = stack.enter_context(opened(cell.table))
            self._parquet = stack.enter_context(pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False))
            self._leaf = picture_leaf(self._parquet.schema_arrow.field(cell.column))
            if not self._leaf:
                raise LookupError(f"the column {cell.column!r} holds no pictures")
            self._close = stack.pop_all()
        sizes = (self._parquet.metadata.row_group(g).num_rows for g in range(self._parquet.metadata.num_row_groups))
        self._starts = [0, *accumulate(sizes)]
        self._batches: Iterator[Any] = iter(())
        self._kept: list[tuple[int, Any]] = []
        self._next = self._end = 0

    def read(self, row: int) -> bytes:
        with self._lock:
            value = self._value(row - 1).as_py()
        if value is None:
            raise LookupError(f"row {row} holds no bytes")
        return bytes(value)

    def close(self) -> None:
        with self._lock:
            self._close.close()

    def _value(self, row: int) -> Any:
        if not 0 <= row < self._starts[-1]:
            raise LookupError(f"there are {self._starts[-1]} rows")
        while True:
            # Threads ask for neighbours a little out of order: the batch before is kept, too.
            for start, batch in self._kept:
                if start <= row < start + len(batch):
                    return batch[row - start]
            if not self._next <= row < self._end:
                self._enter_group(row)
            batch = next(self._batches).column(0)
            values = batch.field("bytes") if pa.types.is_struct(batch.type) else batch
            self._kept = [*self._kept[-1:], (self._next, values)]
            self._next += len(batch)

    def _enter_group(self, row: int) -> None:
        group = next(index for index, end in enumerate(self._starts[1:]) if row < end)
        self._next, self._end = self._starts[group], self._starts[group + 1]
        self._kept = []
        rows = batch_rows(self._parquet, group, [self._leaf])
        self._batches = self._parquet.iter_batches(rows, row_groups=[group], columns=[self._leaf])


_lock = threading.Lock()
_open: OrderedDict[tuple[str, str, str], _Column] = OrderedDict()
