"""An index of the catalog, for pages and searches.

A store of a million objects can't be listed for every page. So an index (SQLite, in a temporary file) is kept up to
date in the background, and a request reads one page of it. The index may lag behind the store: before an object is
shown, the store is asked about it (see `serve.objects`).

What is known of the objects comes from the table that the jobs keep in the store (`objdrive.adapters.index`), and from
the results of runs that are not in it yet: a million rows are read in seconds. A listing of the store then tells which
objects came or went without a run, and those that are in no table are read from their artifacts. Each refresh writes
only what has changed.
"""

import asyncio
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from objdrive.adapters.index import DAMAGED, IndexRow, index_row, read_index, run_batches
from objdrive.adapters.store import ArtifactStore
from objdrive.errors import CorruptArtifact, ObjdriveError, StoreError
from serve.errors import logger

_P = ParamSpec("_P")
_T = TypeVar("_T")
_REFRESH_SECONDS = 30.0
_BATCH = 2000
_ARTIFACT_THREADS = 16
_READERS = 4
_AFTER_ALL_IDS = "\x7f"
_LEAST_SEARCHABLE = 3
_FEW = 2000
_SCHEMA = """
pragma journal_mode = wal;
create table objects (
    id integer primary key,
    object_id text unique,
    class_name text,        -- null: not known yet
    words text not null     -- what a search looks at
);
create index by_class on objects (class_name, object_id);
create index as_listed on objects (object_id || '/');
create virtual table search using fts5(
    words, content = 'objects', content_rowid = 'id', tokenize = 'trigram case_sensitive 1'
);
"""
_SEARCHABLE = """
begin;
insert into search (search) values ('rebuild');
create trigger added after insert on objects begin
    insert into search (rowid, words) values (new.id, new.words);
end;
create trigger removed after delete on objects begin
    insert into search (search, rowid, words) values ('delete', old.id, old.words);
end;
create trigger changed after update of words on objects begin
    insert into search (search, rowid, words) values ('delete', old.id, old.words);
    insert into search (rowid, words) values (new.id, new.words);
end;
commit;
"""


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
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="catalog-read")
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._connect().executescript(_SCHEMA)
        self._searchable = False
        self._index_written: float | None = None
        self._runs_read: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_fresh, name="catalog", daemon=True)

    def start(self) -> None:
        """Start to keep the index up to date, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the threads, and delete the index."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._readers.shutdown()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()

    async def aside(self, ask: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Ask on one of the catalog's own threads: no search holds up anything but searches."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, partial(ask, *args, **kwargs))

    def page(self, limit: int, *, after: str = "", prefix: str = "", q: str = "", class_name: str = "") -> list[str]:
        """The first `limit` ids, in order, after `after`.

        Args:
            limit: how many at most.
            after: an id; the page begins after it.
            prefix: only ids that begin with it.
            q: only objects whose id, class or free columns contain it; upper and lower case are the same.
            class_name: only objects of this class.
        """
        found, values = self._containing(q.lower())
        sql = f"select object_id from {found} and object_id > ? and object_id >= ? and object_id < ?"
        values += [after, prefix, prefix + _AFTER_ALL_IDS]
        if class_name:
            sql, values = f"{sql} and class_name = ?", [*values, class_name]
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
            StoreError: the store can't be read.
        """
        writer = self._open()
        try:
            self._read_index(writer)
            self._read_runs(writer)
            self._list(writer)
            self._read_artifacts(writer)
            if not self._searchable:
                writer.executescript(_SEARCHABLE)
                self._searchable = True
        finally:
            writer.close()

    def _containing(self, text: str) -> tuple[str, list[Any]]:
        """SQL for the objects whose words contain a text, with its values."""
        if not text:
            return "objects where true", []
        if self._searchable and len(text) >= _LEAST_SEARCHABLE and "\0" not in text:
            phrase = '"' + text.replace('"', '""') + '"'
            count = "select count(*) from (select 1 from search where search match ? limit ?)"
            if self._read(count, [phrase, _FEW])[0][0] < _FEW:
                # These first, then their order: `cross join` keeps SQLite from going through all objects in order.
                return "search cross join objects on objects.id = search.rowid where search match ?", [phrase]
        # Where many contain it, a page is soon full.
        return "objects where instr(words, ?) > 0", [text]

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

    def _read_index(self, writer: sqlite3.Connection) -> None:
        written = self._store.index_written()
        if written == self._index_written:
            return
        try:
            index = read_index(self._store)
            if index is not None and not index.runs <= self._runs_read:
                for rows in index.batches():
                    if self._stop.is_set():
                        return
                    _describe(writer, rows)
                self._runs_read |= index.runs
        except DAMAGED as error:
            # As without an index; the next run writes it anew, and it is then looked at again.
            logger.warning("the store's table of all objects is damaged, and its runs are read instead: %s", error)
        self._index_written = written

    def _read_runs(self, writer: sqlite3.Connection) -> None:
        for run_id in self._store.run_ids():
            if run_id in self._runs_read or self._stop.is_set():
                continue
            try:
                for rows in run_batches(self._store, run_id):
                    _describe(writer, rows)
            except (StoreError, *DAMAGED) as error:
                # A run that is still going has no table yet; what it commits is read from the artifacts.
                logger.debug("no results of run %s: %s", run_id, error)
                continue
            self._runs_read.add(run_id)

    def _list(self, writer: sqlite3.Connection) -> None:
        """Add and remove what the listing tells: both it and the table go in the order of the ids with a slash."""
        known = "select object_id from objects where object_id || '/' > ? and object_id || '/' <= ?"
        last = ""
        for some in _batches(self._store.object_ids()):
            until = f"{some[-1]}/"
            there = {row[0] for row in writer.execute(known, [last, until])}
            _change(writer, [one for one in some if one not in there], there.difference(some))
            last = until
        gone = [row[0] for row in writer.execute("select object_id from objects where object_id || '/' > ?", [last])]
        _change(writer, [], gone)

    def _read_artifacts(self, writer: sqlite3.Connection) -> None:
        unknown = [row[0] for row in writer.execute("select object_id from objects where class_name is null")]
        with ThreadPoolExecutor(_ARTIFACT_THREADS, thread_name_prefix="catalog") as threads:
            for some in _batches(unknown):
                if self._stop.is_set():
                    return
                _describe(writer, [row for row in threads.map(self._row, some) if row is not None])

    def _row(self, object_id: str) -> IndexRow | None:
        try:
            artifact = self._store.look_up(object_id)
        except CorruptArtifact as error:
            logger.warning("the catalog leaves an object out: %s", error)
            return None
        return None if artifact is None else index_row(artifact)

    def _read(self, sql: str, values: list[Any]) -> list[Any]:
        # A connection for each thread: on one, readers would take turns.
        if not hasattr(self._local, "connection"):
            self._local.connection = self._connect()
        return list(self._local.connection.execute(sql, values).fetchall())

    def _connect(self) -> sqlite3.Connection:
        connection = self._open()
        self._connections.append(connection)
        return connection

    def _open(self) -> sqlite3.Connection:
        path = Path(self._folder.name) / "index.sqlite"
        connection = sqlite3.connect(path, timeout=60, check_same_thread=False)
        # The file does not outlive the process.
        connection.execute("pragma synchronous = off")
        return connection


def _describe(writer: sqlite3.Connection, rows: Iterable[IndexRow]) -> None:
    with writer:
        writer.executemany(
            "insert into objects (object_id, class_name, words) values (?, ?, ?) on conflict (object_id) do update "
            "set class_name = excluded.class_name, words = excluded.words "
            "where class_name is not excluded.class_name or words is not excluded.words",
            rows,
        )


def _change(writer: sqlite3.Connection, new: Iterable[str], gone: Iterable[str]) -> None:
    with writer:
        writer.executemany("insert into objects (object_id, words) values (?, ?)", [(one, one.lower()) for one in new])
        writer.executemany("delete from objects where object_id = ?", [(one,) for one in gone])


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while some := list(islice(iterator, _BATCH)):
        yield some
