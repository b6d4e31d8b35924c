"""The lease queue as an actor. Apart from the rest, so that its process imports nothing heavy."""

import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayActorError

from jobs.leases import Death, LeaseQueue
from jobs.ray_private import was_no_fault

_PATIENCE_SECONDS = 5.0
_ASK_SECONDS = 2.0


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
            death=_Deaths().of,
        )


def _kill(process: "ActorHandle[Any]") -> None:
    ray.kill(process)


class _Deaths:
    """Asks processes every few seconds for a sign of life. One that stands still gives none, and is not dead."""

    def __init__(self) -> None:
        self._asked: dict[Any, tuple[float, Any]] = {}

    def of(self, process: "ActorHandle[Any]") -> Death | None:
        """How the process died; None as long as nothing says that it did."""
        if process not in self._asked:
            self._ask(process)
        asked, answer = self._asked[process]
        if not ray.wait([answer], timeout=0)[0]:
            return None
        try:
            ray.get(answer)
        except ActorDiedError as error:
            del self._asked[process]
            return Death(str(error).strip().splitlines()[-1], suspect=not was_no_fault(error))
        except RayActorError:
            # Ray can't reach it for the moment.
            pass
        if time.monotonic() - asked >= _ASK_SECONDS:
            self._ask(process)
        return None

    def _ask(self, process: "ActorHandle[Any]") -> None:
        ready: Any = process.__ray_ready__
        self._asked[process] = time.monotonic(), ready.remote()
