"""Ray Data: the pictures to measure, drawn or taken from what there is, in one table."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from jobs.drawing import Drawer, PlannedBase, Pool
from objdrive.adapters.artifact import ArtifactKey, ArtifactMetadata
from objdrive.adapters.store import ArtifactStore
from objdrive.errors import ObjdriveError
from objdrive.evaluation.prompts import EvaluationPrompt
from objdrive.evaluation.reference import MEASURED, Reference
from objdrive.pictures import encode_picture
from objdrive.sampling.exact import read_photo
from objdrive.sampling.requests import DrawRequest, Picture
from objdrive.seeds import seed_of

BASE_METHOD = "base"
COPY = "copy"
SCENES = "scenes"
CONTROLS = (COPY, SCENES)
"""Methods that calibrate the ruler: the input photo for every prompt; composed scenes, the best that can be drawn."""

_ROWS_PER_BATCH = 64
_KEY = b"objdrive"
_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("method", pa.string()),
    ("object_id", pa.string()),
    ("class_name", pa.string()),
    ("prompt_id", pa.string()),
    ("kind", pa.string()),
    ("text", pa.string()),
    ("number", pa.int64()),
    ("store", pa.string()),
    ("digest", pa.string()),
    ("picture", pa.binary()),
]
SCHEMA = pa.schema(_COLUMNS)


@dataclass(frozen=True)
class DrawingSettings:
    """How pictures are drawn; the same for every method.

    Attributes:
        base: what draws.
        steps: of the scheduler.
        guidance_scale: of classifier-free guidance.
    """

    base: PlannedBase
    steps: int
    guidance_scale: float


def find_artifacts(stores: Mapping[str, str], fingerprint: str) -> dict[str, dict[str, ArtifactMetadata]]:
    """Current artifacts of each method's store, by object id.

    Raises:
        ObjdriveError: a store has none, or one of another base.
    """
    found: dict[str, dict[str, ArtifactMetadata]] = {}
    for method, url in stores.items():
        store = ArtifactStore(url)
        current = {one: store.current(one) for one in store.object_ids()}
        found[method] = {one: artifact for one, artifact in current.items() if artifact is not None}
        if not found[method]:
            raise ObjdriveError(f"the store {url} of the method {method!r} has no artifacts: personalize objects first")
        for artifact in found[method].values():
            if artifact.base.fingerprint != fingerprint:
                raise ObjdriveError(
                    f"the artifact of {artifact.object_id!r} in {url} was made on the base {artifact.base.id!r} with "
                    f"the fingerprint {artifact.base.fingerprint}, not on {fingerprint}: name its base with --base"
                )
    return found


def measured_by(artifacts: Mapping[str, Mapping[str, ArtifactMetadata]]) -> list[ArtifactMetadata]:
    """The artifact of each object, by id, whose photo all methods are measured by: the first method's that has it."""
    objects: dict[str, ArtifactMetadata] = {}
    for of_method in artifacts.values():
        objects = {**of_method, **objects}
    return [artifact for _, artifact in sorted(objects.items())]


def read_reference(artifact: ArtifactMetadata, size: int) -> Reference:
    """The object as its photo shows it, from where it was when it was personalized.

    Raises:
        RowError: the photo or its mask is gone or broken.
    """
    photo = read_photo(artifact)
    return Reference.of(artifact.object_id, artifact.class_name, photo, size)


def plan_drawing(
    stores: Mapping[str, str],
    artifacts: Mapping[str, Mapping[str, ArtifactMetadata]],
    prompts: Sequence[EvaluationPrompt],
    *,
    seeds: int,
    base_alone: bool,
) -> list[dict[str, Any]]:
    """Rows of pictures to draw, an object's pictures side by side."""
    rows = []
    for method, by_object in artifacts.items():
        for object_id, artifact in by_object.items():
            rows += _rows(method, object_id, artifact.class_name, prompts, seeds, stores[method], artifact.digest)
    if base_alone:
        words = {one: artifact.class_name for of_method in artifacts.values() for one, artifact in of_method.items()}
        for object_id, word in words.items():
            rows += _rows(BASE_METHOD, object_id, word, prompts, seeds, "", "")
    return rows


def _rows(
    method: str,
    object_id: str,
    class_name: str,
    prompts: Sequence[EvaluationPrompt],
    seeds: int,
    store: str,
    digest: str,
) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "object_id": object_id,
            "class_name": class_name,
            "prompt_id": prompt.id,
            "kind": prompt.kind,
            "text": prompt.text,
            "number": number,
            "store": store,
            "digest": digest,
        }
        for prompt in prompts
        for number in range(seeds)
    ]


def control_pictures(
    references: Sequence[Reference], prompts: Sequence[EvaluationPrompt], gallery: Path | None
) -> list[dict[str, Any]]:
    """Rows with pictures of the methods that calibrate the ruler.

    Raises:
        ObjdriveError: the gallery's pictures are of another size than the references.
    """
    rows = []
    texts = {prompt.id: prompt for prompt in prompts}
    for one in references:
        for row in _rows(COPY, one.object_id, one.class_name, prompts, MEASURED, "", ""):
            rows.append(row | {"picture": encode_picture(Image.fromarray(one.whole), "PNG")})
    if gallery is not None:
        for shown in pq.read_table(gallery, filters=[("number", "<", MEASURED), ("object_id", "!=", "")]).to_pylist():
            if prompt := texts.get(shown["prompt_id"]):
                (row,) = _rows(SCENES, shown["object_id"], shown["class_name"], [prompt], 1, "", "")
                _check_size(shown["picture"], references, gallery)
                rows.append(row | {"number": shown["number"], "picture": shown["picture"]})
    known = {one.object_id for one in references}
    return [row for row in rows if row["object_id"] in known]


def _check_size(picture: bytes, references: Sequence[Reference], gallery: Path) -> None:
    edge, expected = Image.open(io.BytesIO(picture)).width, references[0].whole.shape[1]
    if edge != expected:
        raise ObjdriveError(
            f"the pictures of the gallery {gallery} are {edge} pixels wide, the base's {expected}: "
            f"compose it with --resolution {expected}"
        )


def as_dataset(table: pa.Table) -> ray.data.Dataset:
    """A table as a dataset of blocks at hand: tasks that made them would wait for the cores that the pool holds."""
    return ray.data.from_arrow([table.slice(n, _ROWS_PER_BATCH) for n in range(0, table.num_rows, _ROWS_PER_BATCH)])


def as_tables(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """A dataset's blocks, one by one."""
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(table, pa.Table)
        yield table


class DrawRows:
    """Ray Data's worker that draws rows with the base and their adapters.

    Args:
        drawing: how.
        pool: whose worker this is.
        store: any store, for rows that need none.
    """

    def __init__(self, drawing: DrawingSettings, pool: Pool, store: str) -> None:
        self._drawer = Drawer(drawing.base, pool)
        self._drawing = drawing
        self._store = store

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The rows with their pictures.

        Raises:
            ObjdriveError: one could not be drawn.
        """
        drawn = []
        for store, rows in groupby(batch.to_pylist(), key=lambda row: row["store"] or self._store):
            some = list(rows)
            pictures = self._drawer.draw(store, [self._request(row) for row in some])
            for row, picture in zip(some, pictures, strict=True):
                if not isinstance(picture, Picture):
                    raise picture
                drawn.append(row | {"picture": encode_picture(picture.image, "PNG")})
        return pa.Table.from_pylist(drawn, SCHEMA)

    def _request(self, row: Mapping[str, Any]) -> DrawRequest:
        alone = not row["store"]
        return DrawRequest(
            row["text"].replace("{}", row["class_name"]) if alone else row["text"],
            # Not by method: all draw an object's prompt from the same noise, so that their figures can be paired.
            seed_of(f"{row['object_id']}:{row['prompt_id']}:{row['number']}"),
            () if alone else (ArtifactKey(row["object_id"], row["digest"]),),
            steps=self._drawing.steps,
            guidance_scale=self._drawing.guidance_scale,
        )


def draw(
    rows: Sequence[dict[str, Any]], controls: Sequence[dict[str, Any]], drawing: DrawingSettings, pool: Pool, out: Path
) -> None:
    """Draw rows and write them with the controls' to the table `out`, unless it holds just these already."""
    key = _digest(rows, controls, drawing)
    if out.is_file() and (pq.read_schema(out).metadata or {}).get(_KEY) == key:
        return
    partial = out.with_suffix(".partial")
    with pq.ParquetWriter(partial, SCHEMA.with_metadata({_KEY: key})) as writer:
        if controls:
            writer.write_table(pa.Table.from_pylist(list(controls), SCHEMA))
        for table in _drawn(rows, drawing, pool):
            writer.write_table(table)
    partial.replace(out)


def _drawn(rows: Sequence[dict[str, Any]], drawing: DrawingSettings, pool: Pool) -> Iterator[pa.Table]:
    if not rows:
        return
    asked = as_dataset(pa.Table.from_pylist(list(rows), pa.schema(list(SCHEMA)[:-1])))
    store = next((row["store"] for row in rows if row["store"]), "")
    drawn = asked.map_batches(DrawRows, fn_constructor_args=(drawing, pool, store), **pool.options(asked.num_blocks()))
    for table in as_tables(drawn):
        yield table.select(SCHEMA.names).cast(SCHEMA)


def _digest(rows: Sequence[dict[str, Any]], controls: Sequence[dict[str, Any]], drawing: DrawingSettings) -> bytes:
    digest = hashlib.sha256(
        json.dumps([drawing.base.fingerprint, drawing.steps, drawing.guidance_scale, rows]).encode()
    )
    for row in controls:
        digest.update(f"{row['method']}:{row['object_id']}:{row['prompt_id']}:".encode() + row["picture"])
    return digest.hexdigest().encode()


def decode_pictures(column: "pa.ChunkedArray[Any]") -> np.ndarray:
    """(N, H, W, 3) uint8, of a column of encoded pictures of one size."""
    pictures: list[Any] = column.to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures])
