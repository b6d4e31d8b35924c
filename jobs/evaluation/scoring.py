"""Ray Data: scores of a table of pictures, by each of some encoders."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs.drawing import Pool
from jobs.evaluation.pictures import as_dataset, as_tables, decode_pictures
from objdrive.errors import ObjdriveError
from objdrive.evaluation.encoders import identify, load_encoder
from objdrive.evaluation.layout import around, find_things
from objdrive.evaluation.prompts import EvaluationPrompt
from objdrive.evaluation.reference import MEASURED, Design, Gallery, Reference, check_shown
from objdrive.evaluation.ruler import METRICS, Asked, Ruler, embed
from objdrive.pictures import as_pixels

_FEATURES = ["objects", "backdrops"]
_KEPT = ("method", "object_id", "class_name", "prompt_id", "kind", "number")
SCHEMA = pa.schema(
    [(name, pa.int64() if name == "number" else pa.string()) for name in (*_KEPT, "encoder")]
    + [(name, pa.float64()) for name in METRICS]
    + [("box", pa.list_(pa.float64())), ("things", pa.int64()), ("features", pa.list_(pa.float32()))]
)
"""A row for each picture and encoder; `box` and `things` are the same for all encoders: see `_layout`."""


@dataclass(frozen=True)
class Scorer:
    """An encoder by name, with the base that the name ``clip`` means."""

    name: str
    base: str
    clip: str | None
    fingerprint: str

    def load(self, pool: Pool) -> Any:
        """The encoder, on the worker that calls."""
        return load_encoder(self.name, base=self.base, clip=self.clip, device=pool.prepare())


class Embed:
    """Ray Data's worker that turns a gallery's pictures into features."""

    def __init__(self, scorer: Scorer, pool: Pool) -> None:
        self._encoder = scorer.load(pool)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The rows with features in place of pictures."""
        features = embed(self._encoder, as_pixels(decode_pictures(batch["picture"])))
        table = batch.drop_columns("picture")
        for name, part in zip(_FEATURES, features, strict=True):
            table = table.append_column(name, pa.array(list(part.astype(np.float32))))
        return table


class Measure:
    """Ray Data's worker that scores pictures by one encoder."""

    def __init__(self, scorer: Scorer, pool: Pool, ruler: "list[ray.ObjectRef[Ruler]]") -> None:
        """`ruler` holds a reference to a `Ruler`, so that its features are sent to every node once."""
        self._name = scorer.name
        self._encoder = scorer.load(pool)
        (self._ruler,) = ray.get(ruler)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Scores of the rows."""
        rows = batch.select(_KEPT).to_pylist()
        asked = [Asked(row["object_id"], row["prompt_id"]) for row in rows]
        pictures = decode_pictures(batch["picture"])
        scores = self._ruler.measure(self._encoder, as_pixels(pictures), asked)
        table = [
            row | {"encoder": self._name} | asdict(score) | _layout(picture)
            for row, picture, score in zip(rows, pictures, scores, strict=True)
        ]
        return pa.Table.from_pylist(table, SCHEMA)


def _layout(picture: np.ndarray) -> dict[str, Any]:
    """Where what a picture shows is, all things in one box, and how many there are."""
    things = find_things(picture)
    return {"box": list(astuple(around(things))) if things else None, "things": len(things)}


@ray.remote(num_cpus=0.9)
def make_ruler(
    scorer: Scorer,
    pool: Pool,
    references: Sequence[Reference],
    prompts: Sequence[EvaluationPrompt],
    gallery: Gallery | None,
) -> Ruler:
    """The ruler of an encoder, made where the encoder may be loaded."""
    return Ruler(scorer.load(pool), references, prompts, gallery)


def score(
    pictures: Path,
    scorers: Sequence[Scorer],
    references: Sequence[Reference],
    prompts: Sequence[EvaluationPrompt],
    gallery: Path | None,
    pool: Pool,
    out: Path,
) -> None:
    """Score the table `pictures` by every scorer, and write the table `out`."""
    drawn = pq.read_table(pictures)
    partial = out.with_suffix(".partial")
    with pq.ParquetWriter(partial, SCHEMA) as writer:
        for scorer in scorers:
            shown = None if gallery is None else read_gallery(gallery, prompts, scorer, pool)
            options = {"num_gpus": pool.gpus} if pool.gpus else {}
            ruler = make_ruler.options(**options).remote(scorer, pool, references, prompts, shown)
            # Waited for here: it would hold a core that the pool's workers wait for.
            ray.wait([ruler], fetch_local=False)
            shots = as_dataset(drawn)
            scored = shots.map_batches(
                Measure, fn_constructor_args=(scorer, pool, [ruler]), **pool.options(shots.num_blocks())
            )
            for table in as_tables(scored):
                writer.write_table(table.select(SCHEMA.names).cast(SCHEMA))
    partial.replace(out)


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The rows that `score` wrote."""
    table = pq.read_table(path)
    features = table["features"].to_numpy()
    rows: list[dict[str, Any]] = table.drop_columns("features").to_pylist()
    return [row | {"features": one} for row, one in zip(rows, features, strict=True)]


def check_gallery(path: Path, object_ids: Iterable[str], prompt_ids: Iterable[str]) -> None:
    """Make sure that the gallery shows these.

    Raises:
        ObjdriveError: there is no gallery, or it lacks some.
    """
    if not path.is_file():
        raise ObjdriveError(f"no gallery {path}: jobs/evaluation_set.py composes one")
    table = pq.read_table(path, columns=["object_id", "prompt_id"])
    shown: list[list[Any]] = [table[name].to_pylist() for name in table.column_names]
    check_shown(f"the gallery {path}", (object_ids, prompt_ids), shown)


def by_chance(path: Path, object_ids: Sequence[str]) -> float:
    """How often a design of an object's class, taken by chance, is the object's: the mean over objects."""
    table = pq.read_table(path, columns=["object_id", "class_name", "design"])
    shown = {(row["class_name"], row["design"]): row["object_id"] for row in table.to_pylist()}
    rivals = Counter(class_name for class_name, _ in shown)
    classes = {object_id: class_name for (class_name, _), object_id in shown.items() if object_id}
    return sum(1 / rivals[classes[one]] for one in object_ids) / len(object_ids)


def read_gallery(path: Path, prompts: Sequence[EvaluationPrompt], scorer: Scorer, pool: Pool) -> Gallery:
    """The gallery as an encoder sees it; its features are kept beside it.

    The first pictures of each drawing and prompt are left out: they stand for a method (see `pictures.SCENES`).
    """
    features = _features(path, scorer, pool)
    wanted = {prompt.id for prompt in prompts}
    table = pq.read_table(features)
    rows = [
        (Design(row["design"], row["class_name"], row["object_id"]), row["prompt_id"])
        for row in table.drop_columns(_FEATURES).to_pylist()
    ]
    kept = [index for index, (_, prompt) in enumerate(rows) if prompt in wanted]
    objects, backdrops = (np.stack(list(table[name].to_numpy()))[kept] for name in _FEATURES)
    return Gallery.of([rows[index] for index in kept], objects, backdrops)


def _features(path: Path, scorer: Scorer, pool: Pool) -> Path:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    name = identify(scorer.name, scorer.fingerprint)
    key = hashlib.sha256(f"{content}:{name}:{_FEATURES}:{MEASURED}".encode()).hexdigest()[:12]
    out = path.with_name(f"{path.stem}-{re.sub(r'[^A-Za-z0-9]+', '-', scorer.name)}-{key}.parquet")
    if not out.is_file():
        shown = as_dataset(pq.read_table(path, filters=[("number", ">=", MEASURED)]))
        embedded = shown.map_batches(Embed, fn_constructor_args=(scorer, pool), **pool.options(shown.num_blocks()))
        partial = out.with_suffix(".partial")
        pq.write_table(pa.concat_tables(as_tables(embedded)), partial)
        partial.replace(out)
    return out
