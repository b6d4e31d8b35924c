"""Sources, the files that rows name: looked up and read at any fsspec address, under limits."""

from dataclasses import dataclass
from typing import Any, Literal

from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore]

from objdrive.errors import RowError

MAX_BYTES = 64 * 2**20

Role = Literal["image", "mask"]


@dataclass(frozen=True)
class SourceMark:
    """A source file as storage describes it: `size` in bytes; `mark` changes when the file does."""

    uri: str
    size: int
    mark: str


def stat_source(uri: str, *, role: Role = "image") -> SourceMark:
    """Look a source up without opening it.

    Raises:
        RowError: ``image_missing`` or ``mask_missing``; ``source_not_file`` for folders, pipes and devices;
            ``source_unreadable`` for anything else that storage reports.
    """
    try:
        fs, path = url_to_fs(uri, use_listings_cache=False)
        info = fs.info(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(uri, role) from error
    except Exception as error:
        raise _unreadable(uri, role, error) from error
    # Opening a pipe would wait for a writer for ever.
    if info["type"] != "file":
        raise RowError("source_not_file", f"the {role} {uri!r} is not a regular file ({info['type']})")
    if info["size"] is None:
        raise RowError("source_unreadable", f"the {role} {uri!r} has a server that doesn't tell its size")
    return SourceMark(uri, int(info["size"]), _modification_mark(info))


def read_source(mark: SourceMark, *, role: Role = "image") -> bytes:
    """Read a whole source.

    Raises:
        RowError: ``image_too_large`` (more than `MAX_BYTES`, nothing is read then) or ``image_missing``, with
            ``mask_`` for a mask; ``source_unreadable`` for anything else that storage reports.
    """
    if mark.size > MAX_BYTES:
        raise RowError(
            f"{role}_too_large",
            f"the {role} {mark.uri!r} has {mark.size} bytes: at most {MAX_BYTES} are allowed, scale it down",
        )
    try:
        fs, path = url_to_fs(mark.uri, use_listings_cache=False)
        data: bytes = fs.cat_file(path)
    except FileNotFoundError as error:
        raise _missing(mark.uri, role) from error
    except Exception as error:
        raise _unreadable(mark.uri, role, error) from error
    return data


def _missing(uri: str, role: Role) -> RowError:
    return RowError(f"{role}_missing", f"the {role} {uri!r} is missing or can't be read: check its address")


def _unreadable(uri: str, role: Role, error: Exception) -> RowError:
    # Caught broadly by the callers: storage back ends raise errors that have no base in common.
    return RowError("source_unreadable", f"the {role} {uri!r} can't be read: {type(error).__name__}: {error}")


def _modification_mark(info: dict[str, Any]) -> str:
    # Each file system has a key of its own; an ETag says more than a time.
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
    return next((str(info[key]) for key in keys if info.get(key)), "")
