"""Ray Data: the pictures to measure, drawn or taken from what there is, in one table."""

import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image

from jobs.bases import load_planned
from objdrive.adapters.adapter import Adapter, parse_adapter
from objdrive.adapters.artifact import ArtifactMetadata
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.store import ArtifactStore
from objdrive.base.prompts import marked_phrase
from objdrive.catalog.photos import decode_photo
from objdrive.catalog.rows import AUTO_MASK
from objdrive.catalog.sources import SourceMark, read_source
from objdrive.errors import ObjdriveError
from objdrive.evaluation.prompts import EvaluationPrompt
from objdrive.evaluation.reference import MEASURED, Reference
from objdrive.pictures import encode_picture
from objdrive.sampling.sampler import Layout, SampleSpec, draw_pictures
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
        base: name of the base.
        clip: see `objdrive.base.files.find_base`.
        fingerprint: of the base that is meant.
        steps: of the scheduler.
        guidance_scale: of classifier-free guidance.
        vae: see `objdrive.base.files.find_base`.
    """

    base: str
    clip: str | None
    fingerprint: str
    steps: int
    guidance_scale: float
    vae: str | None = None


@dataclass(frozen=True)
class Pool:
    """How many processes work at once, each with how many GPUs."""

    workers: int
    gpus: float

    def options(self, rows: int) -> dict[str, Any]:
        """As Ray Data's `map_batches` takes it for so many rows."""
        return {
            "compute": ray.data.ActorPoolStrategy(size=min(self.workers, _batches(rows))),
            "num_cpus": 0.9,
            "num_gpus": self.gpus,
            "batch_size": _ROWS_PER_BATCH,
            "batch_format": "pyarrow",
        }

    def prepare(self) -> str:
        """Set a worker up; the device for it."""
        if self.gpus:
            return "cuda"
        torch.set_num_threads(1)
        return "cpu"


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
    image, mask = artifact.sources.image, artifact.sources.mask
    pixels = read_source(SourceMark(**image.model_dump()), role="image")
    if mask and mask.uri == AUTO_MASK:
        photo = decode_photo(pixels, AUTO_MASK, name=artifact.object_id)
    else:
        mask_bytes = read_source(SourceMark(**mask.model_dump()), role="mask") if mask else None
        photo = decode_photo(pixels, mask_bytes, name=artifact.object_id)
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


def _batches(rows: int) -> int:
    return max(1, math.ceil(rows / _ROWS_PER_BATCH))


class DrawRows:
    """Ray Data's worker that draws rows with the base and their adapters."""

    def __init__(self, drawing: DrawingSettings, pool: Pool) -> None:
        """Load the base.

        Raises:
            ObjdriveError: the base here is another one.
        """
        self._base = load_planned(
            drawing.base, drawing.fingerprint, clip=drawing.clip, vae=drawing.vae, device=pool.prepare()
        )
        self._drawing = drawing

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The rows with their pictures."""
        rows = batch.to_pylist()
        keys = list(dict.fromkeys((row["store"], row["object_id"], row["digest"]) for row in rows if row["store"]))
        read = {key: self._read(*key) for key in keys}
        # Methods without LoRA take no slot.
        taught = [key for key in keys if read[key][1].lora]
        rank = max((read[key][1].rank for key in taught), default=0)
        with AdapterBank(self._base.unet, self._base.family.lora_targets, slots=max(1, len(taught)), rank=rank) as bank:
            for slot, key in enumerate(taught):
                bank.load(slot, read[key][1].lora, least_rank=read[key][0].least_rank)
            slots = {key: slot for slot, key in enumerate(taught)}
            requests = [self._spec(row, read, slots) for row in rows]
            pictures = draw_pictures(self._base, requests, bank=bank)
        drawn = [encode_picture(picture, "PNG") for picture in pictures]
        return pa.Table.from_pylist([row | {"picture": png} for row, png in zip(rows, drawn, strict=True)], SCHEMA)

    def _spec(
        self,
        row: Mapping[str, Any],
        read: Mapping[tuple[str, str, str], tuple[ArtifactMetadata, Adapter]],
        slots: Mapping[tuple[str, str, str], int],
    ) -> SampleSpec:
        # Not by method: all draw an object's prompt from the same noise, so that their figures can be paired.
        seed = seed_of(f"{row['object_id']}:{row['prompt_id']}:{row['number']}")
        specify = partial(SampleSpec, steps=self._drawing.steps, guidance_scale=self._drawing.guidance_scale)
        if not row["store"]:
            return specify(row["text"], seed, (row["class_name"],))
        key = (row["store"], row["object_id"], row["digest"])
        artifact, adapter = read[key]
        adapted = {slots[key]: 1.0} if key in slots else {}
        phrase = marked_phrase(artifact.phrase, artifact.class_name, token=artifact.token)
        layout = Layout.of([artifact.layout_noise], [artifact.class_name], [adapted])
        return specify(row["text"], seed, (phrase,), (adapter.embeddings,), adapted, layout=layout)

    def _read(self, store: str, object_id: str, digest: str) -> tuple[ArtifactMetadata, Adapter]:
        artifact, files = ArtifactStore(store).read(object_id, digest)
        return artifact, parse_adapter(files, token=artifact.token, family=self._base.family)


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
    asked = pa.Table.from_pylist(list(rows), pa.schema(list(SCHEMA)[:-1]))
    drawn = as_dataset(asked).map_batches(DrawRows, fn_constructor_args=(drawing, pool), **pool.options(len(rows)))
    for table in as_tables(drawn):
        yield table.select(SCHEMA.names).cast(SCHEMA)


def _digest(rows: Sequence[dict[str, Any]], controls: Sequence[dict[str, Any]], drawing: DrawingSettings) -> bytes:
    digest = hashlib.sha256(json.dumps([drawing.fingerprint, drawing.steps, drawing.guidance_scale, rows]).encode())
    for row in controls:
        digest.update(f"{row['method']}:{row['object_id']}:{row['prompt_id']}:".encode() + row["picture"])
    return digest.hexdigest().encode()


def decode_pictures(column: "pa.ChunkedArray[Any]") -> np.ndarray:
    """(N, H, W, 3) uint8, of a column of encoded pictures of one size."""
    pictures: list[Any] = column.to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures])
