"""Ray Data's worker that draws planned pictures and writes each to its address."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa
from PIL import Image

from jobs.drawing import Drawer, Pool
from jobs.generation.index import ABOUT, FILE, MEASURED
from jobs.generation.scores import score
from jobs.generation.settings import GenerationSettings
from objdrive.adapters.artifact import ArtifactKey
from objdrive.adapters.storage import open_files
from objdrive.adapters.store import ArtifactStore
from objdrive.errors import ObjdriveError, UnknownObject
from objdrive.pictures import BEST, DigitalSource, PictureFormat, picture_file
from objdrive.sampling.exact import CutOut, Place, around, compose, read_photo
from objdrive.sampling.requests import DrawRequest, Picture

_PLANNED: list[tuple[str, pa.DataType]] = [("id", pa.int64()), *ABOUT, ("key", pa.string()), ("path", pa.string())]
_OUTCOME: list[tuple[str, pa.DataType]] = [
    ("status", pa.string()),
    *FILE,
    ("code", pa.string()),
    ("message", pa.string()),
    *MEASURED,
]
PLANNED = pa.schema(_PLANNED)
"""See `jobs.generation.settings.PlannedPicture`; `id` is the plan's own."""
OUTCOME = pa.schema(_PLANNED + _OUTCOME)
"""`status` is ``drawn``, ``found`` or ``failed``; a failed one has a `code` and a `message`."""

_ATTEMPTS = 4
_LOOKS = 16
_QUALITY: dict[PictureFormat, int] = {"webp": 90, "png": BEST, "jpeg": 92}
Row = dict[str, Any]


class DrawBlock:
    """Draws a block of rows of `PLANNED`, and yields it as `OUTCOME`.

    A picture that is at its address already was drawn by a run that ended before it could say so: it stays.
    """

    def __init__(self, settings: GenerationSettings, pool: Pool) -> None:
        """Load the base.

        Raises:
            ObjdriveError: the base here is another one.
        """
        self._drawer = Drawer(settings.base, pool)
        self._settings = settings
        self._files = open_files(settings.out, _ATTEMPTS)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Have every picture of the block at its address, or the reason why not."""
        rows = block.to_pylist()
        with ThreadPoolExecutor(_LOOKS) as threads:
            looked = list(threads.map(self._look, rows))
        left = [row for row, found in zip(rows, looked, strict=True) if found is None]
        outcomes = [found for found in looked if found is not None]
        outcomes += self._draw(left)
        if self._settings.scored:
            outcomes = score(outcomes, self._drawer.base, ArtifactStore(self._settings.store))
        return pa.Table.from_pylist(outcomes, OUTCOME)

    def _draw(self, rows: Sequence[Row]) -> Iterator[Row]:
        cut_outs = self._cut_outs(rows)
        ready = []
        for row in rows:
            cut_out = cut_outs.get(row["object_id"])
            if isinstance(cut_out, ObjdriveError):
                yield _failed(row, cut_out)
            else:
                ready.append((row, cut_out))
        pictures = self._drawer.draw(self._settings.store, [self._request(row, cut_out) for row, cut_out in ready])
        for (row, cut_out), picture in zip(ready, pictures, strict=True):
            try:
                if not isinstance(picture, Picture):
                    raise picture
                data = self._file(picture, row, cut_out)
                self._files.replace(row["path"], data)
            except ObjdriveError as error:
                yield _failed(row, error)
            else:
                yield self._there(row, "drawn", data, picture.image.size)

    def _cut_outs(self, rows: Sequence[Row]) -> dict[str, CutOut | ObjdriveError]:
        """The objects that keep their own pixels, or why they can't, by id; none if objects are drawn."""
        place = self._settings.place
        if place is None:
            return {}
        digests = {row["object_id"]: row["digest"] for row in rows}
        return {one: self._cut_out(one, digest, place) for one, digest in digests.items()}

    def _cut_out(self, object_id: str, digest: str, place: Place) -> CutOut | ObjdriveError:
        try:
            artifact = ArtifactStore(self._settings.store).metadata(object_id, digest)
            if artifact is None:
                raise UnknownObject(
                    f"{object_id}@{digest} is no longer in {self._settings.store}: run the command again"
                )
            return compose(read_photo(artifact), place, self._settings.size or self._drawer.base.sizes.square)
        except ObjdriveError as error:
            return error

    def _request(self, row: Row, cut_out: CutOut | None) -> DrawRequest:
        request = DrawRequest(
            row["prompt"],
            row["seed"],
            (ArtifactKey(row["object_id"], row["digest"]),),
            steps=row["steps"],
            guidance_scale=row["guidance_scale"],
            negative_prompt=self._settings.negative_prompt,
            size=self._settings.size,
        )
        return request if cut_out is None else replace(around(request, row["class_name"]), canvas=cut_out.canvas)

    def _file(self, picture: Picture, row: Row, cut_out: CutOut | None) -> bytes:
        image = cut_out.over(picture.image) if cut_out else picture.image
        source: DigitalSource = "compositeWithTrainedAlgorithmicMedia" if cut_out else "trainedAlgorithmicMedia"
        facts = {
            "model": str(picture.objects[0]),
            "prompt": picture.prompt,
            "base": f"{picture.base} {picture.base_fingerprint}",
            **{name: str(row[name]) for name in ("seed", "steps", "guidance_scale")},
        }
        return picture_file(image, self._settings.format, facts, source=source, quality=_QUALITY[self._settings.format])

    def _look(self, row: Row) -> Row | None:
        try:
            data = self._files.read(row["path"])
        except ObjdriveError as error:
            return _failed(row, error)
        size = None if data is None else _size(data)
        return None if data is None or size is None else self._there(row, "found", data, size)

    def _there(self, row: Row, status: str, data: bytes, size: tuple[int, int]) -> Row:
        about = {
            "status": status,
            "sha256": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "width": size[0],
            "height": size[1],
        }
        return row | about | ({"data": data} if self._settings.scored else {})


def _failed(row: Row, error: ObjdriveError) -> Row:
    return row | {"status": "failed", "code": error.code, "message": str(error)}


def _size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a picture that decodes to its end; None if it does not: not all storage writes it whole."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            return picture.size
    except (OSError, SyntaxError, ValueError):
        return None


def blocks(rows: Iterable[Row], least: int) -> Iterator[pa.Table]:
    """Cut rows into blocks of at least so many that end with an object; one with very many rows has several."""
    block: list[Row] = []
    for row in rows:
        new_object = bool(block) and row["object_id"] != block[-1]["object_id"]
        if len(block) >= 4 * least or (new_object and len(block) >= least):
            yield pa.Table.from_pylist(block, PLANNED)
            block = []
        block.append(row)
    if block:
        yield pa.Table.from_pylist(block, PLANNED)
