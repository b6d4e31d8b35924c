"""All that we use of Ray beyond its public interface. Whoever raises Ray begins here (see CONTRIBUTING.md)."""

from typing import Any

import ray
from ray._private.state import state
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

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
            "Train that are not public and change between minor versions (has_replica_groups, the trainer's "
            f"callbacks, the autoscaler's node groups). Install ray=={CHECKED_VERSION}.*, or see 'How to raise Ray' in "
            "CONTRIBUTING.md"
        )


def node_groups() -> list[dict[str, float]]:
    """What a node has of each group that an autoscaler may start; empty if it has not told, or there is none."""
    config = state.get_cluster_config()
    return [] if config is None else [dict(group.resources) for group in config.node_group_configs if group.max_count]


class PerWorkerBackend(Backend):
    """Replaces a dead rank alone; no process group joins the workers.

    Without it, Ray Train restarts all the workers when one dies. Ray made the switch for torchft.
    """

    has_replica_groups = True


class PerWorkerConfig(TorchConfig):
    """TorchTrainer without torch.distributed."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend above."""
        return PerWorkerBackend


class PerWorkerTrainer(TorchTrainer):
    """TorchTrainer without Ray Train's cleaner of placement groups.

    The cleaner takes "the latest cluster of this host" for its own one. Next to another cluster it therefore ends a
    sound run, or holds the end of a run up for 12 s. What it is for, a controller that dies alone, ends the driver's
    job here, and with the job its placement groups.
    """

    def _create_default_callbacks(self) -> list[Any]:
        # With another version of Ray it may not be there: `check_ray` shall say so, and not an import.
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

        # Ray Train v2 makes TorchTrainer another class than the one that type checkers see.
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]
