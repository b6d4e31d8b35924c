"""The Ray cluster that a run uses."""

import logging
import os
import warnings

import ray

from jobs.ray_private import check_ray

_OBJECT_STORE_BYTES = 512 * 2**20


def connect() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names (Ray sets it in jobs), else start a local one.

    Raises:
        ObjdriveError: the Ray that is installed was never checked.
    """
    check_ray()
    # What these say while all is well is of use to Ray's developers only.
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)
    if is_joined():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
    )


def is_joined() -> bool:
    """Whether the cluster is one that others keep, so that nodes may join it."""
    return "RAY_ADDRESS" in os.environ
