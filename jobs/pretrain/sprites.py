"""Sprites: every class's icons as pictures with alpha, and which of them training may see."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw

from jobs.pretrain.folders import Folders
from jobs.pretrain.packs import EDGE, PACKS, Icons, fetch
from objdrive.errors import ObjdriveError
from objdrive.evaluation.imagenet import ImageNetEncoder

CLASSES = Path(__file__).parent / "classes.yaml"
NEAR = 0.85
"""Cosine of ImageNet features, taken in colour and without, from which two drawings count as one."""
_LEAST = 2


@dataclass(frozen=True)
class Sprites:
    """All icons of all classes.

    Attributes:
        pictures: (N, EDGE, EDGE, 4) uint8, with alpha.
        classes: class words, in their order.
        labels: (N,), index of each icon's class.
        sources: ``pack/icon`` of each.
        use: what each is for: ``train``, ``held`` (judging only) or ``near`` (too like a held one, for nothing).
    """

    pictures: np.ndarray
    classes: tuple[str, ...]
    labels: np.ndarray
    sources: tuple[str, ...]
    use: tuple[str, ...]

    def only(self, use: str) -> "Sprites":
        """The icons of one use."""
        rows = [row for row, value in enumerate(self.use) if value == use]
        return Sprites(
            self.pictures[rows],
            self.classes,
            self.labels[rows],
            tuple(self.sources[row] for row in rows),
            (use,) * len(rows),
        )

    def save(self, path: Path) -> None:
        """Write all to one Parquet file."""
        table = pa.table(
            {
                "class_name": [self.classes[label] for label in self.labels],
                "source": self.sources,
                "use": self.use,
                "rgba": [picture.tobytes() for picture in self.pictures],
            }
        )
        pq.write_table(table.replace_schema_metadata({"classes": "\n".join(self.classes)}), path)

    @classmethod
    def load(cls, path: Path) -> "Sprites":
        """Read what `save` wrote."""
        table = pq.read_table(path)
        classes = tuple(table.schema.metadata[b"classes"].decode().split("\n"))
        rows = table.to_pylist()
        pictures = [np.frombuffer(row["rgba"], np.uint8).reshape(EDGE, EDGE, 4) for row in rows]
        labels = np.array([classes.index(row["class_name"]) for row in rows])
        sources = tuple(row["source"] for row in rows)
        return cls(np.stack(pictures), classes, labels, sources, tuple(row["use"] for row in rows))


def make_sprites(cache: Path) -> Sprites:
    """Fetch the packs into `cache`, draw the icons of every class and set the held ones apart.

    Raises:
        ObjdriveError: a pack cannot be had, or a class is left with fewer than two drawings to learn from.
    """
    listed = yaml.safe_load(CLASSES.read_text())
    classes: dict[str, list[str]] = listed["classes"]
    held = {(name, family) for family, names in listed["held"].items() for name in names}
    codes: dict[str, str] = {}
    pictures, labels, sources, use = [], [], [], []
    for pack in PACKS:
        with Icons(pack, fetch(pack, cache), codes) as icons:
            codes = codes or icons.codes
            for label, (name, wanted) in enumerate(classes.items()):
                for icon in icons.find(wanted):
                    source = f"{pack.name}/{icon}"
                    if source in sources or source in listed["never"]:
                        continue
                    pictures.append(icons.draw(icon))
                    labels.append(label)
                    sources.append(source)
                    use.append("held" if (name, pack.family) in held else "train")
    stacked = np.stack(pictures)
    near = near_held(_features(stacked), np.array(labels), np.array(use) == "held")
    use = ["near" if near[row] else word for row, word in enumerate(use)]
    sprites = Sprites(stacked, tuple(classes), np.array(labels), tuple(sources), tuple(use))
    _check(sprites)
    return sprites


def have_sprites(folders: Folders, make: Callable[[Path], Sprites] = make_sprites) -> Sprites:
    """The sprites of a folder, made by `make` from its packages if they are not there yet."""
    if not folders.sprites.is_file():
        folders.out.mkdir(parents=True, exist_ok=True)
        make(folders.packages).save(folders.sprites)
    return Sprites.load(folders.sprites)


def near_held(features: torch.Tensor, labels: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Which drawings (N,) are not held and nearly the same as a held one of their class, by features (N, d)."""
    unit = F.normalize(features, dim=1)
    alike = (unit @ unit.T).numpy() >= NEAR
    same = labels[:, None] == labels[None, :]
    near: np.ndarray = (alike & same & held[None, :]).any(axis=1) & ~held
    return near


@torch.inference_mode()
def _features(pictures: np.ndarray) -> torch.Tensor:
    """(N, d): ImageNet features on grey, in colour and without, side by side."""
    encoder = ImageNetEncoder()
    rows = []
    for start in range(0, len(pictures), 32):
        rgba = torch.from_numpy(pictures[start : start + 32]).permute(0, 3, 1, 2).float() / 255
        shown = rgba[:, :3] * rgba[:, 3:] + 0.5 * (1 - rgba[:, 3:])
        grey = shown.mean(dim=1, keepdim=True).expand_as(shown)
        rows.append(torch.cat([F.normalize(encoder(shown), dim=1), F.normalize(encoder(grey), dim=1)], dim=1))
    return torch.cat(rows)


def _check(sprites: Sprites) -> None:
    trained = np.bincount(sprites.only("train").labels, minlength=len(sprites.classes))
    poor = [name for name, count in zip(sprites.classes, trained, strict=True) if count < _LEAST]
    if poor:
        raise ObjdriveError(f"fewer than {_LEAST} drawings to learn {', '.join(poor)} from: hold fewer, or add a pack")


def draw_sprites(seed: int) -> Sprites:
    """Plain shapes in place of icons: three classes of three drawings, to try the job out without a network."""
    rng = np.random.default_rng(seed)
    shapes = ("apple", "book", "kite")
    pictures, labels, use = [], [], []
    for label in range(len(shapes)):
        for word in ("train", "train", "held"):
            pictures.append(_shape(label, tuple(int(v) for v in rng.integers(40, 230, 3))))
            labels.append(label)
            use.append(word)
    sources = tuple(f"drawn/{row}" for row in range(len(use)))
    return Sprites(np.stack(pictures), shapes, np.array(labels), sources, tuple(use))


def _shape(kind: int, colour: tuple[int, ...]) -> np.ndarray:
    picture = Image.new("RGBA", (EDGE, EDGE))
    pen = ImageDraw.Draw(picture)
    inner, outer, middle = 0.1 * EDGE, 0.9 * EDGE, 0.5 * EDGE
    if kind == 0:
        pen.ellipse((inner, inner, outer, outer), fill=colour)
    elif kind == 1:
        pen.rectangle((inner, inner, outer, outer), fill=colour)
    else:
        pen.polygon(((middle, inner), (outer, middle), (middle, outer), (inner, middle)), fill=colour)
    return np.asarray(picture)
