"""The engine of a server, made to its settings."""

from concurrent.futures import ThreadPoolExecutor

from objdrive.base.stable_diffusion import Base
from objdrive.sampling.engine import Engine
from serve.settings import Settings
from serve.threads import use_threads


def make_engine(settings: Settings) -> tuple[Base, Engine]:
    """Load the base and start an engine on it.

    On a thread that ends. PyTorch computes on a processor with a team of threads for each thread that calls it, kept
    until the caller ends. Where there are more of them than cores, none waits awake any more for the next operation
    (libgomp, ``GOMP_SPINCOUNT``), and being woken takes longer than most operations of a small network. So the engine's
    thread must have the only team.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="objdrive-start") as start:
        return start.submit(_make_engine, settings).result()


def _make_engine(settings: Settings) -> tuple[Base, Engine]:
    base = Base.load(settings.base_name(), clip=settings.clip, vae=settings.vae)
    use_threads(base, settings.threads)
    engine = Engine(
        base,
        settings.open_store(),
        batch_size=settings.batch_size,
        slots=settings.slots,
        rank=settings.rank,
        host_bytes=settings.host_mib * 2**20,
        queue_limit=settings.queue_limit,
    )
    return base, engine
