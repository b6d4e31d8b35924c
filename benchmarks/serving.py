"""The engine against stock diffusers and against itself with one object a batch: one process, same threads, in turns.

Usage: ``python benchmarks/serving.py``. Stock diffusers is one pipeline that draws one request at a time:
``load_lora_weights``, ``load_textual_inversion``, draw, unload. Requests are a long-tailed mix (Zipf) of 200 objects.
Prints the medians over rounds in which the servers take turns.
"""

import argparse
import itertools
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from made_up import metadata_of
from matplotlib import pyplot
from transformers.utils import logging as transformers_logging

from objdrive.adapters.adapter import Adapter, adapter_files
from objdrive.adapters.artifact import ArtifactKey, BaseRef
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.store import ArtifactStore
from objdrive.base.files import EMBEDDED
from objdrive.base.stable_diffusion import Base
from objdrive.sampling.engine import Engine
from objdrive.sampling.requests import DrawRequest

STEPS = 25
GUIDANCE_SCALE = 4.0
RANK = 8
BATCH_SIZE = 16
PROMPT = "a photo of {} on grass"


def fill_store(store: ArtifactStore, base: Base, count: int) -> list[ArtifactKey]:
    """Commit adapters of random weights, in shape and size like fine-tuned ones."""
    with AdapterBank(base.unet, base.family.lora_targets, slots=1, rank=RANK) as bank:
        shapes = {key: value.shape for key, value in bank.export(0).items()}
    keys = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        lora = {key: 0.02 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        words = base.class_embeddings("mug")
        embeddings = {encoder: word + 0.02 * torch.randn_like(word) for encoder, word in words.items()}
        object_id = f"object-{number:03}"
        token = f"<{object_id}>"
        ref = BaseRef(id=base.name, fingerprint=base.fingerprint)
        metadata = metadata_of(object_id, f"{number:032x}", token=token, class_name="mug", base=ref, method_version=1)
        store.commit(adapter_files(Adapter(lora, embeddings), token=token, family=base.family), metadata)
        keys.append(ArtifactKey(object_id, metadata.digest))
    return keys


def long_tail(keys: Sequence[ArtifactKey], count: int, seed: int) -> list[ArtifactKey]:
    """Keys as a catalog's visitors ask for them: the k-th object with weight 1 / k."""
    return random.Random(seed).choices(keys, [1 / rank for rank in range(1, len(keys) + 1)], k=count)


class Stock:
    """Stock diffusers: whoever comes waits for the pipeline, and loads the adapter."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._turn = threading.Lock()
        self._pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED / "tiny64", dtype=torch.float32)
        self._pipeline.set_progress_bar_config(disable=True)

    def load(self, key: ArtifactKey) -> None:
        folder = self._store.folder(key.object_id, key.digest)
        self._pipeline.load_lora_weights(folder)
        self._pipeline.load_textual_inversion(folder, use_safetensors=True)

    def unload(self) -> None:
        self._pipeline.unload_lora_weights()
        self._pipeline.unload_textual_inversion()

    def draw(self, key: ArtifactKey, seed: int) -> None:
        with self._turn:
            self.load(key)
            self._pipeline(
                PROMPT.replace("{}", f"<{key.object_id}>"),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=torch.Generator().manual_seed(seed),
            )
            self.unload()


def engine_on(store: ArtifactStore, *, slots: int) -> Engine:
    """An engine on a base of its own; one slot lets only requests for one object share a batch."""
    base = Base.load("tiny64")
    return Engine(base, store, batch_size=BATCH_SIZE, slots=slots, rank=RANK, host_bytes=2**30, queue_limit=1024)


def drawing_by(engine: Engine) -> Callable[[ArtifactKey, int], None]:
    def draw(key: ArtifactKey, seed: int) -> None:
        request = DrawRequest(PROMPT, seed, (key,), steps=STEPS, guidance_scale=GUIDANCE_SCALE)
        engine.submit(request).result()

    return draw


@dataclass(frozen=True)
class Load:
    """What clients saw that sent one request after the other."""

    per_second: float
    seconds: list[float]

    def percentile(self, share: float) -> float:
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


def under_load(draw: Callable[[ArtifactKey, int], None], keys: Sequence[ArtifactKey], clients: int) -> Load:
    """Draw all of `keys` by `clients` that each wait for their picture before they ask for the next."""
    todo, lock, seconds = iter(enumerate(keys)), threading.Lock(), []

    def client() -> None:
        while True:
            with lock:
                seed, key = next(todo, (0, None))
            if key is None:
                return
            asked = time.perf_counter()
            draw(key, seed)
            seconds.append(time.perf_counter() - asked)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for running in [pool.submit(client) for _ in range(clients)]:
            running.result()
    return Load(len(keys) / (time.perf_counter() - started), seconds)


def swaps(stock: Stock, bank: AdapterBank, adapter: Adapter, key: ArtifactKey) -> tuple[float, float]:
    """Seconds to load and unload by stock diffusers, and to copy from host memory into a slot."""
    started = time.perf_counter()
    stock.load(key)
    stock.unload()
    loaded = time.perf_counter()
    bank.load(0, adapter.lora)
    return loaded - started, time.perf_counter() - loaded


def spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def compare_swaps(stock: Stock, keys: Sequence[ArtifactKey], rounds: int) -> None:
    base = Base.load("tiny64")
    with AdapterBank(base.unet, base.family.lora_targets, slots=2, rank=RANK) as bank:
        adapter = Adapter(bank.export(1), {})
        measured = [swaps(stock, bank, adapter, key) for key in itertools.islice(itertools.cycle(keys), 5 * rounds + 1)]
    theirs, ours = (1000 * statistics.median(column) for column in zip(*measured[1:], strict=True))
    print(f"swap: stock {theirs:.1f} ms, ours {ours:.2f} ms: 1/{theirs / ours:.0f}")


def compare_servers(
    stock: Stock, mixed: Engine, alone: Engine, keys: Sequence[ArtifactKey], rounds: int, count: int
) -> None:
    against_stock, latency, against_alone = [], [], []
    for number in range(rounds):
        mix = long_tail(keys, count, seed=number)
        few = mix[: max(4, count // 6)]
        one_by_one = under_load(stock.draw, few, 1)
        one_client = under_load(drawing_by(mixed), few, 1)
        full = under_load(drawing_by(mixed), mix, BATCH_SIZE)
        eight_clients = under_load(drawing_by(mixed), mix, 8)
        eight_apart = under_load(drawing_by(alone), mix, 8)
        against_stock.append(full.per_second / one_by_one.per_second)
        latency.append(one_client.percentile(0.5) / one_by_one.percentile(0.5))
        against_alone.append(eight_clients.per_second / eight_apart.per_second)
        print(
            f"round {number}: per second: stock {one_by_one.per_second:.2f}; engine at 1 client "
            f"{one_client.per_second:.2f}, at {BATCH_SIZE} {full.per_second:.2f}, at 8 {eight_clients.per_second:.2f}, "
            f"at 8 with one object a batch {eight_apart.per_second:.2f}",
            flush=True,
        )
    print(f"requests per second at {BATCH_SIZE} clients against stock: {spread(against_stock)}")
    print(f"median latency at 1 client against stock: {spread(latency)}")
    print(f"mixed batches against one object a batch, at 8 clients: {spread(against_alone)}")


def sweep(mixed: Engine, keys: Sequence[ArtifactKey]) -> list[dict[str, float]]:
    rows = []
    print("clients   per second   p50 s   p95 s   p99 s")
    for clients in (1, 2, 4, 8, 16, 32):
        seen = under_load(drawing_by(mixed), long_tail(keys, max(12, 6 * clients), seed=clients), clients)
        row = [seen.per_second, *(seen.percentile(share) for share in (0.5, 0.95, 0.99))]
        print(f"{clients:7}   {row[0]:10.2f}   {row[1]:5.2f}   {row[2]:5.2f}   {row[3]:5.2f}", flush=True)
        rows.append(dict(zip(("clients", "per_second", "p50", "p95", "p99"), [clients, *row], strict=True)))
    return rows


def plot(rows: Sequence[dict[str, float]], path: Path) -> None:
    figure, (throughput, latency) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    clients = [row["clients"] for row in rows]
    throughput.plot(clients, [row["per_second"] for row in rows], marker="o")
    throughput.set(ylabel="pictures a second", ylim=(0, None))
    for name in ("p50", "p95", "p99"):
        latency.plot(clients, [row[name] for row in rows], marker="o", label=name)
    latency.set(ylabel="seconds a picture", ylim=(0, None))
    latency.legend()
    for axes in (throughput, latency):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="clients", xticks=clients, xticklabels=[str(count) for count in clients])
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64, help="in a round's mix")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sweep", type=Path, metavar="PNG", help="1 to 32 clients as well, plotted there")
    arguments = parser.parse_args()
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(folder)
        keys = fill_store(store, Base.load("tiny64"), arguments.objects)
        stock = Stock(store)
        with engine_on(store, slots=BATCH_SIZE) as mixed, engine_on(store, slots=1) as alone:
            for draw in (stock.draw, drawing_by(mixed), drawing_by(alone)):
                draw(keys[-1], 0)
            compare_swaps(stock, keys, arguments.rounds)
            compare_servers(stock, mixed, alone, keys, arguments.rounds, arguments.requests)
            if arguments.sweep:
                plot(sweep(mixed, keys), arguments.sweep)


if __name__ == "__main__":
    main()
