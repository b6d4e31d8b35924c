"""The few storage operations that the store is built on: whole files, created once or replaced at once."""

import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from objdrive.errors import StoreError

TEMPORARY_PREFIX = ".tmp-"

_T = TypeVar("_T")
_FIRST_PAUSE_SECONDS = 0.1
_MEMORY_LOCK = threading.RLock()


def open_files(url: str, attempts: int, *, landmark: str = "") -> "Files":
    """Return the files under `url`, any fsspec address; every call on them is tried `attempts` times.

    With a `landmark`, a folder that storage that is there has: without it a missing file is no answer but a failure.
    Object stores, which have no folders and are not mounted, are not asked for it.
    """
    filesystem, root = fsspec.url_to_fs(url)
    if isinstance(filesystem, LocalFileSystem):
        return LocalFiles(filesystem, root, root, attempts, landmark)
    return Files(filesystem, root, url.rstrip("/"), attempts)


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

    def names(self, folder: str) -> set[str]:
        """Return the names, relative to `folder`, of all files under it; empty if there is no such folder."""
        try:
            return self._tried("list", folder, self._names, FileNotFoundError)
        except FileNotFoundError:
            return set()

    def folders(self, folder: str) -> list[str]:
        """Return the sorted names of the folders directly under `folder`; empty if there is none."""
        try:
            return sorted(self._tried("list", folder, self._folders, FileNotFoundError))
        except FileNotFoundError:
            return []

    def modified(self, path: str) -> float | None:
        """Return when the file was last written, in seconds since the epoch, None if there is none."""
        try:
            return self._tried("look up", path, self._modified, FileNotFoundError)
        except FileNotFoundError:
            return None

    def open(self, path: str, mode: str) -> IO[Any]:
        """Open a file as a stream."""
        return self._tried("open", path, lambda at: self._open(at, mode))

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

    def _names(self, folder: str) -> set[str]:
        self._filesystem.invalidate_cache(folder)
        return {_below(folder, path) for path in self._filesystem.find(folder)}

    def _folders(self, folder: str) -> list[str]:
        self._filesystem.invalidate_cache(folder)
        entries = self._filesystem.ls(folder, detail=True)
        return [_below(folder, entry["name"]) for entry in entries if entry["type"] == "directory"]

    def _modified(self, path: str) -> float:
        self._filesystem.invalidate_cache(path)
        moment = self._filesystem.modified(path)
        return float((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())

    def _open(self, path: str, mode: str) -> IO[Any]:
        stream: IO[Any] = self._filesystem.open(path, mode)
        return stream


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

    def _names(self, folder: str) -> set[str]:
        return {_below(folder, f"{directory}/{name}") for directory, _, names in os.walk(folder) for name in names}

    def _folders(self, folder: str) -> list[str]:
        return [entry.name for entry in os.scandir(folder) if entry.is_dir()]

    def _open(self, path: str, mode: str) -> IO[Any]:
        if "r" not in mode:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        return super()._open(path, mode)


def _below(folder: str, path: str) -> str:
    # Filesystems differ in whether listings keep the leading slash.
    return path.strip("/").removeprefix(folder.strip("/")).lstrip("/")
