"""Make docs/demo.webp from the store that ``make demo`` filled: ``python docs/make_demo_picture.py demo-store``."""

import io
import sys
from pathlib import Path

from PIL import Image, ImageOps

from objdrive.adapters.store import ArtifactStore
from objdrive.generate import generate

OBJECTS = ("cupcake-01", "phone-01", "skateboard-01", "rose-01", "abacus-01", "alarm-clock-01")
SEEDS = (1, 2, 3, 4)
LAYOUTS = "a photo of {} on grass"
OTHERS = (
    "a photo of a small {} on grass",
    "a photo of a large {} on grass",
    "a photo of {} in the snow",
    "a photo of {} and a teapot on grass",
)
SIZE, GAP = 96, 6


def main(url: str) -> None:
    """Put the photo of each object, one prompt with four seeds and four other prompts in a row."""
    store = ArtifactStore(url)
    columns = 1 + len(SEEDS) + len(OTHERS)
    edges = [count * (SIZE + GAP) - GAP for count in (columns, len(OBJECTS))]
    sheet = Image.new("RGB", (edges[0], edges[1]), "white")
    for row, object_id in enumerate(OBJECTS):
        pictures = [_photo(store, object_id), *generate(store, object_id, LAYOUTS, seeds=SEEDS)]
        pictures += [generate(store, object_id, prompt, seeds=SEEDS[:1])[0] for prompt in OTHERS]
        for column, picture in enumerate(pictures):
            cell = ImageOps.fit(picture, (SIZE, SIZE), Image.Resampling.LANCZOS)
            sheet.paste(cell, (column * (SIZE + GAP), row * (SIZE + GAP)))
    sheet.save(Path(__file__).with_name("demo.webp"), quality=90)


def _photo(store: ArtifactStore, object_id: str) -> Image.Image:
    artifact = store.current(object_id)
    if artifact is None:
        raise SystemExit(f"{store.url} has no object {object_id!r}: run make demo first")
    shown = next((preview for preview in artifact.previews if preview.kind == "input"), None)
    if shown is None:
        raise SystemExit(f"{store.url} has no picture of {object_id!r}'s photo: run make demo, which keeps previews")
    return Image.open(io.BytesIO(store.read_file(artifact, shown.file)))


if __name__ == "__main__":
    main(sys.argv[1])
