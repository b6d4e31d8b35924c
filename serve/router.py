"""Sends a request to a generator that probably has the object's adapter, unless that one is busy."""

from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.placement import ranked


class WarmRouter(RequestRouter):
    """Keeps an object's requests on its home replicas. Of a group, Serve takes the replica with the fewest requests."""

    def initialize_state(self, choices: int = 2, spill_at: int = 8, full_at: int = 72, **_: object) -> None:
        """See `serve.placement.ranked`; from ``request_router_kwargs``."""
        self._choices = choices
        self._spill_at = spill_at
        self._full_at = full_at

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the replicas for a request; requests without an adapter are spread over all replicas."""
        if pending_request is None:
            return [list(candidate_replicas)]
        # Without this, Serve asks again without a pause while all replicas are full.
        pending_request.routing_context.should_backoff = True
        key = pending_request.metadata.multiplexed_model_id or pending_request.metadata.internal_request_id
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queues = {unique_id: self._queue(replica.replica_id) for unique_id, replica in replicas.items()}
        groups = ranked(key, queues, choices=self._choices, spill_at=self._spill_at, full_at=self._full_at)
        return [[replicas[unique_id] for unique_id in group] for group in groups]

    def _queue(self, replica_id: ReplicaID) -> int:
        return self.replica_queue_len_cache.get(replica_id) or 0
