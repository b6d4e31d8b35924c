"""Records of CSV and JSON Lines files, read in bounded memory."""

import codecs
import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore]

from objdrive.catalog.addresses import file_name
from objdrive.catalog.rows import (
    REQUIRED_COLUMNS,
    Reject,
    Row,
    is_utf8,
    known_columns,
    reads_as,
    row_or_reject,
    shown,
)
from objdrive.errors import ObjdriveError, RowError

MAX_ROW_BYTES = 1 << 18
"""A longer CSV row or JSON line is rejected, so that no line can fill the memory."""
MAX_ROW_LINES = 1000
"""A CSV row may span so many lines; what spans more is an unclosed quote."""
BUFFER_BYTES = 1 << 18
_MOST_UTF8_BYTES = 4
_DELIMITERS = (",", ";", "\t", "|")
_SEPARATOR_LINE = re.compile(rb'"?sep=([,;\t|:])"?', re.IGNORECASE)
"""Excel's own first line."""


@contextmanager
def opened(address: str) -> Iterator[io.BufferedReader]:
    """A file at any fsspec address, read in chunks of `BUFFER_BYTES`."""
    fs, path = url_to_fs(address, use_listings_cache=False)
    # Remote files have no readline with a limit of their own.
    with fs.open(path, "rb") as raw, io.BufferedReader(raw, BUFFER_BYTES) as file:
        yield file


@contextmanager
def opened_text(address: str) -> Iterator[io.BufferedReader]:
    """A text file at any fsspec address as UTF-8, without a byte order mark; UTF-16 with a mark is turned into it."""
    with opened(address) as file:
        start = file.peek(3)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            recoded: Any = _FromUtf16(file)
            with io.BufferedReader(recoded, BUFFER_BYTES) as text:
                yield text
        else:
            file.read(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            yield file


class _FromUtf16(io.RawIOBase):
    def __init__(self, file: io.BufferedReader) -> None:
        # What is broken is passed on as bytes that aren't UTF-8, which cost the rows that hold them.
        self._text = codecs.getreader("utf-16")(file, "surrogatepass")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        most = len(buffer) // _MOST_UTF8_BYTES
        data = self._text.read(most, most).encode("utf-8", "surrogatepass")
        buffer[: len(data)] = data
        return len(data)


@dataclass(frozen=True)
class CsvHeader:
    """The names of a CSV file's columns, and notes for people on what was assumed; none for plain CSV."""

    columns: list[str]
    notes: tuple[str, ...]


def csv_header(address: str, records: "CsvRecords") -> CsvHeader:
    """Read the header, and set `records` to read what follows as the header says.

    Raises:
        ObjdriveError: it is not valid CSV in UTF-8.
    """
    first = records.line()
    named = _SEPARATOR_LINE.fullmatch(first.strip())
    if named:
        records.delimiter = named[1].decode()
    else:
        records.put_back(first)
        records.delimiter = _likely_delimiter(first.decode("utf-8", "surrogateescape"))
    _, header = next(records, (1, []))
    if isinstance(header, csv.Error):
        raise ObjdriveError(f"the header of {shown(address)} isn't valid CSV: {header}")
    if not is_utf8(header):
        raise ObjdriveError(f"the header of {shown(address)} isn't UTF-8{reads_as(header)}: save the manifest as UTF-8")
    records.padded = any(name != name.strip() for name in header)
    stripped = [name.strip().strip('"') if records.padded else name for name in header]
    columns, notes = known_columns(stripped)
    if records.padded:
        notes = ("spaces around fields do not count", *notes)
    if records.delimiter != ",":
        notes = (f"fields are separated by {records.delimiter!r}", *notes)
    return CsvHeader(columns, notes)


def _likely_delimiter(header: str) -> str:
    """The delimiter that finds most of the columns that must be there; a comma unless another finds more."""

    def found(delimiter: str) -> int:
        names = [name.strip().strip('"') for name in header.split(delimiter)]
        return len(set(known_columns(names)[0]) & set(REQUIRED_COLUMNS))

    return max(_DELIMITERS, key=found)


def read_csv(address: str) -> Iterator[Row | Reject]:
    """Stream the rows of a CSV file; a row that breaks a rule comes as its reject."""
    with opened_text(address) as file:
        records = CsvRecords(file)
        header = csv_header(address, records).columns
        for line, record in records:
            where = f"{file_name(address)}:{line}"
            if isinstance(record, csv.Error):
                yield Reject("", where, "csv_invalid", f"{where}: the row isn't valid CSV: {record}")
            elif len(record) != len(header):
                counts = f"the row has {len(record)} fields, the header has {len(header)}"
                yield Reject("", where, "columns_missing", f"{where}: {counts}: {shown(record)}")
            else:
                yield row_or_reject(dict(zip(header, record, strict=True)), where, address)


class CsvRecords:
    """CSV records of a binary file with the line each starts at; a broken one comes as its `csv.Error`.

    After a broken record reading goes on at the line that follows its first one, so that a quote that was
    never closed costs one row and not all the rows up to the next quote. Bytes that aren't UTF-8 come as lone
    surrogates. `delimiter` and `padded` (spaces around fields do not count) may be set
    between records.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.delimiter = ","
        self.padded = False
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
            reader = csv.reader(self._lines(), strict=True, delimiter=self.delimiter, skipinitialspace=self.padded)
            try:
                record = next(reader)
            except csv.Error as error:
                self._again.extendleft(reversed(self._taken[1:]))
                self._line = start
                return start, error
            if record:
                return start, [field.strip() for field in record] if self.padded else record

    def line(self) -> bytes:
        """Take the next line, ``b""`` at the end."""
        line = self._again.popleft() if self._again else read_line(self._file)
        self._line += bool(line)
        return line

    def put_back(self, line: bytes) -> None:
        """Have the line that was taken last come again."""
        if line:
            self._again.appendleft(line)
            self._line -= 1

    def _lines(self) -> Iterator[str]:
        size = 0
        while line := self.line():
            self._taken.append(line)
            size += len(line)
            if size > MAX_ROW_BYTES or len(self._taken) > MAX_ROW_LINES:
                raise csv.Error(f"it exceeds {MAX_ROW_BYTES} bytes or {MAX_ROW_LINES} lines: is a quote not closed?")
            yield line.decode("utf-8", "surrogateescape")


def json_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        RowError: ``json_invalid`` or ``encoding``.
    """
    if len(line) > MAX_ROW_BYTES:
        raise RowError("json_invalid", f"the line is longer than {MAX_ROW_BYTES} bytes")
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        hint = reads_as([line.decode("utf-8", "surrogateescape")])
        raise RowError("encoding", f"the line isn't UTF-8{hint}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RowError("json_invalid", f"the line isn't JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RowError("json_invalid", f"the line must be a JSON object, not a {type(fields).__name__}")
    return fields


def read_line(file: io.BufferedReader) -> bytes:
    """Read a line, ``b""`` at the end; one longer than `MAX_ROW_BYTES` is cut one byte above it."""
    line = file.readline(MAX_ROW_BYTES + 1)
    rest = line
    while len(line) > MAX_ROW_BYTES and rest and not rest.endswith(b"\n"):
        rest = file.readline(MAX_ROW_BYTES)
    return line
