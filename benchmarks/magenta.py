"""Magenta grounds, and how much of them is drawn.

No context and hardly a drawing is magenta, so that the share of magenta in drawn pictures tells how much of a photo's
ground was learned.
"""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from jobs.evaluation.compose import MANIFEST_FILE
from jobs.evaluation.pages import by_method
from jobs.evaluation.pictures import decode_pictures
from objdrive.evaluation.scores import Array
from objdrive.evaluation.summary import per_object

MAGENTA = (255, 0, 255)
_TINGED = 60


def on_magenta(manifest: Path, folder: Path) -> Path:
    """The manifest's photos again, with magenta around the objects; written unless they are there."""
    out = folder / MANIFEST_FILE
    if out.is_file():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        photo, mask = (manifest.parent / row[role] for role in ("image", "mask"))
        row |= {"image": f"{row['object_id']}.png", "mask": str(mask.absolute())}
        with Image.open(photo) as image, Image.open(mask) as shape:
            ground = Image.new("RGB", image.size, MAGENTA)
            Image.composite(image.convert("RGB"), ground, shape.convert("L")).save(folder / row["image"])
    # Last: with it all is there.
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return out


def magenta_share(pixels: np.ndarray) -> np.ndarray:
    """(N,): share of magenta among the pixels of pictures (N, H, W, 3) uint8."""
    red, green, blue = np.moveaxis(pixels.astype(int), -1, 0)
    share: np.ndarray = (np.minimum(red, blue) - green > _TINGED).mean(axis=(1, 2))
    return share


def magenta_by_object(pictures: Path) -> dict[str, dict[str, Array]]:
    """Mean share of magenta by method and object id."""
    table = pq.read_table(pictures)
    shares = magenta_share(decode_pictures(table["picture"])).tolist()
    rows = table.select(["method", "object_id", "kind"]).to_pylist()
    measured = [row | {"encoder": "", "magenta": share} for row, share in zip(rows, shares, strict=True)]
    return {method: per_object(own, [("", "magenta")]) for method, own in by_method(measured).items()}
