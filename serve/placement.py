"""Which replicas draw which objects."""

import hashlib
from collections.abc import Mapping


def ranked(key: str, queues: Mapping[str, int], *, choices: int, spill_at: int, full_at: int) -> list[list[str]]:
    """Groups of replicas to try for a key, the best first.

    Rendezvous hashing (Thaler, Ravishankar 1998) ranks the replicas for every key; the first `choices` are its homes.
    When a replica comes or goes, only the keys that it gets or had move. A key that is too much for its homes goes on
    to the next in its order, and not to the same two for ever.

    Args:
        key: whatever a replica holds ready, such as an adapter's id.
        queues: how many requests each replica has.
        choices: how many homes a key has.
        spill_at: a replica with this many requests is busy.
        full_at: one with this many has no more places for those whose adapters it holds.

    Returns:
        The replicas that are not busy, each alone, in the key's order; then its homes that are not full, then all
        replicas.
    """
    order = sorted(queues, key=lambda replica: _weight(key, replica), reverse=True)
    calm = [[replica] for replica in order if queues[replica] < spill_at]
    homes = [replica for replica in order[:choices] if queues[replica] < full_at]
    return [*calm, *([homes] if homes else []), list(queues)]


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest()
