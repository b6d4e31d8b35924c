"""The manifest, a table of objects: its rows streamed from any fsspec address."""

import posixpath
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped, unused-ignore]

from objdrive.catalog.addresses import file_name, redacted
from objdrive.catalog.parquet import parquet_columns, read_parquet
from objdrive.catalog.records import (
    CsvRecords,
    csv_header,
    json_object,
    opened,
    opened_text,
    read_csv,
    read_line,
)
from objdrive.catalog.rows import REQUIRED_COLUMNS, Reject, Row, known_columns, row_or_reject, shown
from objdrive.errors import ObjdriveError, RowError

PIECE_ROWS = 50_000
"""A Parquet file is split into runs of row groups of about so many rows."""

Format = Literal["parquet", "csv", "jsonl"]

_FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


@dataclass(frozen=True)
class Piece:
    """What one reading task reads: a file, or a Parquet file's `row_groups`, which start at `first_row`.

    `notes` say what was assumed to read the file, for people; they are with a file's first piece.
    """

    address: str
    format: Format
    row_groups: tuple[int, ...] = ()
    first_row: int = 1
    notes: tuple[str, ...] = ()


def pieces(manifest: str) -> list[Piece]:
    """Find what there is to read; opens every file for its header, but reads no row.

    Args:
        manifest: a file, a folder (its files of known formats, not its subfolders) or a glob, at any
            fsspec address.

    Raises:
        ObjdriveError: nothing there, a format that is not known, an unreadable file or a missing column.
    """
    found: list[Piece] = []
    for address in _find_files(manifest):
        file_format = _format_of(address)
        if file_format == "parquet":
            found += _parquet_pieces(address)
        else:
            notes = _check_csv_header(address) if file_format == "csv" else ()
            found.append(Piece(address, file_format, notes=notes))
    return found


def read_piece(piece: Piece) -> Iterator[Row | Reject]:
    """Stream a piece; memory is bounded by a row (CSV, JSON Lines) or a small batch of rows (Parquet).

    Raises:
        ObjdriveError: the file is gone, truncated or corrupt.
    """
    with _explained(piece.address, OSError, pa.ArrowException):
        if piece.format == "parquet":
            yield from read_parquet(piece.address, piece.row_groups, piece.first_row)
        elif piece.format == "csv":
            yield from read_csv(piece.address)
        else:
            yield from _read_jsonl(piece.address)


def read_manifest(manifest: str) -> Iterator[Row | Reject]:
    """Stream all the pieces of a manifest in order; raises as `pieces` and `read_piece` do."""
    for piece in pieces(manifest):
        yield from read_piece(piece)


def _find_files(manifest: str) -> list[str]:
    if "::" in manifest:
        raise ObjdriveError(
            f"the manifest {shown(manifest)} is a chained address: unpack it and name the files themselves"
        )
    # Storage back ends raise errors of their own (credentials, connections) that have no base in common.
    with _explained(manifest, Exception):
        fs, path = url_to_fs(manifest, use_listings_cache=False)
        try:
            info = fs.info(path)
        except FileNotFoundError:
            entries = fs.glob(path, detail=True).values() if re.search(r"[*?\[]", path) else []
            found = [entry["name"] for entry in entries if entry["type"] == "file"]
            if not found:
                raise ObjdriveError(f"there is no manifest at {shown(manifest)}: check the address") from None
        else:
            found = [path] if info["type"] == "file" else _list_folder(fs, path, info["type"], manifest)
    if isinstance(fs, LocalFileSystem):
        return sorted(found)
    # Taken from the address as given: what a file system calls a path may lack the host (sftp, hdfs).
    given = manifest.rstrip("/")
    prefix = given.removesuffix(path) if path and given.endswith(path) else fs.unstrip_protocol("")
    return sorted(prefix + name for name in found)


def _list_folder(fs: Any, path: str, kind: str, manifest: str) -> list[str]:
    if kind != "directory":
        raise ObjdriveError(f"the manifest {shown(manifest)} is neither a regular file nor a folder")
    names = [entry["name"] for entry in fs.ls(path, detail=True) if entry["type"] == "file"]
    found = [
        name for name in names if _suffix(name) in _FORMATS and not posixpath.basename(name).startswith((".", "_"))
    ]
    if not found:
        raise ObjdriveError(f"the folder {shown(manifest)} holds no manifest file ({', '.join(_FORMATS)})")
    return found


def _format_of(address: str) -> Format:
    suffix = _suffix(address)
    if suffix not in _FORMATS:
        raise ObjdriveError(f"{shown(address)} has no known manifest format: use one of {', '.join(_FORMATS)}")
    return _FORMATS[suffix]


def _suffix(address: str) -> str:
    return posixpath.splitext(file_name(address))[1].lower()


@contextmanager
def _explained(address: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except ObjdriveError:
        raise
    except errors as error:
        raise ObjdriveError(
            f"the manifest {shown(address)} can't be read: {type(error).__name__}: {redacted(str(error))}"
        ) from error


def _require_columns(address: str, columns: list[str]) -> None:
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ObjdriveError(
            f"the manifest {shown(address)} lacks the column(s) {', '.join(missing)}; it has {shown(columns)}"
        )
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise ObjdriveError(
            f"the manifest {shown(address)} has more than one column {repeated[0]!r}: rename or drop one"
        )


def _parquet_pieces(address: str) -> list[Piece]:
    with _explained(address, Exception), opened(address) as file, pq.ParquetFile(file) as parquet:
        columns, notes = parquet_columns(parquet)
        _require_columns(address, columns)
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
    found: list[Piece] = []
    run: list[int] = []
    run_start = next_row = 1
    for group, size in enumerate(sizes):
        run.append(group)
        next_row += size
        if next_row - run_start >= PIECE_ROWS or group == len(sizes) - 1:
            found.append(Piece(address, "parquet", tuple(run), run_start, () if found else _notes(address, notes)))
            run, run_start = [], next_row
    return found


def _check_csv_header(address: str) -> tuple[str, ...]:
    with _explained(address, Exception), opened_text(address) as file:
        header = csv_header(address, CsvRecords(file))
        _require_columns(address, header.columns)
    return _notes(address, header.notes)


def _notes(address: str, notes: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{file_name(address)}: {note}" for note in notes)


def _read_jsonl(address: str) -> Iterator[Row | Reject]:
    with opened_text(address) as file:
        number = 0
        while line := read_line(file):
            number += 1
            if not line.strip():
                continue
            where = f"{file_name(address)}:{number}"
            try:
                fields = json_object(line)
            except RowError as error:
                yield Reject("", where, error.code, f"{where}: {error}")
            else:
                yield _jsonl_row(fields, where, address)


def _jsonl_row(fields: dict[str, Any], where: str, address: str) -> Row | Reject:
    names, notes = known_columns(list(fields))
    if len(set(names)) < len(names):
        names, notes = list(fields), ()
    row = row_or_reject({"mask": "", **dict(zip(names, fields.values(), strict=True))}, where, address)
    return replace(row, warnings=(*notes, *row.warnings)) if isinstance(row, Row) else row
