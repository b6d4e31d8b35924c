"""Scores of drawn pictures, by the base's own CLIP: a ruler for each object of a block."""

import io
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from jobs.evaluation.pictures import read_reference
from objdrive.adapters.store import ArtifactStore
from objdrive.base.stable_diffusion import Base
from objdrive.errors import ObjdriveError
from objdrive.evaluation.encoders import BaseClip
from objdrive.evaluation.prompts import EvaluationPrompt
from objdrive.evaluation.ruler import Asked, Ruler
from objdrive.pictures import as_pixels

_SCORED = ("whole", "object", "text")
SCORES = tuple(f"score_{name}" for name in _SCORED)
"""See `objdrive.evaluation.ruler.Score`."""

_AT_ONCE = 8
Row = dict[str, Any]


def score(rows: Sequence[Row], base: Base, store: ArtifactStore) -> list[Row]:
    """Rows with scores beside them where there is a picture (`data`), and a photo to measure it by."""
    drawn = sorted((row for row in rows if "data" in row), key=lambda row: (row["object_id"], row["id"]))
    others = [row for row in rows if "data" not in row]
    encoder = BaseClip(base)
    for _, some in groupby(drawn, key=lambda row: row["object_id"]):
        others += _scored(list(some), encoder, base.resolution, store)
    return others


def _scored(rows: Sequence[Row], encoder: BaseClip, edge: int, store: ArtifactStore) -> list[Row]:
    """The rows of one object."""
    try:
        return _measured(rows, encoder, edge, store)
    except ObjdriveError:
        # The pictures are there, and worth no less: they have no scores.
        return list(rows)


def _measured(rows: Sequence[Row], encoder: BaseClip, edge: int, store: ArtifactStore) -> list[Row]:
    object_id, word = rows[0]["object_id"], rows[0]["class_name"]
    artifact = store.metadata(object_id, rows[0]["digest"])
    if artifact is None:
        return list(rows)
    prompts = {row["prompt_id"]: _prompt(row["prompt_id"], row["prompt"], word) for row in rows}
    ruler = Ruler(encoder, [read_reference(artifact, edge)], list(prompts.values()))
    scores = []
    for first in range(0, len(rows), _AT_ONCE):
        some = rows[first : first + _AT_ONCE]
        pixels = as_pixels(np.stack([_decoded(row["data"], edge) for row in some]))
        scores += ruler.measure(encoder, pixels, [Asked(object_id, row["prompt_id"]) for row in some])
    return [
        row | {name: getattr(one, measured) for name, measured in zip(SCORES, _SCORED, strict=True)}
        for row, one in zip(rows, scores, strict=True)
    ]


def _prompt(prompt_id: str, text: str, word: str) -> EvaluationPrompt:
    # The ruler's prompts have one place; where an object stands twice, its class word says so as well.
    before, place, after = text.partition("{}")
    return EvaluationPrompt(id=prompt_id, kind="context", text=before + place + after.replace("{}", word))


def _decoded(data: bytes, edge: int) -> np.ndarray:
    """(edge, edge, 3) uint8: the whole picture; one that is not square has bars beside it."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(ImageOps.pad(picture.convert("RGB"), (edge, edge), color="gray"))
