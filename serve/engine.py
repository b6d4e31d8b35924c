"""The engine of a server, made to its settings."""

from objdrive.base.stable_diffusion import Base
from objdrive.sampling.engine import Engine
from serve.settings import Settings
from serve.threads import use_threads


def make_engine(settings: Settings) -> tuple[Base, Engine]:
    """Load the base and start an engine on it."""
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
