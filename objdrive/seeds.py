"""Seeds of everything random, from names."""

import hashlib


def seed_of(text: str) -> int:
    """A 63-bit seed from any text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
