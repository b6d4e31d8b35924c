"""From checked rows to tasks: duplicates out, scenes together, in memory that doesn't grow with the manifest."""

import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.ingest import Checked, pack, unpack
from jobs.leases import Task
from objdrive.catalog.addresses import unsigned
from objdrive.catalog.rows import Reject
from objdrive.catalog.sources import SourceMark

MAX_SCENE = 6
"""Most objects that one adapter is taught at once."""


@dataclass(frozen=True)
class Unit:
    """What one fine-tune works on: a row, or all rows of a scene in the order of their object ids."""

    rows: tuple[Checked, ...]
    previews: bool


def plan(
    records: Iterable[Checked | Reject],
    *,
    previews: int,
    prompt_fault: Callable[[Sequence[str]], str],
    on_reject: Callable[[Reject], None],
    on_committed: Callable[[Checked], None],
    on_repeat: Callable[[Checked], None],
) -> Iterator[Task]:
    """Turn checked rows into tasks.

    A row whose id stood in an earlier row is repeated (same picture, mask, class and scene) or rejected. Rows of a
    scene wait for the end of the manifest, where the scenes' tasks come.

    Args:
        records: rows in manifest order.
        previews: for how many of the first objects pictures are drawn.
        prompt_fault: why the base can't read the prompts of a scene with these class words; empty if it can.
        on_reject: told of rows that can't be used.
        on_committed: told of rows whose artifact is committed already.
        on_repeat: told of repeated rows.
    """
    with tempfile.TemporaryDirectory(prefix="objdrive-plan-") as folder:
        index = _Index(Path(folder) / "rows.sqlite")
        planned = 0
        for record in records:
            earlier = None if isinstance(record, Reject) else index.add(record)
            if isinstance(record, Reject):
                on_reject(record)
            elif earlier is not None:
                _settle_duplicate(record, *earlier, on_reject, on_repeat)
            elif record.row.scene:
                index.add_to_scene(record)
            elif record.digest and record.members == (record.row.object_id,):
                on_committed(record)
            elif message := prompt_fault([record.row.class_name]):
                on_reject(_unreadable(record, message))
            else:
                planned += 1
                yield _task([record], planned <= previews)
        for size, images, members in index.scenes():
            if fault := _scene_fault(size, images):
                for record in members:
                    on_reject(_scene_reject(record, *fault))
            elif _scene_committed(scene := list(members)):
                for record in scene:
                    on_committed(record)
            elif message := prompt_fault([record.row.class_name for record in scene]):
                for record in scene:
                    on_reject(_unreadable(record, message))
            else:
                planned += len(scene)
                yield _task(scene, planned - len(scene) < previews)
        index.close()


def _unreadable(record: Checked, message: str) -> Reject:
    return Reject(record.row.object_id, record.row.where, "class_too_long", f"{record.row.where}: {message}")


def _task(rows: list[Checked], previews: bool) -> Task:
    return Task(key=rows[0].row.object_id, payload=Unit(tuple(rows), previews))


def _settle_duplicate(
    record: Checked,
    where: str,
    same: bool,
    on_reject: Callable[[Reject], None],
    on_repeat: Callable[[Checked], None],
) -> None:
    if same:
        on_repeat(record)
        return
    row = record.row
    message = (
        f"{row.where}: object_id {row.object_id!r} was used by {where} already, for other content: "
        "give every object its own id"
    )
    on_reject(Reject(row.object_id, row.where, "duplicate_id", message))


def _scene_fault(size: int, images: tuple[str, str]) -> tuple[str, str] | None:
    if images[0] != images[1]:
        return (
            "scene_image_differs",
            f"its objects name different images ({unsigned(images[0])!r}, {unsigned(images[1])!r})",
        )
    if size > MAX_SCENE:
        return "scene_too_large", f"it has {size} objects, one adapter takes {MAX_SCENE} at most"
    return None


def _scene_reject(record: Checked, code: str, fault: str) -> Reject:
    row = record.row
    return Reject(row.object_id, row.where, code, f"{row.where}: scene {row.scene!r} can't be used: {fault}")


def _scene_committed(scene: list[Checked]) -> bool:
    ids = tuple(record.row.object_id for record in scene)
    return bool(scene[0].digest) and all(r.digest == scene[0].digest and r.members == ids for r in scene)


def _same(mark: SourceMark) -> str:
    """What two addresses of one source have in common; they differ in their signatures, if in anything."""
    return unsigned(mark.uri) if mark.mark else mark.uri


class _Index:
    """The ids seen so far and the rows of scenes, on disk: a manifest may have millions of either."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, content TEXT, location TEXT) WITHOUT ROWID")
        self._db.execute(
            "CREATE TABLE members (scene TEXT, id TEXT, image TEXT, record TEXT, PRIMARY KEY (scene, id)) WITHOUT ROWID"
        )
        self._db.execute("BEGIN")

    def add(self, record: Checked) -> tuple[str, bool] | None:
        """Note a row's id; if it was there, return where, and whether that row had the same content."""
        row = record.row
        content = json.dumps([_same(record.image), record.mask and _same(record.mask), row.class_name, row.scene])
        inserted = self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?, ?)", (row.object_id, content, row.where))
        if inserted.rowcount:
            return None
        earlier, where = self._db.execute("SELECT content, location FROM ids WHERE id = ?", (row.object_id,)).fetchone()
        return where, earlier == content

    def add_to_scene(self, record: Checked) -> None:
        """Keep a row until its scene's turn."""
        values = (record.row.scene, record.row.object_id, _same(record.image), pack(record))
        self._db.execute("INSERT INTO members VALUES (?, ?, ?, ?)", values)

    def scenes(self) -> Iterator[tuple[int, tuple[str, str], Iterator[Checked]]]:
        """Each scene's size, two images that differ unless all are the same, and rows in the order of object ids."""
        scenes = self._db.execute(
            "SELECT scene, COUNT(*), MIN(image), MAX(image) FROM members GROUP BY scene ORDER BY scene"
        )
        for name, size, first, last in scenes:
            rows = self._db.execute("SELECT record FROM members WHERE scene = ? ORDER BY id", (name,))
            yield size, (first, last), (unpack(record) for (record,) in rows)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()
