"""A Serve application whose answers take a while: the process that gives them."""

import asyncio
import os
from typing import Any

from ray import serve

SECONDS = 1.5
GRACE = 10.0


@serve.deployment(
    max_replicas_per_node=1,
    ray_actor_options={"num_cpus": 1},
    graceful_shutdown_timeout_s=GRACE,
    max_ongoing_requests=50,
)
class Slow:
    async def __call__(self, request: Any) -> str:
        await asyncio.sleep(SECONDS)
        return str(os.getpid())


app = Slow.bind()
