"""The manifest, a table of objects: its rows, their rules, and streaming them from any fsspec address."""

import csv
import io
import json
import math
import posixpath
import re
import unicodedata
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.compute as pc  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped, unused-ignore]

from objdrive.errors import ObjdriveError, RowError

REQUIRED_COLUMNS = ("object_id", "image", "mask", "class_name")
MAX_CLASS_LENGTH = 64
MAX_ROW_BYTES = 1 << 18
"""A longer CSV row or JSON line is rejected, so that no line can fill the memory."""
MAX_ROW_LINES = 1000
"""A CSV row may span so many lines; what spans more is an unclosed quote."""
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
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 18


@dataclass(frozen=True)
class Row:
    """One object; its row keeps the manifest's rules, and none of its files has been opened yet.

    `mask` ``""`` stands for the image's own alpha channel, `scene` ``""`` for no scene. `metadata` holds the
    free columns as JSON values (dates and such as text, NaN as None). `where` is the manifest file and the
    line (CSV, JSON Lines) or row (Parquet) in it, counted from 1, as in ``"catalog.csv:17"``.
    """

    object_id: str
    image: str
    mask: str
    class_name: str
    scene: str
    metadata: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Reject:
    """One row that breaks a rule: a stable reason `code`, and a `message` that names row and value.

    `object_id` is what the row says, made printable and cut to 128 characters; ``""`` if it can't be told.
    """

    object_id: str
    where: str
    code: str
    message: str


@dataclass(frozen=True)
class Piece:
    """What one reading task reads: a file, or a Parquet file's `row_groups`, which start at `first_row`."""

    address: str
    format: Format
    row_groups: tuple[int, ...] = ()
    first_row: int = 1


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
            if file_format == "csv":
                _check_csv_header(address)
            found.append(Piece(address, file_format))
    return found


def read_piece(piece: Piece) -> Iterator[Row | Reject]:
    """Stream a piece; memory is bounded by a row (CSV, JSON Lines) or a small batch of rows (Parquet).

    Raises:
        ObjdriveError: the file is gone, truncated or corrupt.
    """
    with _explained(piece.address, OSError, pa.ArrowException):
        if piece.format == "parquet":
            yield from _read_parquet(piece)
        elif piece.format == "csv":
            yield from _read_csv(piece.address)
        else:
            yield from _read_jsonl(piece.address)


def read_manifest(manifest: str) -> Iterator[Row | Reject]:
    """Stream all the pieces of a manifest in order; raises as `pieces` and `read_piece` do."""
    for piece in pieces(manifest):
        yield from read_piece(piece)


def _find_files(manifest: str) -> list[str]:
    if "::" in manifest:
        raise ObjdriveError(f"the manifest {manifest!r} is a chained address: unpack it and name the files themselves")
    # Storage back ends raise errors of their own (credentials, connections) that have no base in common.
    with _explained(manifest, Exception):
        fs, path = url_to_fs(manifest, use_listings_cache=False)
        try:
            info = fs.info(path)
        except FileNotFoundError:
            entries = fs.glob(path, detail=True).values() if re.search(r"[*?\[]", path) else []
            found = [entry["name"] for entry in entries if entry["type"] == "file"]
            if not found:
                raise ObjdriveError(f"there is no manifest at {manifest!r}: check the address") from None
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
        raise ObjdriveError(f"the manifest {manifest!r} is neither a regular file nor a folder")
    names = [entry["name"] for entry in fs.ls(path, detail=True) if entry["type"] == "file"]
    found = [
        name for name in names if _suffix(name) in _FORMATS and not posixpath.basename(name).startswith((".", "_"))
    ]
    if not found:
        raise ObjdriveError(f"the folder {manifest!r} holds no manifest file ({', '.join(_FORMATS)})")
    return found


def _format_of(address: str) -> Format:
    suffix = _suffix(address)
    if suffix not in _FORMATS:
        raise ObjdriveError(f"{address!r} has no known manifest format: use one of {', '.join(_FORMATS)}")
    return _FORMATS[suffix]


def _suffix(address: str) -> str:
    return posixpath.splitext(address)[1].lower()


@contextmanager
def _explained(address: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except ObjdriveError:
        raise
    except errors as error:
        raise ObjdriveError(f"the manifest {address!r} can't be read: {type(error).__name__}: {error}") from error


@contextmanager
def _opened(address: str) -> Iterator[io.BufferedReader]:
    fs, path = url_to_fs(address, use_listings_cache=False)
    # Remote files have no readline with a limit of their own.
    with fs.open(path, "rb") as raw, io.BufferedReader(raw, _BUFFER_BYTES) as file:
        yield file


def _require_columns(address: str, columns: list[str]) -> None:
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ObjdriveError(
            f"the manifest {address!r} lacks the column(s) {', '.join(missing)}; it has {_shown(columns)}"
        )
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise ObjdriveError(f"the manifest {address!r} has more than one column {repeated[0]!r}: rename or drop one")


def _parquet_pieces(address: str) -> list[Piece]:
    with _explained(address, Exception), _opened(address) as file, pq.ParquetFile(file) as parquet:
        _require_columns(address, parquet.schema_arrow.names)
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
    found, run, run_start, next_row = [], [], 1, 1
    for group, size in enumerate(sizes):
        run.append(group)
        next_row += size
        if next_row - run_start >= PIECE_ROWS or group == len(sizes) - 1:
            found.append(Piece(address, "parquet", tuple(run), run_start))
            run, run_start = [], next_row
    return found


def _read_parquet(piece: Piece) -> Iterator[Row | Reject]:
    # By default whole column chunks are read at once, and a row group may hold a million rows.
    with (
        _opened(piece.address) as file,
        pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False) as parquet,
    ):
        number = piece.first_row
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=list(piece.row_groups)):
            for fields in _batch_rows(batch):
                where = f"{posixpath.basename(piece.address)}:{number}"
                if isinstance(fields, dict):
                    yield _row_or_reject(fields, where, piece.address)
                else:
                    yield Reject("", where, "encoding", f"{where}: a value can't be decoded: {fields}")
                number += 1


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | ValueError]:
    batch = _times_as_text(batch)
    try:
        yield from batch.to_pylist()
    except ValueError:
        # Text in Parquet is bytes that nobody has checked: find the rows that are to blame.
        for index in range(len(batch)):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except ValueError as error:
                yield error


def _times_as_text(batch: Any) -> Any:
    # Python's dates can't hold all that Arrow's can (nanoseconds, year 10,000).
    for index, field in enumerate(batch.schema):
        if any(is_a(field.type) for is_a in (pa.types.is_date, pa.types.is_time, pa.types.is_timestamp)):
            batch = batch.set_column(index, field.name, pc.cast(batch.column(index), pa.string()))
    return batch


def _check_csv_header(address: str) -> None:
    with _explained(address, Exception), _opened(address) as file:
        _require_columns(address, _csv_header(address, _CsvRecords(file)))


def _csv_header(address: str, records: "_CsvRecords") -> list[str]:
    _, header = next(records, (1, []))
    if isinstance(header, csv.Error):
        raise ObjdriveError(f"the header of {address!r} isn't valid CSV: {header}")
    if not _is_utf8(header):
        raise ObjdriveError(f"the header of {address!r} isn't UTF-8: save the manifest as UTF-8")
    return header


def _read_csv(address: str) -> Iterator[Row | Reject]:
    with _opened(address) as file:
        records = _CsvRecords(file)
        header = _csv_header(address, records)
        for line, record in records:
            where = f"{posixpath.basename(address)}:{line}"
            if isinstance(record, csv.Error):
                yield Reject("", where, "csv_invalid", f"{where}: the row isn't valid CSV: {record}")
            elif len(record) != len(header):
                counts = f"the row has {len(record)} fields, the header has {len(header)}"
                yield Reject("", where, "columns_missing", f"{where}: {counts}: {_shown(record)}")
            else:
                yield _row_or_reject(dict(zip(header, record, strict=True)), where, address)


class _CsvRecords:
    """CSV records of a binary file with the line each starts at; a broken one comes as its `csv.Error`.

    After a broken record reading goes on at the line that follows its first one, so that a quote that was
    never closed costs one row and not all the rows up to the next quote. Bytes that aren't UTF-8 come as lone
    surrogates.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._line = 0
        self._taken: list[bytes] = []
        self._again: deque[bytes] = deque()

    def __iter__(self) -> Iterator[tuple[int, list[str] | csv.Error]]:
        return self

    def __next__(self) -> tuple[int, list[str] | csv.Error]:
        while True:
            self._taken = []
            start = self._line + 1
            try:
                record = next(csv.reader(self._lines(), strict=True))
            except csv.Error as error:
                self._again.extendleft(reversed(self._taken[1:]))
                self._line = start
                return start, error
            if record:
                return start, record

    def _lines(self) -> Iterator[str]:
        size = 0
        while line := self._again.popleft() if self._again else _read_line(self._file, first=self._line == 0):
            self._line += 1
            self._taken.append(line)
            size += len(line)
            if size > MAX_ROW_BYTES or len(self._taken) > MAX_ROW_LINES:
                raise csv.Error(f"it exceeds {MAX_ROW_BYTES} bytes or {MAX_ROW_LINES} lines: is a quote not closed?")
            yield line.decode("utf-8", "surrogateescape")


def _read_jsonl(address: str) -> Iterator[Row | Reject]:
    with _opened(address) as file:
        number = 0
        while line := _read_line(file, first=number == 0):
            number += 1
            if not line.strip():
                continue
            where = f"{posixpath.basename(address)}:{number}"
            try:
                fields = _json_object(line)
            except RowError as error:
                yield Reject("", where, error.code, f"{where}: {error}")
            else:
                yield _row_or_reject({"mask": "", **fields}, where, address)


def _json_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_ROW_BYTES:
        raise RowError("json_invalid", f"the line is longer than {MAX_ROW_BYTES} bytes")
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RowError("encoding", f"the line isn't UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RowError("json_invalid", f"the line isn't JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RowError("json_invalid", f"the line must be a JSON object, not a {type(fields).__name__}")
    return fields


def _read_line(file: io.BufferedReader, *, first: bool) -> bytes:
    """Read a line, ``b""`` at the end; one longer than `MAX_ROW_BYTES` is cut one byte above it."""
    line = file.readline(MAX_ROW_BYTES + 1)
    rest = line
    while len(line) > MAX_ROW_BYTES and rest and not rest.endswith(b"\n"):
        rest = file.readline(MAX_ROW_BYTES)
    return line.removeprefix(_BOM) if first else line


def _row_or_reject(fields: dict[str, Any], where: str, address: str) -> Row | Reject:
    try:
        return _make_row({name: _plain(value) for name, value in fields.items()}, where, address)
    except RowError as error:
        return Reject(_printable(fields.get("object_id")), where, error.code, f"{where}: {error}")
    except RecursionError:
        return Reject("", where, "json_invalid", f"{where}: the row's values are nested too deeply")


def _make_row(fields: dict[str, Any], where: str, address: str) -> Row:
    missing = [name for name in REQUIRED_COLUMNS if name not in fields]
    if missing:
        raise RowError("columns_missing", f"the row lacks {', '.join(missing)}; it has {_shown(list(fields))}")
    if not _is_utf8(fields):
        raise RowError("encoding", f"the row holds text that isn't UTF-8: {_shown(fields)}")
    return Row(
        object_id=_identifier(fields.pop("object_id"), "object_id", "id_invalid"),
        image=_image_address(fields.pop("image"), address),
        mask=_resolve(_text(fields.pop("mask"), "mask", "address_invalid"), "mask", address),
        class_name=_class_name(fields.pop("class_name")),
        scene=_scene(fields.pop("scene", None)),
        metadata=fields,
        where=where,
    )


def _identifier(value: Any, column: str, code: str) -> str:
    text = _text(value, column, code)
    if not _ID.fullmatch(text):
        raise RowError(
            code,
            f"{column} {_shown(value)} must be 1 to 128 of the characters A-Z a-z 0-9 . _ - "
            "and start with a letter or a digit",
        )
    return text


def _scene(value: Any) -> str:
    return "" if value is None or value == "" else _identifier(value, "scene", "scene_invalid")


def _class_name(value: Any) -> str:
    name = " ".join(_text(value, "class_name", "class_invalid").split())
    if not name:
        raise RowError("class_invalid", "class_name is empty: name the class with a word, such as 'mug'")
    if len(name) > MAX_CLASS_LENGTH:
        raise RowError(
            "class_invalid",
            f"class_name {_shown(name)} is longer than {MAX_CLASS_LENGTH} characters",
        )
    if any(c in "{}" or unicodedata.category(c) == "Cc" for c in name):
        raise RowError("class_invalid", f"class_name {_shown(name)} must have no control character and no {{ or }}")
    return name


def _image_address(value: Any, manifest: str) -> str:
    image = _text(value, "image", "address_invalid")
    if not image.strip():
        raise RowError("image_missing_value", f"image is {_shown(value)}: give the address of the object's photo")
    return _resolve(image, "image", manifest)


def _resolve(value: str, column: str, manifest: str) -> str:
    """Resolve a relative address against the manifest file's folder; absolute paths, URLs and "" stay."""
    if "::" in value or "\0" in value:
        raise RowError("address_invalid", f"{column} {_shown(value)} must be a path or URL without '::' or NUL")
    if not value.strip():
        return ""
    if value.startswith("/") or _URL.match(value):
        return value
    scheme, separator, path = manifest.rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(posixpath.dirname(path), value))


def _text(value: Any, column: str, code: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(code, f"{column} {_shown(value)} must be text, not {type(value).__name__}")
    return str(value)


def _plain(value: Any) -> Any:
    """The value as JSON can say it."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)


def _is_utf8(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _printable(value: Any) -> str:
    # repr() escapes whatever can't be printed, lone surrogates included.
    return "" if value is None else repr(str(value))[1:-1][:128]
