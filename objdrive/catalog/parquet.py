"""Rows of Parquet files; pictures in them stay where they are, and rows name their cells."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.compute as pc  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from objdrive.catalog.addresses import Cell, file_name
from objdrive.catalog.cells import batch_rows, column_bytes, holds_bytes, picture_leaf
from objdrive.catalog.records import BUFFER_BYTES, opened
from objdrive.catalog.rows import REQUIRED_COLUMNS, Reject, Row, known_columns, row_or_reject

_PICTURE_COLUMNS = ("image", "mask")
_LARGE_GROUP_BYTES = 256 * 2**20
_PATH = ".path"


def parquet_columns(parquet: Any) -> tuple[list[str], tuple[str, ...]]:
    """The columns of an open file by the names that manifests use, and notes on what was assumed to read them."""
    names, notes = known_columns(parquet.schema_arrow.names)
    notes += tuple(
        f"the column {field.name!r} holds bytes and is left out"
        for field, name in zip(parquet.schema_arrow, names, strict=True)
        if _is_left_out(field, name)
    )
    return names, notes + _slow_groups(parquet, names)


def _slow_groups(parquet: Any, names: list[str]) -> tuple[str, ...]:
    fields = [f for f, name in zip(parquet.schema_arrow, names, strict=True) if name in _PICTURE_COLUMNS]
    leaves = [leaf for leaf in map(picture_leaf, fields) if leaf]
    groups = (parquet.metadata.row_group(index) for index in range(parquet.metadata.num_row_groups))
    largest = max((column_bytes(group, leaves) for group in groups), default=0)
    if largest <= _LARGE_GROUP_BYTES:
        return ()
    return (
        f"it has row groups with {largest >> 20} MiB of pictures, which are read through for every few rows: "
        "it takes less time and memory if it is written with fewer rows in a group (pyarrow: row_group_size=100)",
    )


def read_parquet(address: str, row_groups: Sequence[int], first_row: int) -> Iterator[Row | Reject]:
    """Stream the rows of row groups, of which the first starts at `first_row`, counted from 1."""
    # By default whole column chunks are read at once, and a row group may hold a million rows.
    with opened(address) as file, pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet:
        names = parquet_columns(parquet)[0]
        number = first_row
        for group in row_groups:
            for fields in _group_rows(parquet, group, names, address, number):
                where = f"{file_name(address)}:{number}"
                if isinstance(fields, dict):
                    yield row_or_reject(fields, where, address)
                else:
                    yield Reject("", where, "encoding", f"{where}: a value can't be decoded: {fields}")
                number += 1


def _group_rows(
    parquet: Any, group: int, names: list[str], address: str, first: int
) -> Iterator[dict[str, Any] | ValueError]:
    fields = list(zip(parquet.schema_arrow, names, strict=True))
    plain = [
        f for f, name in fields if not (name in _PICTURE_COLUMNS and picture_leaf(f)) and not _is_left_out(f, name)
    ]
    pictures = {name: f for f, name in fields if name in _PICTURE_COLUMNS and picture_leaf(f)}
    nulls = {name: _nulls(parquet.metadata.row_group(group), picture_leaf(f)) for name, f in pictures.items()}
    leaves = [leaf for f in plain for leaf in _leaves(parquet, f.name)]
    for name, field in pictures.items():
        leaves += [leaf for leaf in _leaves(parquet, field.name) if leaf == field.name + _PATH]
        # Where all have a picture or none, the pictures need not be touched.
        leaves += [picture_leaf(field)] if nulls[name] is None else []
    rename = {field.name: name for field, name in fields}
    for batch in parquet.iter_batches(batch_rows(parquet, group, leaves), row_groups=[group], columns=leaves):
        known = batch.select([field.name for field in plain])
        known = known.rename_columns([rename[name] for name in known.schema.names])
        columns = {name: _addresses(batch, f, nulls[name], address, first) for name, f in pictures.items()}
        for index, row in enumerate(_batch_rows(known)):
            yield row if isinstance(row, ValueError) else row | {name: of[index] for name, of in columns.items()}
        first += len(batch)


def _leaves(parquet: Any, column: str) -> list[str]:
    schema = parquet.schema
    paths = [schema.column(index).path for index in range(len(schema.names))]
    return [path for path in paths if path == column or path.startswith(f"{column}.")]


def _nulls(group: Any, leaf: str) -> bool | None:
    """Whether a picture is missing in all rows of a group (True) or in none (False); None: in some, or not known."""
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == leaf)
    statistics = column.statistics
    if statistics is None or not statistics.has_null_count:
        return None
    if statistics.null_count in (0, group.num_rows):
        return bool(statistics.null_count)
    return None


def _addresses(batch: Any, field: Any, nulls: bool | None, table: str, first: int) -> list[Cell | str | None]:
    """Where a column's pictures are: their cells, else the path beside the missing bytes, else nowhere."""
    values: Any = batch.column(field.name) if field.name in batch.schema.names else None
    paths: list[Any] = [None] * len(batch)
    missing = [bool(nulls)] * len(batch)
    if values is not None and pa.types.is_struct(values.type):
        kinds = values.type
        # flatten() gives a part the nulls of the whole.
        parts = {kinds.field(index).name: part for index, part in enumerate(values.flatten())}
        paths = parts["path"].to_pylist() if "path" in parts else paths
        values = parts.get("bytes")
    if nulls is None and values is not None:
        missing = values.is_null().to_pylist()
    return [
        path if gone else Cell(table, first + index, field.name)
        for index, (gone, path) in enumerate(zip(missing, paths, strict=True))
    ]


def _is_left_out(field: Any, name: str) -> bool:
    # Some writers do not mark text as such; a name or a class word is text all the same.
    return name not in (*REQUIRED_COLUMNS, "scene") and _has_bytes(field.type)


def _has_bytes(kind: Any) -> bool:
    return holds_bytes(kind) or any(_has_bytes(kind.field(index).type) for index in range(kind.num_fields))


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | ValueError]:
    batch = _as_text(batch)
    try:
        yield from batch.to_pylist()
    except ValueError:
        # Text in Parquet is bytes that nobody has checked: find the rows that are to blame.
        for index in range(len(batch)):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except ValueError as error:
                yield error


def _as_text(batch: Any) -> Any:
    # Python's dates can't hold all that Arrow's can (nanoseconds, year 10,000).
    for index, field in enumerate(batch.schema):
        if holds_bytes(field.type):
            batch = batch.set_column(index, field.name, pc.cast(batch.column(index), pa.large_string(), safe=False))
        elif any(is_a(field.type) for is_a in (pa.types.is_date, pa.types.is_time, pa.types.is_timestamp)):
            batch = batch.set_column(index, field.name, pc.cast(batch.column(index), pa.string()))
    return batch
