"""How many threads PyTorch draws with on the CPU."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from objdrive.base.stable_diffusion import Base
from objdrive.sampling.sampler import SampleSpec, draw_latents
from serve.errors import logger

_ROUNDS = 3
_MOST_SECONDS = 3.0
_SPEC = SampleSpec("", 0, steps=2, guidance_scale=2.0)


def use_threads(base: Base, wanted: int | None) -> None:
    """Have PyTorch use so many threads, for the engine's thread too if that is started afterwards.

    None: those with which this base draws fastest, here and now. PyTorch's own choice is a thread for each core. The
    threads of an operation wait for one another, and a small network has thousands of small operations: where cores
    are shared with other processes, a thread that has to wait for a core holds the others up each time, and one thread
    alone is faster. On a GPU nothing is measured.

    To be called on a thread that ends (see `serve.engine.make_engine`), or what is measured here slows the engine.
    """
    if wanted is None and base.device.type != "cpu":
        return
    most = torch.get_num_threads()
    chosen = wanted or fastest(sorted({1, (most + 1) // 2, most}), lambda count: _draw(base, count))
    torch.set_num_threads(chosen)
    logger.info("PyTorch draws with %d thread(s)", chosen)


def fastest(
    counts: Sequence[int],
    draw: Callable[[int], None],
    *,
    clock: Callable[[], float] = time.perf_counter,
    most_seconds: float = _MOST_SECONDS,
) -> int:
    """The number of threads with which `draw`, called with it, takes least time: the median of rounds in turns.

    Args:
        counts: to choose from.
        draw: what is measured.
        clock: seconds.
        most_seconds: no further round begins after these.
    """
    if len(counts) == 1:
        return counts[0]
    began = clock()
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    # The first round is for caches to fill, unless it takes long: then there is no other.
    for number in range(_ROUNDS + 1):
        for count in counts:
            started = clock()
            draw(count)
            seconds[count].append(clock() - started)
        if clock() - began >= most_seconds:
            break
        if number == 0:
            seconds = {count: [] for count in counts}
    return min(counts, key=lambda count: statistics.median(seconds[count]))


def _draw(base: Base, count: int) -> None:
    torch.set_num_threads(count)
    draw_latents(base, [_SPEC])
