"""Which replicas an object is at home on."""

import hashlib
from collections.abc import Mapping


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
