"""The Ray cluster that a run uses, and what its workers take of it."""

import logging
import math
import os
import warnings

import ray

from jobs.fanout import Workers
from objdrive.errors import ObjdriveError

_OBJECT_STORE_BYTES = 512 * 2**20


def connect() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names (Ray sets it in jobs), else start a local one."""
    # What these say while all is well is of use to Ray's developers only.
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
    )


def choose_workers(wanted: str | None, gpus_per_worker: float | None) -> Workers:
    """Read ``MIN[:MAX]``; by default one worker per GPU, or per core on a cluster without any.

    Raises:
        ObjdriveError: not of that form, or more GPUs per worker than there are.
    """
    resources = ray.cluster_resources()
    there = resources.get("GPU", 0.0)
    gpus = gpus_per_worker if gpus_per_worker is not None else min(1.0, there)
    if gpus > there:
        raise ObjdriveError(f"--gpus-per-worker {gpus:g}: the cluster has {there:g} GPU(s)")
    if wanted is None:
        count = max(1, math.floor(there / gpus if gpus else resources["CPU"]))
        return Workers(count, count, gpus)
    least, colon, most = wanted.partition(":")
    try:
        workers = Workers(int(least), int(most) if colon else int(least), gpus)
    except ValueError:
        raise ObjdriveError(f"--workers {wanted}: give a number, or MIN:MAX") from None
    if not 1 <= workers.least <= workers.most:
        raise ObjdriveError(f"--workers {wanted}: MIN must be at least 1 and at most MAX")
    return workers
