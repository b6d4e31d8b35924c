"""What there is to draw, and what became of it: on disk, so that memory does not grow with the catalog."""

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jobs.generation.prompts import Prompt
from jobs.generation.settings import GenerationSettings, PlannedPicture
from objdrive.adapters.artifact import ArtifactMetadata
from objdrive.errors import ObjdriveError
from objdrive.training.recipe import drawing_recipe

Order = Literal["object", "prompt"]
_TABLES = """
CREATE TABLE known (key TEXT PRIMARY KEY, scored INTEGER, repeated INTEGER DEFAULT 0) WITHOUT ROWID;
CREATE TABLE objects (no INTEGER PRIMARY KEY, object_id TEXT UNIQUE, digest TEXT, class_name TEXT, steps INTEGER,
                      guidance_scale REAL);
CREATE TABLE pictures (id INTEGER PRIMARY KEY, object_no INTEGER, prompt_no INTEGER, seed INTEGER, drawn INTEGER);
CREATE TABLE faults (object_id TEXT, prompt_id TEXT, seed INTEGER, code TEXT, message TEXT);
"""
_COLUMNS = "id, object_id, digest, class_name, prompt_no, seed, steps, guidance_scale"
_ORDERS: dict[Order, str] = {"object": "id", "prompt": "prompt_no, id"}
_TO_DRAW, _DRAWN, _FAILED = 0, 1, 2
_TAKEN = 2


class Plan:
    """The pictures of one run: every object by every prompt that is for it, with every seed.

    Used by one thread, but for `counts`: ``already`` and ``to draw``, later ``drawn`` and ``found`` (of which
    ``scored`` have got scores) and ``failed``. `to_score`: how many of those to draw are there, and lack scores alone.

    Args:
        settings: what the pictures have in common.
        prompts: what objects are drawn by.
        seeds: of each object and prompt.
        steps: see `objdrive.training.recipe.drawing_recipe`.
        guidance_scale: the same.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        steps: int | None,
        guidance_scale: float | None,
    ) -> None:
        self.settings = settings
        self.prompts = prompts
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.objects = 0
        self.to_score = 0
        self._seeds = seeds
        self._steps = steps
        self._guidance_scale = guidance_scale
        self._folder = tempfile.TemporaryDirectory(prefix="objdrive-plan-")
        # Interrupts come to the main thread, which made this; the file goes with the process, so nothing is synced.
        self._db = sqlite3.connect(Path(self._folder.name) / "plan.sqlite", isolation_level=None)
        self._db.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_TABLES}")
        self._db.execute("BEGIN")

    def know(self, pictures: Iterable[tuple[str, bool]]) -> None:
        """The keys of pictures that are in the index, each with whether it has scores there.

        They need not be drawn, but where pictures are measured, one without scores is looked at again.
        """
        self._db.executemany(
            "INSERT INTO known (key, scored) VALUES (?, ?) "
            "ON CONFLICT (key) DO UPDATE SET scored = max(scored, excluded.scored), repeated = 1",
            pictures,
        )

    def knows(self, key: str) -> bool:
        """Whether the picture of this key is in the index."""
        return self._scored(key) is not None

    def has_repeated(self) -> bool:
        """Whether a key is in the index more than once."""
        (found,) = self._db.execute("SELECT EXISTS (SELECT 1 FROM known WHERE repeated)").fetchone()
        return bool(found)

    def stays(self, key: str, scored: bool) -> bool:
        """Whether a row of the index stays, of which the newest are asked about first.

        Of rows of one key stays the first one with scores, or the first one if none has any.
        """
        found = self._db.execute("SELECT scored, repeated FROM known WHERE key = ?", (key,)).fetchone()
        if found is None or not found[1]:
            return True
        if found[0] != scored:
            return False
        self._db.execute("UPDATE known SET scored = ? WHERE key = ?", (_TAKEN, key))
        return True

    def add(self, object_id: str, artifact: ArtifactMetadata | ObjdriveError) -> None:
        """Take an object in, unless it is there already; or what is wrong with it."""
        try:
            if isinstance(artifact, ObjdriveError):
                raise artifact
            recipe = drawing_recipe(artifact.recipe, object_id, steps=self._steps, guidance_scale=self._guidance_scale)
        except ObjdriveError as error:
            self._fault((object_id, None, None, error.code, str(error)))
            return
        named = (object_id, artifact.digest, artifact.class_name, recipe.sample_steps, recipe.guidance_scale)
        inserted = self._db.execute(
            "INSERT OR IGNORE INTO objects (object_id, digest, class_name, steps, guidance_scale) "
            "VALUES (?, ?, ?, ?, ?)",
            named,
        )
        if inserted.rowcount:
            self.objects += 1
            self._add_pictures(inserted.lastrowid or 0, named)

    def _add_pictures(self, object_no: int, named: tuple[str, str, str, int, float]) -> None:
        object_id, digest, class_name, steps, guidance_scale = named
        rows = []
        for number, prompt in enumerate(self.prompts):
            if not prompt.is_for(class_name):
                continue
            for seed in self._seeds:
                picture = PlannedPicture(
                    object_id, digest, class_name, prompt.id, prompt.text, seed, steps, guidance_scale
                )
                scored = self._scored(picture.key(self.settings))
                done = scored is not None and (scored or not self.settings.scored)
                if scored is not None and not done:
                    self.to_score += 1
                rows.append((object_no, number, seed, _DRAWN if done else _TO_DRAW))
        self._db.executemany("INSERT INTO pictures (object_no, prompt_no, seed, drawn) VALUES (?, ?, ?, ?)", rows)
        already = sum(drawn for *_, drawn in rows)
        self.counts.update({"already": already, "to draw": len(rows) - already})

    def idle_prompts(self) -> list[Prompt]:
        """Prompts that are for no object of the plan."""
        used = {number for (number,) in self._db.execute("SELECT DISTINCT prompt_no FROM pictures")}
        return [prompt for number, prompt in enumerate(self.prompts) if number not in used]

    def to_draw(self, after: int, most: int) -> list[dict[str, Any]]:
        """The next rows to draw, at most so many, objects side by side; `after` is the last one's id."""
        found = self._rows("WHERE drawn = ? AND id > ? ORDER BY id LIMIT ?", (_TO_DRAW, after, most))
        rows = []
        for number, picture in found:
            key = picture.key(self.settings)
            rows.append({"id": number, **asdict(picture), "key": key, "path": picture.path(key, self.settings)})
        return rows

    def scored(self) -> None:
        """Count a picture that has got scores."""
        self.counts["scored"] += 1

    def drawn(self, numbers: Iterable[tuple[int, str]]) -> None:
        """Pictures, by id, that are there now: each ``drawn``, or ``found`` where an earlier run left it."""
        for number, status in numbers:
            self._settle(number, _DRAWN, status)

    def failed(self, row: dict[str, Any]) -> None:
        """A picture that can't be drawn; the row has the reason's `code` and `message`."""
        self._settle(row["id"], _FAILED, "")
        self._fault(tuple(row[name] for name in ("object_id", "prompt_id", "seed", "code", "message")))

    def shown(self, order: Order, most: int) -> Iterator[tuple[PlannedPicture, str]]:
        """The first pictures that are there, in that order, each with its path."""
        for _, picture in self._rows(f"WHERE drawn = ? ORDER BY {_ORDERS[order]} LIMIT ?", (_DRAWN, most)):
            yield picture, picture.path(picture.key(self.settings), self.settings)

    def faults(self, most: int = -1) -> Iterator[dict[str, Any]]:
        """What could not be drawn, and why; at most so many."""
        for row in self._db.execute("SELECT * FROM faults ORDER BY rowid LIMIT ?", (most,)):
            yield dict(zip(("object_id", "prompt_id", "seed", "code", "message"), row, strict=True))

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()
        self._folder.cleanup()

    def _rows(self, where: str, values: tuple[int, ...]) -> Iterator[tuple[int, PlannedPicture]]:
        query = f"SELECT {_COLUMNS} FROM pictures JOIN objects ON object_no = no {where}"
        for number, object_id, digest, class_name, prompt_no, *rest in self._db.execute(query, values):
            prompt = self.prompts[prompt_no]
            yield number, PlannedPicture(object_id, digest, class_name, prompt.id, prompt.text, *rest)

    def _scored(self, key: str) -> int | None:
        """Whether the index has scores of a picture; None: it does not have the picture."""
        found = self._db.execute("SELECT scored FROM known WHERE key = ?", (key,)).fetchone()
        return None if found is None else int(found[0])

    def _settle(self, number: int, drawn: int, status: str) -> None:
        self._db.execute("UPDATE pictures SET drawn = ? WHERE id = ?", (drawn, number))
        self.counts["to draw"] -= 1
        if status:
            self.counts[status] += 1

    def _fault(self, values: tuple[Any, ...]) -> None:
        self._db.execute("INSERT INTO faults VALUES (?, ?, ?, ?, ?)", values)
        self.counts["failed"] += 1
        self.reasons[values[3]] += 1
