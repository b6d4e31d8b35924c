"""Makes a worker's fine-tunes where the worker runs."""

from jobs.fanout import Work
from jobs.settings import FineTuneSettings


def make_fine_tune(settings: FineTuneSettings, gpus: float) -> Work:
    """Load the base, and be ready to fine-tune on it, with so many GPUs or a part of one."""
    # Ray's own actors unpickle this function too: only workers need torch.
    import torch

    from jobs.finetune import FineTune
    from objdrive.base.memory import limit_memory

    if settings.cpu_threads and not torch.cuda.is_available():
        torch.set_num_threads(settings.cpu_threads)
    limit_memory(gpus)
    return FineTune(settings)
