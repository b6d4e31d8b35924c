"""What we use of Ray Train beyond its public interface."""

from typing import Any

from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer


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
