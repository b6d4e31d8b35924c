"""Makes a worker's fine-tunes where the worker runs."""

from jobs.fanout import Work
from jobs.settings import FineTuneSettings


def make_fine_tune(settings: FineTuneSettings) -> Work:
    """Load the base, and be ready to fine-tune on it."""
    # Ray's own actors unpickle this function too: only workers need torch.
    import torch

    from jobs.finetune import FineTune

    if settings.cpu_threads and not torch.cuda.is_available():
        torch.set_num_threads(settings.cpu_threads)
    return FineTune(settings)
