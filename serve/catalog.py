"""An index of the catalog, for pages and searches.

A store of a million objects can't be listed for every page. So an index (SQLite, in a temporary file) is kept up to
date in the background, and a request reads one page of it. The index may lag behind the store: before an object is
shown, the store is asked about it (see `serve.objects`).

The ids come from a listing of the store. Classes and free columns come from the runs' tables of results, which read a
million rows in seconds; objects that are in no table are read from their artifacts.
"""

import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

from objdrive.adapters.artifact import ArtifactMetadata
from objdrive.adapters.store import RESULTS_FILE, ArtifactStore
from objdrive.errors import ObjdriveError
from serve.errors import logger

_T = TypeVar("_T")
_REFRESH_SECONDS = 30.0
_BATCH = 2000
_THREADS = 16
_AFTER_ALL_IDS = "\x7f"
_SCHEMA = """
create table objects (
    object_id text primary key,
    class_name text,    -- null: not known yet
    words text,         -- what a search looks at
    listed integer      -- the last refresh that saw it
) without rowid;
create index by_class on objects (class_name, object_id);
"""
_RESULT_COLUMNS = ("status", "digest", "scene", "where", "warning")


class Catalog:
    """An index of a store's objects. Safe for use from threads.

    Args:
        store: whose objects.
        refresh_seconds: time between two refreshes; longer for a store that takes long to list.
    """

    def __init__(self, store: ArtifactStore, *, refresh_seconds: float = _REFRESH_SECONDS) -> None:
        self._store = store
        self._refresh_seconds = refresh_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="objdrive-catalog-")
        self._lock = threading.Lock()
        self._index = self._connect()
        self._index.executescript(f"pragma journal_mode=wal; {_SCHEMA}")
        self._refreshes = 0
        self._runs_read: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_fresh, name="catalog", daemon=True)

    def start(self) -> None:
        """Start to keep the index up to date, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, and delete the index."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._index.close()
        self._folder.cleanup()

    def page(self, limit: int, *, after: str = "", prefix: str = "", q: str = "", class_name: str = "") -> list[str]:
        """The first `limit` ids, in order, after `after`.

        Args:
            limit: how many at most.
            after: an id; the page begins after it.
            prefix: only ids that begin with it.
            q: only objects whose id, class or free columns contain it; upper and lower case are the same.
            class_name: only objects of this class.
        """
        sql = "select object_id from objects where object_id > ? and object_id >= ? and object_id < ?"
        values: list[Any] = [after, prefix, prefix + _AFTER_ALL_IDS]
        if class_name:
            sql, values = f"{sql} and class_name = ?", [*values, class_name]
        if q:
            sql, values = f"{sql} and instr(words, ?) > 0", [*values, q.lower()]
        return [row[0] for row in self._read(f"{sql} order by object_id limit ?", [*values, limit])]

    def classes(self, limit: int, *, prefix: str = "") -> list[tuple[str, int]]:
        """The classes with the most objects among ids with this prefix, and how many each has."""
        sql = (
            "select class_name, count(*) as n from objects where class_name is not null and object_id >= ? "
            "and object_id < ? group by class_name order by n desc, class_name limit ?"
        )
        return self._read(sql, [prefix, prefix + _AFTER_ALL_IDS, limit])

    def refresh(self) -> None:
        """Bring the index up to date with the store, now.

        Raises:
            StoreError: the store can't be listed.
        """
        writer = self._connect()
        try:
            self._list(writer)
            self._read_runs(writer)
            self._read_artifacts(writer)
        finally:
            writer.close()

    def _keep_fresh(self) -> None:
        while True:
            started = time.monotonic()
            try:
                self.refresh()
            except ObjdriveError as error:
                logger.warning("the catalog could not be refreshed, and stays as it is: %s", error)
            except Exception:
                # Whatever it was may be over at the next refresh.
                logger.exception("the catalog could not be refreshed, and stays as it is")
            took = time.monotonic() - started
            if self._stop.wait(max(self._refresh_seconds, 10 * took)):
                return

    def _list(self, writer: sqlite3.Connection) -> None:
        self._refreshes += 1
        number = self._refreshes
        for some in _batches(self._store.object_ids()):
            with writer:
                writer.executemany(
                    "insert into objects (object_id, words, listed) values (?, lower(?), ?) "
                    "on conflict (object_id) do update set listed = excluded.listed",
                    [(object_id, object_id, number) for object_id in some],
                )
        with writer:
            writer.execute("delete from objects where listed < ?", [number])

    def _read_runs(self, writer: sqlite3.Connection) -> None:
        for run_id in self._store.run_ids():
            if run_id in self._runs_read or self._stop.is_set():
                continue
            try:
                with self._store.open_run_file(run_id, RESULTS_FILE) as file:
                    for batch in pq.ParquetFile(file).iter_batches(_BATCH):
                        _describe(writer, (_described_row(row) for row in batch.to_pylist()))
            except (ObjdriveError, OSError, ValueError, KeyError) as error:
                # A run that is still going has no table yet; what it commits is read from the artifacts.
                logger.debug("no results of run %s: %s", run_id, error)
                continue
            self._runs_read.add(run_id)

    def _read_artifacts(self, writer: sqlite3.Connection) -> None:
        unknown = [row[0] for row in self._read("select object_id from objects where class_name is null", [])]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="catalog") as threads:
            for some in _batches(unknown):
                if self._stop.is_set():
                    return
                artifacts = threads.map(self._store.current, some)
                _describe(writer, (_described(artifact) for artifact in artifacts if artifact is not None))

    def _read(self, sql: str, values: list[Any]) -> list[Any]:
        with self._lock:
            return self._index.execute(sql, values).fetchall()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(Path(self._folder.name) / "index.sqlite", timeout=60, check_same_thread=False)


def _describe(writer: sqlite3.Connection, described: Iterable[tuple[str, str, str]]) -> None:
    with writer:
        writer.executemany("update objects set class_name = ?, words = ? where object_id = ?", described)


def _described(artifact: ArtifactMetadata) -> tuple[str, str, str]:
    return artifact.class_name, _words(artifact.object_id, artifact.class_name, artifact.row), artifact.object_id


def _described_row(row: dict[str, Any]) -> tuple[str, str, str]:
    free = {name: value for name, value in row.items() if name not in _RESULT_COLUMNS}
    return row["class_name"], _words(row["object_id"], row["class_name"], free), row["object_id"]


def _words(object_id: str, class_name: str, row: dict[str, Any]) -> str:
    texts = [value for value in row.values() if isinstance(value, str)]
    return "\n".join([object_id, class_name, *texts]).lower()


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while some := list(islice(iterator, _BATCH)):
        yield some
