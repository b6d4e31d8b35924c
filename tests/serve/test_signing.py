import string

import pytest

from serve.errors import ApiError
from serve.signing import Signer

SECRET = b"k" * 32
CLAIMS = {"key": "shop", "draw": {"prompt": "ä {} " * 50, "seed": 2**53 - 1, "objects": [{"object_id": "a"}]}}


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_claims_come_back_until_they_expire():
    clock = Clock()
    signer = Signer(SECRET, clock=clock)
    token = signer.sign(CLAIMS)
    assert set(token) <= set(string.ascii_letters + string.digits + "-_.")
    assert Signer(SECRET, clock=clock).read(token) == CLAIMS
    clock.now += 3599.9
    assert signer.read(token) == CLAIMS
    clock.now += 0.1
    with pytest.raises(ApiError) as refused:
        signer.read(token)
    assert refused.value.code == "link_expired"


def test_nothing_else_is_read():
    token = Signer(SECRET).sign(CLAIMS)
    payload, _, signature = token.partition(".")
    other = Signer(b"o" * 32).sign(CLAIMS)
    flipped = [token[:i] + ("A" if token[i] != "A" else "B") + token[i + 1 :] for i in range(0, len(payload), 7)]
    for bad in ("", ".", payload, f"{payload}.", f".{signature}", other, "ü.ü", "a" * 10_000, *flipped):
        with pytest.raises(ApiError) as refused:
            Signer(SECRET).read(bad)
        assert refused.value.code == "invalid_signature"
