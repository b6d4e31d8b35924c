"""Whether an engine still draws."""

import asyncio

from objdrive.errors import Draining, ObjdriveError
from objdrive.sampling.engine import Engine
from objdrive.sampling.requests import DrawRequest


class HealthCheck:
    """Checks that the engine took steps since the last check. An idle engine draws a picture of one step.

    Args:
        seconds: the time limit of that picture.
    """

    def __init__(self, engine: Engine, *, seconds: float = 30.0) -> None:
        self._engine = engine
        self._seconds = seconds
        self._steps = 0

    async def check(self) -> None:
        """Raise ObjdriveError if the engine does not draw."""
        if self._has_moved():
            return
        try:
            request = DrawRequest(prompt="", seed=0, steps=1, guidance_scale=1.0)
            drawing = self._engine.submit(request, whatever_waits=True)
            await asyncio.to_thread(drawing.result, self._seconds)
        except Draining:
            return
        except (TimeoutError, ObjdriveError) as error:
            if not self._has_moved():
                raise ObjdriveError(f"the engine draws nothing: {error}") from error
        self._has_moved()

    def _has_moved(self) -> bool:
        steps = self._engine.stats().step_seconds.count
        moved, self._steps = steps > self._steps, steps
        return moved
