import json
import threading

import pytest

from objdrive.errors import ObjdriveError
from serve.auth import ApiKey, Gate, TokenBucket, new_key, read_keys
from serve.errors import ApiError


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def write(path, *keys):
    path.write_text(json.dumps({"keys": [key.model_dump() for key in keys]}))


def test_a_new_key_opens_and_is_not_kept(tmp_path):
    secret, entry = new_key("shop", prefix="acme-")
    write(tmp_path / "keys.json", entry)
    assert secret not in (tmp_path / "keys.json").read_text()
    gate = Gate(tmp_path / "keys.json")
    assert gate.key(f"Bearer {secret}") == entry
    assert gate.key(f"bearer  {secret} ") == entry
    for wrong in (None, "", "Bearer", "Bearer ", f"Basic {secret}", f"Bearer {secret}x", f"Bearer {entry.sha256}"):
        with pytest.raises(ApiError) as refused:
            gate.key(wrong)
        assert refused.value.status == 401


def test_keys_differ():
    assert len({new_key("shop")[0] for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "text",
    [
        b"keys: \xff",
        "keys: [{name: 2024-02-30}]",
        "keys: !!bool x",
        "keys: !!timestamp x",
        "",
        "keys",
        "keys: 3",
        "keys: [{name: a}]",
        "keys: [{name: a, sha256: abc}]",
        "keys: [{name: a, sha256: '" + "0" * 64 + "', prefx: b}]",
        "keys: [{name: 'a b', sha256: '" + "0" * 64 + "'}]",
        "keys: [",
        "keys: [{name: a, sha256: '" + "0" * 64 + "'}, {name: a, sha256: '" + "1" * 64 + "'}]",
    ],
)
def test_a_file_that_is_not_right_is_refused(tmp_path, text):
    (tmp_path / "keys.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ObjdriveError, match=r"keys\.yaml"):
        read_keys(tmp_path / "keys.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ObjdriveError, match=r"none\.yaml"):
        Gate(tmp_path / "none.yaml")


def test_changes_of_the_file_count_within_seconds(tmp_path):
    path = tmp_path / "keys.json"
    (old, old_entry), (new, new_entry) = new_key("old"), new_key("new")
    write(path, old_entry)
    gate = Gate(path)
    write(path, new_entry)
    gate.refresh()
    assert gate.key(f"Bearer {new}").name == "new"
    assert gate.named("old") is None
    with pytest.raises(ApiError):
        gate.key(f"Bearer {old}")
    path.write_text("broken: [")
    gate.refresh()
    assert gate.key(f"Bearer {new}").name == "new"


def test_nothing_that_goes_wrong_ends_the_keys(tmp_path, monkeypatch, caplog):
    path = tmp_path / "keys.json"
    (secret, entry), (_, other) = new_key("one"), new_key("other")
    write(path, entry)
    gate = Gate(path)
    write(path, entry, other)
    with monkeypatch.context() as patched:
        patched.setattr("serve.auth.read_keys", lambda at: {}["a fault of ours"])
        gate.refresh()
    assert gate.key(f"Bearer {secret}").name == "one"
    assert "a fault of ours" in caplog.text
    gate.refresh()
    assert gate.named("other") == other


def test_the_rate_is_kept_over_time():
    clock = Clock()
    key = ApiKey(name="k", sha256="0" * 64, requests_per_minute=60, burst=5)
    bucket = TokenBucket(key, clock())
    taken = 0
    for tick in range(1000):
        clock.now = tick / 10
        if bucket.wait(1, clock()) == 0.0:
            bucket.add(-1)
            taken += 1
    assert taken == 5 + 99


def test_a_request_larger_than_the_burst_is_paid_back():
    key = ApiKey(name="k", sha256="0" * 64, requests_per_minute=60, burst=5)
    bucket = TokenBucket(key, 0.0)
    assert bucket.wait(8, 0.0) == 0.0
    bucket.add(-8)
    assert bucket.wait(1, 3.0) == pytest.approx(1.0)
    assert bucket.wait(1, 4.0) == 0.0


def test_keys_have_rates_of_their_own(tmp_path):
    (_, one), (_, other) = new_key("one"), new_key("other")
    write(tmp_path / "keys.json", one, other)
    gate = Gate(tmp_path / "keys.json", clock=Clock())
    gate.spend(one, one.burst).take()
    with pytest.raises(ApiError) as refused:
        gate.spend(one)
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.retry_after >= 1
    gate.spend(other)


def test_the_file_is_read_only_when_it_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "keys.json"
    (secret, entry), (_, other) = new_key("one"), new_key("other")
    write(path, entry)
    gate = Gate(path)
    read = []
    monkeypatch.setattr("serve.auth.read_keys", lambda at: read.append(at) or read_keys(at))
    for _ in range(3):
        gate.refresh()
        assert gate.key(f"Bearer {secret}").name == "one"
    assert read == []
    write(path, entry, other)
    gate.refresh()
    assert gate.named("other") == other
    assert read == [path]


def test_no_request_waits_while_the_file_is_read(tmp_path, monkeypatch):
    path = tmp_path / "keys.json"
    (secret, entry), (_, other) = new_key("one"), new_key("other")
    write(path, entry)
    gate = Gate(path, reload_seconds=0.01)
    reading, go_on = threading.Event(), threading.Event()

    def slowly(at):
        reading.set()
        assert go_on.wait(30)
        return read_keys(at)

    monkeypatch.setattr("serve.auth.read_keys", slowly)
    write(path, entry, other)
    gate.start()
    try:
        assert reading.wait(30)
        assert gate.key(f"Bearer {secret}").name == "one"
        assert gate.named("other") is None
        gate.spend(entry).take()
    finally:
        go_on.set()
        gate.close()
    assert gate.named("other") == other


def test_what_is_refused_is_given_back(tmp_path):
    key = ApiKey(name="k", sha256="0" * 64, burst=3)
    gate = Gate(None, clock=Clock())
    for _ in range(10):
        refused = gate.spend(key, 3)
        refused.take()
        refused.give_back()
        # What another of its pictures says then is too late.
        refused.take()
        refused.give_back()
    drawn = gate.spend(key, 3)
    drawn.take()
    drawn.take()
    with pytest.raises(ApiError):
        gate.spend(key)


def test_many_that_ask_at_once_use_up_nothing_until_they_have_places(tmp_path):
    key = ApiKey(name="k", sha256="0" * 64, burst=3)
    gate = Gate(None, clock=Clock())
    asked = [gate.spend(key) for _ in range(300)]
    for spending in asked[:3]:
        spending.take()
    with pytest.raises(ApiError) as refused:
        asked[3].take()
    assert refused.value.code == "rate_limit_exceeded"
