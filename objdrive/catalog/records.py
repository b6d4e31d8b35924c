"""Records of CSV and JSON Lines files, read in bounded memory."""

import csv
import io
import json
import posixpath
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore]

from objdrive.catalog.rows import Reject, Row, is_utf8, row_or_reject, shown
from objdrive.errors import ObjdriveError, RowError

MAX_ROW_BYTES = 1 << 18
"""A longer CSV row or JSON line is rejected, so that no line can fill the memory."""
MAX_ROW_LINES = 1000
"""A CSV row may span so many lines; what spans more is an unclosed quote."""
_BOM = b"\xef\xbb\xbf"
BUFFER_BYTES = 1 << 18


@contextmanager
def opened(address: str) -> Iterator[io.BufferedReader]:
    """A file at any fsspec address, read in chunks of `BUFFER_BYTES`."""
    fs, path = url_to_fs(address, use_listings_cache=False)
    # Remote files have no readline with a limit of their own.
    with fs.open(path, "rb") as raw, io.BufferedReader(raw, BUFFER_BYTES) as file:
        yield file


def csv_header(address: str, records: "CsvRecords") -> list[str]:
    """The first record.

    Raises:
        ObjdriveError: it is not valid CSV in UTF-8.
    """
    _, header = next(records, (1, []))
    if isinstance(header, csv.Error):
        raise ObjdriveError(f"the header of {address!r} isn't valid CSV: {header}")
    if not is_utf8(header):
        raise ObjdriveError(f"the header of {address!r} isn't UTF-8: save the manifest as UTF-8")
    return header


def read_csv(address: str) -> Iterator[Row | Reject]:
    """Stream the rows of a CSV file; a row that breaks a rule comes as its reject."""
    with opened(address) as file:
        records = CsvRecords(file)
        header = csv_header(address, records)
        for line, record in records:
            where = f"{posixpath.basename(address)}:{line}"
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
        while line := self._again.popleft() if self._again else read_line(self._file, first=self._line == 0):
            self._line += 1
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
        raise RowError("encoding", f"the line isn't UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RowError("json_invalid", f"the line isn't JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RowError("json_invalid", f"the line must be a JSON object, not a {type(fields).__name__}")
    return fields


def read_line(file: io.BufferedReader, *, first: bool) -> bytes:
    """Read a line, ``b""`` at the end; one longer than `MAX_ROW_BYTES` is cut one byte above it."""
    line = file.readline(MAX_ROW_BYTES + 1)
    rest = line
    while len(line) > MAX_ROW_BYTES and rest and not rest.endswith(b"\n"):
        rest = file.readline(MAX_ROW_BYTES)
    return line.removeprefix(_BOM) if first else line
