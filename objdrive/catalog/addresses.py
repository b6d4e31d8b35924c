"""Addresses of files: without what signs them, in names and messages, and of values inside of Parquet files."""

import posixpath
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, unquote_plus, urlsplit

_CELL = "cell://"
_WEB = re.compile(r"https?://", re.IGNORECASE)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>\\]+")
_CREDENTIALS = re.compile(r"(?<=://)([^/?#@:]*):[^/?#@]*@")
_SIGNING = re.compile(
    r"x-(amz|goog)-.*|x-oss-(?!process).*|q-(sign|ak|key|header|url).*|signature|sig|((access|auth)_?)?token|__token__|auth|authorization|hmac|jwt|api_?key|"
    r"hdnts|hdnea|awsaccesskeyid|googleaccessid|ossaccesskeyid|key-pair-id|policy|expires"
)
_AZURE = re.compile("s[vsprtei]|srt|spr|sip|sdd|ses|scid|sk(oid|tid|t|e|s|v)|s[au]oid")
"""What goes with ``sig`` in Azure's shared access signatures."""


@dataclass(frozen=True)
class Cell:
    """A picture inside of a Parquet file: the file's address, the row, counted from 1, and the column."""

    table: str
    row: int
    column: str

    @property
    def address(self) -> str:
        """The address by which sources know it, as in ``cell:///data/mugs.parquet#17/image``."""
        return f"{_CELL}{self.table}#{self.row}/{quote(self.column, safe='')}"


def cell_of(address: str) -> Cell | None:
    """The cell that an address names; None if it is an ordinary file's."""
    if not is_cell(address):
        return None
    table, _, place = address[len(_CELL) :].rpartition("#")
    row, _, column = place.partition("/")
    return Cell(table, int(row), unquote(column))


def is_cell(address: str) -> bool:
    """Whether an address is of a `Cell`."""
    return address.lower().startswith(_CELL)


def is_web(address: str) -> bool:
    """Whether an address is read by HTTP."""
    return bool(_WEB.match(address))


def unsigned(address: str) -> str:
    """The address without what gives access for a time or to somebody: signatures, tokens, passwords.

    Two signed addresses of one object are equal without their signatures.
    """
    if is_cell(address):
        table, *place = address[len(_CELL) :].rsplit("#", 1)
        return "#".join([_CELL + unsigned(table), *place])
    address = _CREDENTIALS.sub(r"\1@", address)
    if not is_web(address) or "?" not in address:
        return address
    path, _, rest = address.partition("?")
    query, hash_sign, fragment = rest.partition("#")
    parts = query.split("&")
    names = [unquote_plus(part.partition("=")[0]).lower() for part in parts]
    signing = [_SIGNING] + ([_AZURE] if "sig" in names else [])
    kept = [part for part, name in zip(parts, names, strict=True) if not any(s.fullmatch(name) for s in signing)]
    return path + ("?" if kept else "") + "&".join(kept) + hash_sign + fragment


def redacted(value: Any) -> Any:
    """A JSON value whose texts hold no signed address: each is as `unsigned` makes it."""
    if isinstance(value, str):
        return _ADDRESS.sub(lambda found: unsigned(found[0]), value) if "://" in value else value
    if isinstance(value, list):
        return [redacted(item) for item in value]
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    return value


def file_name(address: str) -> str:
    """The last part of a file's address, without a web address's query."""
    return posixpath.basename(urlsplit(address).path if is_web(address) else address)


def resolve(value: str, table: str) -> str:
    """A relative address, from the folder of the `table` that names it; absolute paths and URLs as they are."""
    if value.startswith("/") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        return value
    scheme, separator, path = (table.partition("?")[0] if is_web(table) else table).rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(posixpath.dirname(path), value))
