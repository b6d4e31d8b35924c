"""What a catalog takes: bytes and requests of an object, counted, and a table for planners.

Usage: ``python benchmarks/sizing.py`` (``--smoke`` takes one small table). Bytes are those of adapters of random
weights in the shape of each base's network; of SD 1.5 only its architecture is needed. Requests to the storage are
counted on a store in memory. Hours follow from ``--per-hour``, the objects that one GPU fine-tunes in an hour (the
default is what `benchmarks/gpu.py` measured in groups of 16, see docs/experiments.md).
"""

import argparse
from collections import Counter
from collections.abc import Callable
from typing import ClassVar

import fsspec
import torch
from diffusers import UNet2DConditionModel
from fsspec.implementations.memory import MemoryFileSystem
from made_up import metadata_of

from objdrive.adapters.adapter import Adapter, adapter_files
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.store import ArtifactStore
from objdrive.base.family import STABLE_DIFFUSION
from objdrive.base.files import EMBEDDED
from objdrive.training.recipe import make_recipe

_SD15_CHANNELS = (320, 640, 1280, 1280)
_DIGEST = "0" * 32
_GIB = 2**30


class Counting(MemoryFileSystem):
    """Memory that counts what it is asked for, by the request that S3 would get."""

    protocol = "counting"
    asked: ClassVar[Counter[str]] = Counter()

    def cat_file(self, path: str, *args: object, **options: object) -> bytes:
        self.asked["GET"] += 1
        return super().cat_file(path, *args, **options)

    def pipe_file(self, path: str, value: bytes, *args: object, **options: object) -> None:
        self.asked["PUT"] += 1
        super().pipe_file(path, value, *args, **options)

    def rm_file(self, path: str) -> None:
        self.asked["DELETE"] += 1
        super().rm_file(path)

    def find(self, path: str, *args: object, **options: object) -> object:
        self.asked["LIST"] += 1
        return super().find(path, *args, **options)


def files_of(unet: UNet2DConditionModel, width: int) -> dict[str, bytes]:
    """An artifact's files, without previews and ``artifact.json``."""
    family, rank = STABLE_DIFFUSION, make_recipe().rank
    with AdapterBank(unet, family.lora_targets, slots=1, rank=rank) as bank:
        lora = {name: torch.zeros(tensor.shape) for name, tensor in bank.export(0).items()}
    adapter = Adapter(lora, {family.text_encoders[0]: torch.zeros(width)}).in_half_precision()
    return adapter_files(adapter, token="<object>", family=family)


def count_requests(files: dict[str, bytes]) -> None:
    """Of what an object goes through."""
    fsspec.register_implementation("counting", Counting, clobber=True)
    store = ArtifactStore("counting://store")
    recipe = make_recipe().model_dump(mode="json")
    metadata = metadata_of("object-0", _DIGEST, token="<object>", recipe=recipe)
    steps: list[tuple[str, Callable[[], object]]] = [
        ("a row's look whether it is committed", lambda: store.current("object-0")),
        ("its commit", lambda: store.commit(files, metadata)),
        ("a rerun's look", lambda: store.current("object-0")),
        ("a generator's load", lambda: store.read("object-0", _DIGEST)),
    ]
    print("requests of an object            " + "".join(f"{name:>8}" for name in ("GET", "PUT", "LIST", "DELETE")))
    for name, step in steps:
        Counting.asked.clear()
        step()
        asked = (Counting.asked[kind] for kind in ("GET", "PUT", "LIST", "DELETE"))
        print(f"{name:36}" + "".join(f"{number:8}" for number in asked))


def table(objects: list[int], gpus: list[int], per_hour: float, sizes: dict[str, int]) -> None:
    names = "".join(f"{f'GiB, {name}':>18}" for name in sizes)
    print("  objects    GPU hours" + "".join(f"{f'hours, {count}':>12}" for count in gpus) + names)
    for count in objects:
        hours = count / per_hour
        spread = "".join(f"{hours / number:12.1f}" for number in gpus)
        stored = "".join(f"{count * size / _GIB:18.0f}" for size in sizes.values())
        print(f"{count:9,}   {hours:10,.0f}{spread}{stored}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-hour", type=float, default=205, help="objects that a GPU fine-tunes (%(default)s)")
    parser.add_argument("--objects", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 32, 100])
    parser.add_argument("--smoke", action="store_true", help="one small table")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.objects, arguments.gpus = [100], [1]
    tiny = UNet2DConditionModel.from_pretrained(EMBEDDED / "tiny64" / "unet")
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=_SD15_CHANNELS
        )
    # Without values: only shapes count.
    big = files_of(sd15.to_empty(device="cpu"), 768)
    small = files_of(tiny, int(tiny.config["cross_attention_dim"]))
    sizes = {name: sum(map(len, files.values())) for name, files in (("tiny64", small), ("SD 1.5", big))}
    for name, size in sizes.items():
        print(f"an adapter for {name}: {size / 1e6:.1f} MB")
    count_requests(small)
    table(arguments.objects, arguments.gpus, arguments.per_hour, sizes)


if __name__ == "__main__":
    main()
