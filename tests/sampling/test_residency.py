import threading
from pathlib import Path

import pytest
import torch

from objdrive.adapters.artifact import EMBEDDING_FILE, LORA_FILE, ArtifactKey
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.store import ArtifactStore
from objdrive.errors import AdapterTooLarge, CorruptArtifact, ObjdriveError, StoreError, UnknownObject, WrongBase
from objdrive.sampling.residency import Reservation, Residency

RANK = 4
PLENTY = 10**9


class GatedStore(ArtifactStore):
    """Counts reads, and lets them through one at a time as the test says."""

    def __init__(self, url):
        super().__init__(url)
        self.reads = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, object_id, digest=None, *, only=None):
        self.reads.append(object_id)
        assert self.gate.wait(30)
        return super().read(object_id, digest, only=only)


@pytest.fixture(scope="module")
def filled(tmp_path_factory, small, put_adapter):
    """A store of objects object-0 to object-5, whose ranks differ, and their keys."""
    store = GatedStore(str(tmp_path_factory.mktemp("filled")))
    return store, [put_adapter(store, small, f"object-{n}", n, rank=1 + n % RANK) for n in range(6)]


@pytest.fixture
def keys(filled):
    return filled[1]


@pytest.fixture
def residency(filled, small):
    """Call it with the number of slots and the bytes of host memory."""
    opened = []

    def open_residency(slots, host_bytes=PLENTY, store=filled[0]):
        bank = AdapterBank(small.unet, small.family.lora_targets, slots=slots, rank=RANK)
        opened.append((Loading(small, store, bank, host_bytes=host_bytes), bank))
        return opened[-1][0]

    filled[0].reads.clear()
    yield open_residency
    for residency, bank in opened:
        residency.close()
        bank.close()


class Loading(Residency):
    """A residency whose loads the test can wait for."""

    def __init__(self, base, store, bank, *, host_bytes):
        self.ended = threading.Semaphore(0)
        super().__init__(base, store, bank, host_bytes=host_bytes, on_loaded=self.ended.release)
        self.bank = bank

    def loaded(self, reservation):
        assert self.prepare(reservation)
        while not self.ready(reservation):
            assert self.ended.acquire(timeout=30)
        return reservation

    def leased(self, *keys):
        reservation = Reservation(keys)
        return reservation, self.lease(self.loaded(reservation))


def assert_in_slot(residency, resident, expected):
    exported = residency.bank.export(resident.slot)
    for key, value in expected.lora.items():
        rank = value.shape[0 if ".lora_A" in key else 1]
        got = exported[key] if ".lora_A" in key else exported[key].transpose(0, 1)
        assert torch.equal(got[:rank], value if ".lora_A" in key else value.transpose(0, 1))
        assert not got[rank:].any()
    torch.testing.assert_close(resident.embeddings, expected.embeddings, rtol=0, atol=0)


def adapter_of(small, random_adapter, key):
    number = int(key.object_id.rsplit("-", 1)[1])
    return random_adapter(small, number, 1 + number % RANK)


class TestLeases:
    def test_bring_adapters_into_slots_in_the_keys_order(self, residency, keys, small, random_adapter):
        three = residency(slots=3)
        reservation, residents = three.leased(keys[2], keys[0], keys[2])
        assert [resident.key for resident in residents] == [keys[2], keys[0]]
        assert residents[0].phrase == "\0 mug"
        assert residents[0].class_name == "mug"
        for resident in residents:
            assert_in_slot(three, resident, adapter_of(small, random_adapter, resident.key))
        assert reservation.leased
        assert set(three.resident) == {keys[0], keys[2]}

    def test_a_leased_slot_is_never_given_away(self, residency, keys):
        two = residency(slots=2)
        first, _ = two.leased(keys[0])
        again, _ = two.leased(keys[0])
        two.leased(keys[1])
        waits = two.loaded(Reservation([keys[2]]))
        assert two.lease(waits) is None
        two.release(first)
        two.release(first)
        assert two.lease(waits) is None
        two.release(again)
        assert two.lease(waits) is not None
        assert set(two.resident) == {keys[1], keys[2]}

    def test_all_or_nothing(self, residency, keys):
        two = residency(slots=2)
        first, _ = two.leased(keys[0])
        both = two.loaded(Reservation([keys[1], keys[2]]))
        assert two.lease(both) is None
        assert two.resident == (keys[0],)
        two.release(first)
        assert two.lease(both) is not None

    def test_the_longest_unused_goes_first(self, residency, keys):
        three = residency(slots=3)
        reservations = [three.leased(key)[0] for key in keys[:3]]
        for index in (1, 0, 2):
            three.release(reservations[index])
        three.leased(keys[3])
        assert set(three.resident) == {keys[0], keys[2], keys[3]}

    def test_a_released_reservation_holds_and_gets_nothing(self, residency, keys):
        one = residency(slots=1)
        reservation = one.loaded(Reservation([keys[0]]))
        one.release(reservation)
        assert not one.prepare(reservation)
        assert one.lease(reservation) is None
        assert one.resident == ()

    def test_tell_which_reservations_need_no_further_slot(self, residency, keys):
        two = residency(slots=2)
        first, _ = two.leased(keys[0])
        assert two.needs_no_slot(Reservation([keys[0]]))
        assert two.needs_no_slot(Reservation([]))
        assert not two.needs_no_slot(Reservation([keys[0], keys[1]]))
        two.release(first)
        assert not two.needs_no_slot(Reservation([keys[0]]))

    def test_under_threads_every_lease_finds_its_own_weights(self, residency, keys, small, random_adapter):
        two, wrong = residency(slots=2, host_bytes=0), []
        expected = {key: adapter_of(small, random_adapter, key) for key in keys}
        held, stop = [], threading.Event()

        def prepare_and_release(seed):
            generator = torch.Generator().manual_seed(seed)
            while not stop.is_set():
                picks = torch.randint(len(keys), (1 + seed % 2,), generator=generator)
                reservation = Reservation([keys[pick] for pick in picks])
                two.prepare(reservation)
                held.append(reservation)
                while not reservation.leased and not stop.is_set():
                    two.ready(reservation)
                    stop.wait(0.0005)
                two.release(reservation)

        threads = [threading.Thread(target=prepare_and_release, args=(seed,), daemon=True) for seed in range(4)]
        for thread in threads:
            thread.start()
        leases = 0
        while leases < 150 and not wrong:
            for reservation in [held.pop(0) for _ in range(len(held))]:
                two.prepare(reservation)
                residents = two.lease(reservation)
                if residents is None:
                    if not reservation.released:
                        held.append(reservation)
                    continue
                leases += 1
                for resident in residents:
                    # Its owner may release it at any time, but nobody else writes to the bank.
                    assert_in_slot(two, resident, expected[resident.key])
        stop.set()
        for thread in threads:
            thread.join()


class TestLoads:
    def test_concurrent_reservations_share_one(self, residency, filled, keys):
        one, store = residency(slots=1), filled[0]
        store.gate.clear()
        reservations = [Reservation([keys[0]]) for _ in range(3)]
        for reservation in reservations:
            one.prepare(reservation)
        assert not any(one.ready(reservation) for reservation in reservations)
        assert one.lease(reservations[0]) is None
        store.gate.set()
        for reservation in reservations:
            one.loaded(reservation)
            assert one.lease(reservation) is not None
        assert store.reads == ["object-0"]
        assert one.hits == {"store": 3}

    def test_come_from_the_nearest_tier(self, residency, filled, keys):
        one, store = residency(slots=1), filled[0]
        for key in (keys[0], keys[0], keys[1], keys[0]):
            one.release(one.leased(key)[0])
        assert store.reads == ["object-0", "object-1"]
        assert one.hits == {"store": 2, "bank": 1, "host": 1}
        assert one.swap_seconds.snapshot().count == 3

    def test_host_memory_is_limited(self, residency, filled, keys):
        store = filled[0]
        one = residency(slots=1)
        for key in keys[:3]:
            one.release(one.leased(key)[0])
        three = one.hosted_bytes
        assert one.hosted == tuple(keys[:3])

        tight = residency(slots=1, host_bytes=three)
        store.reads.clear()
        for key in (*keys[:4], keys[3], keys[0]):
            tight.release(tight.leased(key)[0])
            assert tight.hosted_bytes <= three
        assert store.reads == ["object-0", "object-1", "object-2", "object-3", "object-0"]

    def test_what_reservations_wait_for_stays_in_host_memory(self, residency, keys):
        none = residency(slots=1, host_bytes=0)
        waits = none.loaded(Reservation([keys[0]]))
        more = Reservation([keys[1]])
        assert not none.prepare(more)
        assert none.hosted == (keys[0],)
        assert none.lease(waits) is not None
        assert none.hosted == ()
        assert none.prepare(more)

    def test_an_adapter_that_was_evicted_meanwhile_is_loaded_again(self, residency, keys):
        one = residency(slots=1, host_bytes=1)
        first, _ = one.leased(keys[0])
        waits = Reservation([keys[0]])
        assert one.prepare(waits)
        one.release(first)
        one.release(one.leased(keys[1])[0])
        assert one.lease(waits) is None
        one.loaded(waits)
        (resident,) = one.lease(waits)
        assert resident.key == keys[0]


@pytest.fixture
def own(tmp_path, small, put_adapter):
    """A store of one's own with one object: (store, key)."""
    store = ArtifactStore(str(tmp_path / "own"), attempts=2)
    return store, put_adapter(store, small, "object-0", 0)


def rewrite(store, key, name, change):
    path = Path(store.folder(key.object_id, key.digest)) / name
    path.write_bytes(change(path.read_bytes()))


def flipped(data):
    return data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]


def halved(data):
    return data[: len(data) // 2]


def emptied(data):
    return b""


class TestChecks:
    @pytest.mark.parametrize(
        ("name", "change"),
        [
            (LORA_FILE, flipped),
            (LORA_FILE, halved),
            (LORA_FILE, emptied),
            (EMBEDDING_FILE, flipped),
            (EMBEDDING_FILE, halved),
            ("artifact.json", halved),
            ("artifact.json", emptied),
        ],
    )
    def test_refuse_damage_and_recover(self, residency, own, name, change):
        store, key = own
        one = residency(slots=1, store=store)
        path = Path(store.folder(key.object_id, key.digest)) / name
        good = path.read_bytes()
        rewrite(store, key, name, change)
        with pytest.raises(CorruptArtifact, match=name):
            one.leased(key)
        assert one.resident == one.hosted == ()
        path.write_bytes(good)
        assert one.leased(key)[1] is not None

    def test_refuse_another_base(self, residency, own, small, put_adapter):
        store, _ = own
        other = put_adapter(store, small, "other", 1, base={"id": "sd15", "fingerprint": "0" * 32}, digest="0" * 32)
        with pytest.raises(WrongBase, match=rf"other@0+ was made on the base 'sd15'.* has {small.fingerprint}"):
            residency(slots=1, store=store).leased(other)

    def test_refuse_a_rank_that_is_too_high(self, residency, own, small, put_adapter):
        store, _ = own
        big = put_adapter(store, small, "big", 1, rank=RANK + 1)
        with pytest.raises(AdapterTooLarge, match=rf"big@.* has rank {RANK + 1}, the bank takes {RANK}"):
            residency(slots=1, store=store).leased(big)

    def test_refuse_weights_that_do_not_fit(self, residency, own, small, tiny64, put_adapter, random_adapter):
        store, _ = own
        foreign = put_adapter(store, small, "foreign", 1, adapter=random_adapter(tiny64, 1))
        with pytest.raises(CorruptArtifact, match="layers that the base lacks"):
            residency(slots=1, store=store).leased(foreign)
        adapter = random_adapter(small, 1)
        wide = put_adapter(store, small, "wide", 1, adapter=type(adapter)(adapter.lora, {"clip_l": torch.ones(7)}))
        with pytest.raises(CorruptArtifact, match=r"embedding for 'clip_l' has shape \(7,\), the base takes \(32,\)"):
            residency(slots=1, store=store).leased(wide)

    def test_refuse_a_phrase_without_the_token(self, residency, own, small, put_adapter):
        store, _ = own
        odd = put_adapter(store, small, "odd", 1, phrase="mug")
        with pytest.raises(CorruptArtifact, match="its phrase 'mug' does not hold its token '<odd>' once"):
            residency(slots=1, store=store).leased(odd)

    def test_tell_what_is_not_there(self, residency, own):
        store, key = own
        for absent in (ArtifactKey("absent", key.digest), ArtifactKey(key.object_id, "0" * 32)):
            with pytest.raises(UnknownObject, match="personalize it first"):
                residency(slots=1, store=store).leased(absent)

    def test_tell_that_the_store_cannot_be_reached(self, residency, tmp_path, keys):
        (tmp_path / "file").write_text("no folder")
        broken = ArtifactStore(str(tmp_path / "file"), attempts=2)
        with pytest.raises(StoreError):
            residency(slots=1, store=broken).leased(keys[0])

    def test_a_failed_load_fails_only_those_who_wait_for_it(self, residency, own):
        store, key = own
        two = residency(slots=2, store=store)
        bad, good = Reservation([ArtifactKey("absent", key.digest), key]), Reservation([key])
        two.loaded(bad)
        two.loaded(good)
        with pytest.raises(ObjdriveError, match="absent"):
            two.lease(bad)
        two.release(bad)
        assert two.lease(good) is not None
