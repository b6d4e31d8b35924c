"""A single client's picture, by the server's engine and by stock diffusers, for each number of PyTorch's threads.

Usage: ``python benchmarks/one_client.py``. Each runs in a process of its own, as a server does; they draw in turns, so
that what else the machine does meets both. Of each the median of pictures: seconds, processor time, and how often a
thread waited for another asleep (voluntary context switches).
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from objdrive.base.files import EMBEDDED
from objdrive.sampling.requests import DrawRequest
from serve.engine import make_engine
from serve.settings import Settings

PROMPT = "a photo of a mug on grass"

Figures = tuple[float, float, float]


def stock(threads: int | None, steps: int, guidance_scale: float) -> Callable[[], object]:
    """Stock diffusers, as its documents use it."""
    if threads:
        torch.set_num_threads(threads)
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED / "tiny64", dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(PROMPT, num_inference_steps=steps, guidance_scale=guidance_scale)


def engine(threads: int | None, steps: int, guidance_scale: float) -> Callable[[], object]:
    """The engine of a server with an empty store."""
    settings = Settings(store=tempfile.mkdtemp(), base="tiny64", no_auth=True, threads=threads)
    _, drawing = make_engine(settings)
    return lambda: drawing.submit(DrawRequest(PROMPT, 0, steps=steps, guidance_scale=guidance_scale)).result()


def serve(pipe: Connection, make: Callable[..., Callable[[], object]], *arguments: object) -> None:
    """Draw whenever asked, and tell what it took."""
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    draw = make(*arguments)
    draw()
    pipe.send("ready")
    while pipe.recv():
        pipe.send(measured(draw))


def measured(draw: Callable[[], object]) -> Figures:
    """Seconds, processor time and voluntary context switches of one picture."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    draw()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, after.ru_nvcsw - before.ru_nvcsw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 0], help="0: each one's own choice")
    arguments = parser.parse_args()
    context = get_context("spawn")
    for threads in arguments.threads:
        pipes = {}
        for make in (stock, engine):
            ours, theirs = context.Pipe()
            asked = (theirs, make, threads or None, arguments.steps, arguments.guidance_scale)
            context.Process(target=serve, args=asked, daemon=True).start()
            # Its end of the pipe alone is open, so that its death is seen.
            theirs.close()
            ours.recv()
            pipes[make.__name__] = ours
        figures: dict[str, list[Figures]] = {name: [] for name in pipes}
        for _ in range(arguments.rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                figures[name].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
        middle = {
            name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in figures.items()
        }
        print(f"threads: {threads or 'own choice'}")
        for name, (seconds, cpu, switches) in middle.items():
            print(f"    {name:6} {seconds:.2f} s, {cpu:.2f} s of processors, {switches:.0f} times asleep")
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(figures["engine"], figures["stock"], strict=True)]
        print(
            f"    engine / stock: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), of "
            f"processor time {middle['engine'][1] / middle['stock'][1]:.2f}"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
