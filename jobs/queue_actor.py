"""The lease queue as an actor. Apart from the rest, so that its process imports nothing heavy."""

import time
from typing import Any

import ray
from ray.actor import ActorHandle

from jobs.leases import LeaseQueue

_PATIENCE_SECONDS = 5.0


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class QueueActor(LeaseQueue):
    """When it dies, a new incarnation starts empty and is filled again by the driver."""

    def __init__(self, *, workers: int, stall_seconds: float) -> None:
        again = ray.get_runtime_context().was_current_actor_reconstructed
        super().__init__(
            workers=workers,
            stall_seconds=stall_seconds,
            clock=time.monotonic,
            patience=_PATIENCE_SECONDS if again else 0.0,
            kill=_kill,
        )


def _kill(process: "ActorHandle[Any]") -> None:
    ray.kill(process)
