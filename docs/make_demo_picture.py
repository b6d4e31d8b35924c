"""Make docs/demo.png from the store that ``make demo`` filled: ``python docs/make_demo_picture.py demo-store``."""

import io
import sys
from pathlib import Path

from PIL import Image, ImageOps

from objdrive.adapters.store import ArtifactStore

OBJECTS = ("cupcake-01", "phone-01", "couch-01", "rose-01", "bathtub-01", "abacus-01", "alarm-clock-01", "hourglass-01")
SIZE, GAP = 96, 6
COLUMNS = 5


def main(url: str) -> None:
    """Put the input and the four contexts of each object in a row, two objects side by side."""
    store = ArtifactStore(url)
    width = COLUMNS * (SIZE + GAP)
    sheet = Image.new("RGB", (2 * width + GAP, (len(OBJECTS) + 1) // 2 * (SIZE + GAP) - GAP), "white")
    for number, object_id in enumerate(OBJECTS):
        artifact = store.current(object_id)
        if artifact is None:
            raise SystemExit(f"{url} has no object {object_id!r}: run make demo first")
        shown = [preview for preview in artifact.previews if preview.kind in ("input", "picture")]
        for column, preview in enumerate(shown[:COLUMNS]):
            data = store.read_file(artifact, preview.file)
            picture = ImageOps.fit(Image.open(io.BytesIO(data)), (SIZE, SIZE), Image.Resampling.LANCZOS)
            sheet.paste(picture, ((number % 2) * (width + GAP) + column * (SIZE + GAP), number // 2 * (SIZE + GAP)))
    sheet.save(Path(__file__).with_name("demo.png"))


if __name__ == "__main__":
    main(sys.argv[1])
