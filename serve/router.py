"""Which generator draws which object: the one that probably has its adapter, unless it is busy."""

import hashlib
from collections.abc import Mapping, Sequence

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica


def ranked(key: str, queues: Mapping[str, int], *, choices: int, spill_at: int) -> list[list[str]]:
    """Groups of replicas to try for a key, the best first.

    Rendezvous hashing (Thaler, Ravishankar 1998) gives every key `choices` homes among the replicas, one before the
    other; a replica that comes or goes moves only the keys that it gets or had.

    Args:
        key: what makes a replica warm, such as an adapter's id.
        queues: of each replica, how many requests it has.
        choices: homes of a key.
        spill_at: a home with that many requests is busy.

    Returns:
        The homes that are not busy, each alone, then all homes, then all replicas.
    """
    homes = sorted(queues, key=lambda replica: _weight(key, replica), reverse=True)[:choices]
    calm = [[home] for home in homes if queues[home] < spill_at]
    return [*calm, homes, list(queues)]


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest()


class WarmRouter(RequestRouter):
    """Keeps an object's traffic on its home replicas. Of a group, Serve takes the replica with the fewest requests."""

    def initialize_state(self, choices: int = 2, spill_at: int = 8, **_: object) -> None:
        """See `ranked`; from ``request_router_kwargs``."""
        self._choices = choices
        self._spill_at = spill_at

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the replicas for a request; requests without an adapter have a home of their own each."""
        if pending_request is None:
            return [list(candidate_replicas)]
        # Without it, Serve would ask again and again without a pause while all are full.
        pending_request.routing_context.should_backoff = True
        key = pending_request.metadata.multiplexed_model_id or pending_request.metadata.internal_request_id
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queues = {unique_id: self._queue(replica.replica_id) for unique_id, replica in replicas.items()}
        groups = ranked(key, queues, choices=self._choices, spill_at=self._spill_at)
        return [[replicas[unique_id] for unique_id in group] for group in groups]

    def _queue(self, replica_id: ReplicaID) -> int:
        return self.replica_queue_len_cache.get(replica_id) or 0
