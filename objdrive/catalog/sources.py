"""Sources, the files that rows name: looked up and read at any fsspec address, under limits."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fsspec import filesystem  # type: ignore[import-untyped, unused-ignore]
from fsspec.asyn import AsyncFileSystem  # type: ignore[import-untyped, unused-ignore]
from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore]

from objdrive.catalog.addresses import cell_of, is_web, redacted, unsigned
from objdrive.catalog.cells import read_cell
from objdrive.catalog.web import ForbiddenHost, web_options
from objdrive.errors import RowError

MAX_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20
_WINDOWS_PATH = re.compile(r"\\|(^|/)[A-Za-z]:/")

Role = Literal["image", "mask"]


@dataclass(frozen=True)
class SourceMark:
    """A source file as storage describes it: `size` in bytes, None if it isn't told; `mark` changes when it does.

    `uri` is what the file is read by, signatures included: only `objdrive.catalog.addresses.unsigned` is for the eyes
    of others.
    """

    uri: str
    size: int | None
    mark: str


def stat_source(uri: str, *, role: Role = "image", hosts: tuple[str, ...] = ()) -> SourceMark:
    """Look a source up without opening it.

    Args:
        uri: any fsspec address, or a `objdrive.catalog.addresses.Cell`'s.
        role: what it is, for messages.
        hosts: the only ones that web addresses may have, see `objdrive.catalog.web.web_options`; empty: all but
            link-local and metadata addresses.

    Raises:
        RowError: ``image_missing`` or ``mask_missing``; ``source_not_file`` for folders, pipes and devices;
            ``source_forbidden`` for a web address at a host that may not be asked; ``source_unreadable`` for anything
            else that storage reports.
    """
    cell = cell_of(uri)
    try:
        fs, path = _storage(cell.table if cell else uri, hosts)
        info = fs.info(path)
    except Exception as error:
        raise _fault(uri, role, error) from error
    # Opening a pipe would wait for a writer for ever.
    if info["type"] != "file":
        raise RowError("source_not_file", f"the {role} {unsigned(uri)!r} is not a regular file ({info['type']})")
    size = None if info["size"] is None else int(info["size"])
    mark = _modification_mark(info, signed=unsigned(uri) != uri)
    if cell:
        return SourceMark(uri, None, f"{size} {mark}" if mark else "")
    return SourceMark(uri, size, mark)


def read_source(mark: SourceMark, *, role: Role = "image", hosts: tuple[str, ...] = ()) -> bytes:
    """Read a whole source; of a web address never more than `MAX_BYTES`, whatever its server says.

    Raises:
        RowError: ``image_too_large`` (more than `MAX_BYTES`) or ``image_missing``, with ``mask_`` for a mask;
            ``source_forbidden`` and ``source_unreadable`` as from `stat_source`.
    """
    if mark.size is not None and mark.size > MAX_BYTES:
        raise _too_large(mark.uri, role, f"{mark.size}")
    cell = cell_of(mark.uri)
    try:
        data = read_cell(cell, mark.mark) if cell else _read_file(mark, hosts)
    except Exception as error:
        raise _fault(mark.uri, role, error) from error
    if len(data) > MAX_BYTES:
        raise _too_large(mark.uri, role, f"more than {MAX_BYTES}")
    return data


def _storage(uri: str, hosts: tuple[str, ...]) -> tuple[Any, str]:
    if is_web(uri):
        # Not by url_to_fs(), to which "::", as in an IPv6 address, chains file systems.
        return filesystem("http", use_listings_cache=False, **web_options(hosts)), uri
    found: tuple[Any, str] = url_to_fs(uri, use_listings_cache=False)
    return found


def _read_file(mark: SourceMark, hosts: tuple[str, ...]) -> bytes:
    fs, path = _storage(mark.uri, hosts)
    if not is_web(mark.uri):
        # S3 refuses to give a range of an empty object.
        empty = mark.size == 0 and isinstance(fs, AsyncFileSystem)
        return b"" if empty else bytes(fs.cat_file(path, start=0, end=MAX_BYTES + 1))
    data = bytearray()
    # A block size of 0 streams; a size, which is not used then, saves asking for it once more.
    with fs.open(path, "rb", block_size=0, size=1) as file:
        while len(data) <= MAX_BYTES and (chunk := file.read(_CHUNK_BYTES)):
            data += chunk
    return bytes(data)


def _fault(uri: str, role: Role, error: Exception) -> RowError:
    # Caught broadly by the callers: storage back ends raise errors that have no base in common.
    shown = f"the {role} {unsigned(uri)!r}"
    forbidden = next((cause for cause in _causes(error) if isinstance(cause, ForbiddenHost)), None)
    if forbidden:
        return RowError("source_forbidden", f"{shown} may not be read: {forbidden}")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        why = redacted(f" ({error.__cause__})") if error.__cause__ else ""
        backslash = ": is it a Windows path? Paths are written with / and from the manifest's folder"
        hint = backslash if _WINDOWS_PATH.search(uri) and not is_web(uri) else ": check its address"
        return RowError(f"{role}_missing", f"{shown} is missing or can't be read{why}{hint}")
    return RowError("source_unreadable", redacted(f"{shown} can't be read: {type(error).__name__}: {error}"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _too_large(uri: str, role: Role, size: str) -> RowError:
    return RowError(
        f"{role}_too_large",
        f"the {role} {unsigned(uri)!r} has {size} bytes: at most {MAX_BYTES} are allowed, scale it down",
    )


def _modification_mark(info: dict[str, Any], *, signed: bool) -> str:
    # Each file system has a key of its own; an ETag says more than a time. What is dropped from a signed address may
    # have said which object it is, so only a mark of the content counts there.
    etags, times = ("ETag", "etag"), ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
    keys = etags if signed else (*etags, *times)
    return next((str(info[key]) for key in keys if info.get(key)), "")
