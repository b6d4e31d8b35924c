"""All that we use of Ray beyond its public interface. Whoever raises Ray begins here (see CONTRIBUTING.md).

What Ray Train's workers need is in `jobs.ray_private.train`; the rest is without heavy imports.
"""

import ray
from ray._private.state import state
from ray.exceptions import RayActorError

from objdrive.errors import ObjdriveError

CHECKED_VERSION = "2.60"
"""The minor version of Ray on which the tests of this module passed."""


def check_ray(version: str = ray.__version__) -> None:
    """See that the Ray that is installed is the one that was checked.

    Raises:
        ObjdriveError: it is another minor version.
    """
    if version.split(".")[:2] != CHECKED_VERSION.split("."):
        raise ObjdriveError(
            f"Ray {version} is installed, and jobs were checked with Ray {CHECKED_VERSION} only: they use parts of Ray "
            "that are not public and change between minor versions (has_replica_groups, the trainer's callbacks, the "
            f"autoscaler's node groups, words of errors). Install ray=={CHECKED_VERSION}.*, or see 'How to raise Ray' "
            "in CONTRIBUTING.md"
        )


def node_groups() -> list[dict[str, float]]:
    """What a node has of each group that an autoscaler may start; empty if it has not told, or there is none."""
    config = state.get_cluster_config()
    return [] if config is None else [dict(group.resources) for group in config.node_group_configs if group.max_count]


def was_no_fault(death: RayActorError) -> bool:
    """Whether an actor was not the cause of its end: its node died, or somebody ended it.

    Ray Train ends all its workers to change their number. The exception has no field for it, only Ray's words.
    """
    return any(words in str(death) for words in ("its node has died", "killed by `ray.kill`"))
