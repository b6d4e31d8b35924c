"""The data stage: sprites, then scenes composed by Ray Data into Parquet; and how training reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray
import torch
from torch import Tensor

from jobs.pretrain.config import Config
from jobs.pretrain.folders import Folders
from jobs.pretrain.scenes import Composer, Mix
from jobs.pretrain.sprites import Sprites, draw_sprites, have_sprites, make_sprites
from objdrive.errors import ObjdriveError

_BLOCK = 2048
_JUDGED_SEED = 1


class Compose:
    """Ray Data's worker that turns scene numbers into scenes; the same number is the same scene anywhere."""

    def __init__(self, sprites: Path, use: str, resolution: int, seed: int, mix: Mix | None = None) -> None:
        """Read the sprites of one use."""
        self._composer = Composer(Sprites.load(sprites).only(use), resolution, mix)
        self._seed = seed

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Columns of a batch of scene numbers (``id``)."""
        scenes = [self._composer.compose(np.random.default_rng((self._seed, int(number)))) for number in batch["id"]]
        return pa.table(
            {
                "pixels": [scene.pixels.tobytes() for scene in scenes],
                "mask": [scene.mask.tobytes() for scene in scenes],
                "caption": [scene.caption for scene in scenes],
            }
        )


def make_data(config: Config, folders: Folders) -> None:
    """Make whatever of the sprites and the scenes is not there yet."""
    have_sprites(folders, (lambda _: draw_sprites(config.seed)) if config.drawn_sprites else make_sprites)
    for folder, use, count, seed in (
        (folders.judged, "held", config.judged, config.seed + _JUDGED_SEED),
        (folders.scenes, "train", config.scenes, config.seed),
    ):
        if not folder.exists():
            # Under another name until it is whole: a folder that is there is taken as complete.
            partial = folder.with_suffix(".partial")
            blocks = max(1, count // _BLOCK)
            numbers = ray.data.range(count, override_num_blocks=blocks)
            made = numbers.map_batches(
                Compose,
                fn_constructor_args=(folders.sprites, use, config.resolution, seed),
                batch_size=256,
                compute=pool(blocks),
            )
            made.write_parquet(str(partial), mode=ray.data.SaveMode.OVERWRITE)
            partial.rename(folder)


def pool(blocks: int) -> ray.data.ActorPoolStrategy:
    """As many workers as there are cores for, one left for the rest, and no more than there is work for."""
    most = min(blocks, int(ray.cluster_resources()["CPU"]) - 1)
    return ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, most))


@dataclass(frozen=True)
class Rows:
    """Scenes in memory.

    Attributes:
        pixels: (N, 3, n, n) uint8.
        captions: N texts.
    """

    pixels: Tensor
    captions: list[str]

    def images(self, rows: Tensor) -> Tensor:
        """(B, 3, n, n) float32 in [0, 1]."""
        return self.pixels[rows].float() / 255


def read_rows(folder: Path, resolution: int, *, rank: int = 0, world: int = 1) -> Rows:
    """Read one worker's share of a folder of scenes."""
    table = read_share(folder, ("pixels", "caption"), rank, world)
    pixels = as_array(table["pixels"], np.uint8).reshape(-1, resolution, resolution, 3)
    captions: list[Any] = table["caption"].to_pylist()
    return Rows(torch.from_numpy(pixels).permute(0, 3, 1, 2), captions)


def check_columns(folder: Path, columns: Sequence[str]) -> None:
    """Raise ObjdriveError unless what lies in a folder has these columns."""
    missing = [name for name in columns if name not in pads.dataset(folder).schema.names]
    if missing:
        raise ObjdriveError(
            f"{folder} has no column {missing[0]!r}: an earlier version of this job wrote it. Remove it, and run the "
            "stage again that makes it"
        )


def read_share(folder: Path, columns: Sequence[str], rank: int, world: int) -> pa.Table:
    """Every `world`-th file of a folder, or rows of its files where there are fewer of those than workers."""
    files = sorted(str(path) for path in folder.glob("*.parquet"))
    if len(files) >= world:
        return pads.dataset(files[rank::world]).to_table(list(columns))
    table = pads.dataset(files).to_table(list(columns))
    return table.take(pa.array(range(rank, len(table), world)))


def as_array(column: "pa.ChunkedArray[Any]", dtype: Any) -> np.ndarray:
    """(N, m): binary values of equal length as one writable array."""
    width = len(column[0].as_py()) // np.dtype(dtype).itemsize
    array = np.empty((len(column), width), dtype)
    start = 0
    for chunk in column.chunks:
        # Their bytes lie one after another: no value needs to become a Python object.
        _, places, content = chunk.buffers()
        assert places is not None
        assert content is not None
        offsets = np.frombuffer(memoryview(places), np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        values = np.frombuffer(memoryview(content), np.uint8)[offsets[0] : offsets[-1]]
        array[start : start + len(chunk)] = values.view(dtype).reshape(len(chunk), width)
        start += len(chunk)
    return array
