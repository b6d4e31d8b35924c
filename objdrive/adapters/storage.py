"""The few storage operations that the store is built on: whole files, created once or replaced at once."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from objdrive.adapters.parallel import THREADS
from objdrive.errors import StoreError

TEMPORARY_PREFIX = ".tmp-"

_T = TypeVar("_T")
_FIRST_PAUSE_SECONDS = 0.1
_MEMORY_LOCK = threading.RLock()
_WRITTEN = ("mtime", "LastModified", "last_modified", "updated", "created")
"""Where filesystems note when a file was last written. Those with "created" alone make files anew."""


def open_files(url: str, attempts: int, *, landmark: str = "") -> "Files":
    """Return the files under `url`, any fsspec address; every call on them is tried `attempts` times.

    With a `landmark`, a folder that storage that is there has: without it a missing file is no answer but a failure.
    Object stores, which have no folders and are not mounted, are not asked for it.
    """
    filesystem, root = fsspec.url_to_fs(url, **_options(url))
    if isinstance(filesystem, LocalFileSystem):
        return LocalFiles(filesystem, root, root, attempts, landmark)
    kind = S3Files if "s3" in filesystem.protocol else Files
    return kind(filesystem, root, url.rstrip("/"), attempts)


def _options(url: str) -> dict[str, Any]:
    if not url.startswith(("s3://", "s3a://")):
        return {}
    # Left to itself, the client opens ten connections, remembers every listing, and asks for a file's size before it
    # reads it, to read large ones in pieces.
    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {
        "use_listings_cache": False,
        "max_concurrency": 1,
        "config_kwargs": {"max_pool_connections": THREADS, **configured},
    }


class Files:
    """Files under one root, named by paths relative to it, on a filesystem whose single writes are atomic.

    Object stores are such: S3 (``If-None-Match``), GCS and Azure create files atomically through fsspec.
    `url` is the root's address.
    """

    def __init__(self, filesystem: Any, root: str, url: str, attempts: int) -> None:
        self.url = url
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._attempts = attempts
        # fsspec's in-memory filesystem creates by "look, then write": threads must not come between.
        memory = isinstance(filesystem, MemoryFileSystem)
        self._guard: AbstractContextManager[Any] = _MEMORY_LOCK if memory else nullcontext()

    def read(self, path: str) -> bytes | None:
        """Return the bytes of the file, None if there is none."""
        try:
            return self._tried("read", path, self._read, FileNotFoundError)
        except FileNotFoundError:
            return None

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        """Write a new file atomically; False if one was there already and holds other bytes.

        Equal bytes count as written by this call: an attempt may have failed after the write had really
        happened. A file that is not `durable` may be gone after a power failure.
        """
        try:
            self._tried("create", path, lambda at: self._create(at, data, durable), FileExistsError)
        except FileExistsError:
            return self.read(path) == data
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Write a file atomically over whatever was there."""
        self._tried("write", path, lambda at: self._replace(at, data))

    def remove(self, path: str) -> None:
        """Remove a file; none there is fine."""
        try:
            self._tried("remove", path, self._remove, FileNotFoundError)
        except FileNotFoundError:
            return

    def files(self, folder: str) -> dict[str, float]:
        """Return all files under `folder`: their names relative to it, and when they were last written.

        In seconds since the epoch. Empty if there is no such folder.
        """
        try:
            return self._tried("list", folder, self._files, FileNotFoundError)
        except FileNotFoundError:
            return {}

    def folders(self, folder: str) -> Iterator[str]:
        """Yield the names of the folders directly under `folder`, as they come; none if it is not there.

        In the order in which object stores list them: as if each name ended with a slash.
        """
        try:
            names = self._tried("list", folder, self._folders, FileNotFoundError)
        except FileNotFoundError:
            return
        yield from sorted(names, key=lambda name: f"{name}/")

    def trees(self, folder: str) -> Iterator[tuple[str, set[str] | None]]:
        """Yield what `folders` yields, each with the names of all files under it where storage tells in passing.

        None stands for those that were not told, because telling costs a call of its own: see `files`.
        """
        return ((name, None) for name in self.folders(folder))

    def open(self, path: str, mode: str) -> IO[Any]:
        """Open a file as a stream. Raises StoreError if it is to be read and is not there."""
        try:
            return self._tried("open", path, lambda at: self._open(at, mode), FileNotFoundError)
        except FileNotFoundError as error:
            raise StoreError(f"there is no file {self.url}/{path}") from error

    def prune(self, folder: str) -> None:
        """Remove `folder` if it is empty. Object stores have no folders to remove."""

    def _tried(self, verb: str, path: str, call: Callable[[str], _T], *passed: type[OSError]) -> _T:
        """Return ``call(full path)``; the exceptions in `passed` are answers, not failures."""
        failures = 0
        while True:
            try:
                with self._guard:
                    return call(f"{self._root}/{path}")
            except passed:
                raise
            # Not only OSError: backends let their own errors through, such as botocore's for a lost
            # connection.
            except Exception as error:
                failures += 1
                if failures == self._attempts:
                    raise StoreError(
                        f"cannot {verb} {self.url}/{path}: {type(error).__name__}: {error} "
                        f"(tried {failures} times); check that the storage is there, writable and not full"
                    ) from error
                time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (failures - 1))

    def _read(self, path: str) -> bytes:
        return bytes(self._filesystem.cat_file(path))

    def _create(self, path: str, data: bytes, durable: bool) -> None:
        self._filesystem.pipe_file(path, data, mode="create")

    def _replace(self, path: str, data: bytes) -> None:
        self._filesystem.pipe_file(path, data)

    def _remove(self, path: str) -> None:
        self._filesystem.rm_file(path)

    def _files(self, folder: str) -> dict[str, float]:
        self._filesystem.invalidate_cache(folder)
        found = self._filesystem.find(folder, detail=True)
        return {_below(folder, path): _written(info) for path, info in found.items()}

    def _folders(self, folder: str) -> list[str]:
        self._filesystem.invalidate_cache(folder)
        entries = self._filesystem.ls(folder, detail=True)
        return [_below(folder, entry["name"]) for entry in entries if entry["type"] == "directory"]

    def _open(self, path: str, mode: str) -> IO[Any]:
        stream: IO[Any] = self._filesystem.open(path, mode)
        return stream


class S3Files(Files):
    """The same on S3, where listings come in pages of a thousand keys, and a page costs as much as a small file."""

    def folders(self, folder: str) -> Iterator[str]:
        """See `Files.folders`. Holds one page."""
        prefix = self._key(f"{self._root}/{folder}/")
        for page in self._pages(folder, Prefix=prefix, Delimiter="/"):
            for common in page.get("CommonPrefixes", ()):
                yield common["Prefix"].removeprefix(prefix).rstrip("/")

    def trees(self, folder: str) -> Iterator[tuple[str, set[str] | None]]:
        """See `Files.trees`. Holds one page, and one folder's names."""
        prefix = self._key(f"{self._root}/{folder}/")
        pages = self._pages(folder, Prefix=prefix)
        keys = (one["Key"].removeprefix(prefix) for page in pages for one in page.get("Contents", ()))
        split = (key.partition("/") for key in keys)
        for name, group in groupby(split, key=lambda parts: parts[0]):
            names = {inside for _, slash, inside in group if slash}
            if names:
                yield name, names

    def _pages(self, folder: str, **asked: str) -> Iterator[dict[str, Any]]:
        def ask(path: str) -> dict[str, Any]:
            answer: dict[str, Any] = self._filesystem.call_s3(
                "list_objects_v2", Bucket=path.partition("/")[0], **asked, **self._filesystem.req_kw
            )
            return answer

        more = True
        while more:
            try:
                page = self._tried("list", folder, ask, FileNotFoundError)
            except FileNotFoundError:
                return
            yield page
            more = bool(page.get("IsTruncated"))
            asked["ContinuationToken"] = page.get("NextContinuationToken", "")

    @staticmethod
    def _key(path: str) -> str:
        return path.partition("/")[2]


class LocalFiles(Files):
    """The same on a local or network-mounted filesystem with hard links (POSIX)."""

    def __init__(self, filesystem: Any, root: str, url: str, attempts: int, landmark: str) -> None:
        super().__init__(filesystem, root, url, attempts)
        self._landmark = landmark

    def prune(self, folder: str) -> None:
        """Remove `folder` and the folders in it, as far as they are empty."""
        for directory, _, _ in os.walk(f"{self._root}/{folder}", topdown=False):
            # A folder that is not empty, perhaps since a moment ago, refuses, as it should.
            with suppress(OSError):
                Path(directory).rmdir()

    def _tried(self, verb: str, path: str, call: Callable[[str], _T], *passed: type[OSError]) -> _T:
        return super()._tried(verb, path, lambda at: self._found(call, at), *passed)

    def _found(self, call: Callable[[str], _T], path: str) -> _T:
        try:
            return call(path)
        except FileNotFoundError as error:
            if self._landmark and not Path(self._root, self._landmark).is_dir():
                raise OSError(f"there is no folder {self._root}/{self._landmark}: is it mounted?") from error
            raise

    def _read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def _create(self, path: str, data: bytes, durable: bool) -> None:
        self._place(path, data, os.link, durable)

    def _replace(self, path: str, data: bytes) -> None:
        self._place(path, data, os.replace, durable=True)

    def _place(self, path: str, data: bytes, place: Callable[[Path, Path], None], durable: bool) -> None:
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            place(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        if not durable:
            return
        # The name is durable only when the folder is: artifact.json must not outlive a file that it vouches
        # for.
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _remove(self, path: str) -> None:
        Path(path).unlink()

    def _files(self, folder: str) -> dict[str, float]:
        found = {}
        for directory, _, names in os.walk(folder):
            for name in names:
                path = Path(directory, name)
                # One that goes meanwhile is not there.
                with suppress(FileNotFoundError):
                    found[_below(folder, str(path))] = path.stat().st_mtime
        return found

    def _folders(self, folder: str) -> list[str]:
        return [entry.name for entry in os.scandir(folder) if entry.is_dir()]

    def _open(self, path: str, mode: str) -> IO[Any]:
        if "r" not in mode:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        return super()._open(path, mode)


def _written(info: dict[str, Any]) -> float:
    moment = next(info[name] for name in _WRITTEN if info.get(name) is not None)
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if isinstance(moment, datetime):
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return float(moment)


def _below(folder: str, path: str) -> str:
    # Filesystems differ in whether listings keep the leading slash.
    return path.strip("/").removeprefix(folder.strip("/")).lstrip("/")
