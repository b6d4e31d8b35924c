"""Where adapters are while pictures are drawn: slots on the device, then host memory, then the store."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from objdrive.adapters.adapter import Adapter, parse_adapter
from objdrive.adapters.artifact import EMBEDDING_FILE, LORA_FILE, ArtifactKey
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.store import ArtifactStore
from objdrive.base.prompts import marked_phrase
from objdrive.base.stable_diffusion import Base
from objdrive.errors import AdapterTooLarge, CorruptArtifact, ObjdriveError, WrongBase
from objdrive.sampling.histogram import Histogram

Tier = Literal["bank", "host", "store"]


@dataclass(frozen=True)
class Loaded:
    """An artifact that has passed all checks, in host memory.

    Attributes:
        key: which artifact.
        phrase: what ``{}`` in a prompt becomes, `TOKEN_MARK` standing for the learned token.
        class_name: its class word.
        layout_noise: see `ArtifactMetadata.layout_noise`.
        least_rank: see `ArtifactMetadata.least_rank`.
        lora_sha256: of the LoRA's file; empty without LoRA. Objects of one scene share it.
        adapter: the weights.
    """

    key: ArtifactKey
    phrase: str
    class_name: str
    layout_noise: float | None
    least_rank: int | None
    lora_sha256: str
    adapter: Adapter

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        tensors = [*self.adapter.embeddings.values(), *self.adapter.lora.values()]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class Resident:
    """An adapter in a slot; see `Loaded` for the fields."""

    key: ArtifactKey
    phrase: str
    class_name: str
    layout_noise: float | None
    lora_sha256: str
    embeddings: Mapping[str, Tensor]
    slot: int


class Reservation:
    """The artifacts that one request needs, each once. Its `Residency` keeps its state."""

    def __init__(self, keys: Sequence[ArtifactKey]) -> None:
        self.keys = tuple(dict.fromkeys(keys))
        self.loads: dict[ArtifactKey, Future[None]] = {}
        self.pinned = False
        self.leased = False
        self.released = False


@dataclass
class _Slot:
    resident: Resident
    leases: int = 0


class Residency:
    """Three tiers of adapters: the slots of a bank, host memory limited in bytes, the store.

    A request's `Reservation` goes through `prepare` (loads begin, on threads of their own), `lease` (its adapters are
    in slots and stay there) and `release`. A leased slot is never overwritten; of the others the one that was released
    longest ago goes first. Adapters that prepared reservations wait for stay in host memory, so that it can exceed its
    limit by what `prepare` was called for. Requests for one artifact share one load.

    `lease` writes to the bank and must not run while the network does; all else is thread-safe.

    Args:
        base: which adapters must fit.
        store: where they come from.
        bank: the bank on the base's network.
        host_bytes: limit of host memory.
        on_loaded: called on a loader's thread whenever a load has succeeded or failed.
        loaders: how many loads run at once.
    """

    def __init__(
        self,
        base: Base,
        store: ArtifactStore,
        bank: AdapterBank,
        *,
        host_bytes: int,
        on_loaded: Callable[[], None] = lambda: None,
        loaders: int = 4,
    ) -> None:
        self._base = base
        self._store = store
        self._bank = bank
        self._host_bytes = host_bytes
        self._on_loaded = on_loaded
        self._loaders = ThreadPoolExecutor(loaders, thread_name_prefix="objdrive-load")
        self._lock = threading.Lock()
        self._slots: OrderedDict[ArtifactKey, _Slot] = OrderedDict()
        self._free = list(range(bank.slots))
        self._hosted: OrderedDict[ArtifactKey, Loaded] = OrderedDict()
        self._pins: Counter[ArtifactKey] = Counter()
        self._loading: dict[ArtifactKey, Future[None]] = {}
        self._hits: Counter[Tier] = Counter()
        self.hosted_bytes = 0
        self.swap_seconds = Histogram()

    @property
    def resident(self) -> tuple[ArtifactKey, ...]:
        """What is in slots, longest unused first."""
        with self._lock:
            return tuple(self._slots)

    @property
    def hosted(self) -> tuple[ArtifactKey, ...]:
        """What is in host memory, longest unused first."""
        with self._lock:
            return tuple(self._hosted)

    @property
    def hits(self) -> Mapping[Tier, int]:
        """In which tier leased adapters were found."""
        with self._lock:
            return dict(self._hits)

    def prepare(self, reservation: Reservation) -> bool:
        """Start loading what the reservation needs and neither slots nor host memory hold.

        Returns:
            False if it must be asked again later: adapters that others wait for fill the host memory.
        """
        with self._lock:
            if reservation.pinned or reservation.released:
                return reservation.pinned
            if self._pins and self._pinned_bytes() >= self._host_bytes and self._absent(reservation):
                return False
            self._pins.update(reservation.keys)
            reservation.pinned = True
            self._load_absent(reservation)
            return True

    def waits_for_store(self, reservation: Reservation) -> bool:
        """Whether something that the reservation needs is in the store alone, or on its way from there."""
        with self._lock:
            if not reservation.pinned:
                return bool(self._absent(reservation))
            return not all(load.done() for load in reservation.loads.values())

    def ready(self, reservation: Reservation) -> bool:
        """Whether the reservation's loads have all succeeded or failed."""
        with self._lock:
            return all(load.done() for load in reservation.loads.values())

    def needs_no_slot(self, reservation: Reservation) -> bool:
        """Whether other leases hold already all the adapters of the reservation."""
        with self._lock:
            return all(key in self._slots and self._slots[key].leases for key in reservation.keys)

    def lease(self, reservation: Reservation) -> tuple[Resident, ...] | None:
        """Have the reservation's adapters in slots until it is released.

        Returns:
            The adapters in the order of the reservation's keys; None while they are not loaded or too few slots are
            free.

        Raises:
            ObjdriveError: a load failed, and with it this reservation.
        """
        with self._lock:
            if reservation.released:
                return None
            for load in reservation.loads.values():
                if load.done() and (error := load.exception()) is not None:
                    raise error
            missing = [key for key in reservation.keys if key not in self._slots]
            if not all(key in self._hosted for key in missing):
                self._load_absent(reservation)
                return None
            idle = [key for key, slot in self._slots.items() if not slot.leases and key not in reservation.keys]
            if len(missing) > len(self._free) + len(idle):
                return None
            for key in reservation.keys:
                self._hits["store" if key in reservation.loads else "host" if key in missing else "bank"] += 1
            for key in missing:
                if not self._free:
                    self._free.append(self._slots.pop(idle.pop(0)).resident.slot)
                self._fill(self._hosted[key])
            for key in reservation.keys:
                self._slots[key].leases += 1
            self._unpin(reservation)
            reservation.leased = True
            return tuple(self._slots[key].resident for key in reservation.keys)

    def release(self, reservation: Reservation) -> None:
        """Let go of all that the reservation holds; may be called at any time and again."""
        with self._lock:
            reservation.released = True
            self._unpin(reservation)
            if reservation.leased:
                reservation.leased = False
                for key in reservation.keys:
                    self._slots[key].leases -= 1
                    self._slots.move_to_end(key)

    def close(self) -> None:
        """Wait for the loads that run, and forget those that do not yet."""
        self._loaders.shutdown(cancel_futures=True)

    def _absent(self, reservation: Reservation) -> list[ArtifactKey]:
        return [key for key in reservation.keys if key not in self._slots and key not in self._hosted]

    def _load_absent(self, reservation: Reservation) -> None:
        for key in self._absent(reservation):
            if key not in self._loading:
                self._loading[key] = Future()
                self._loaders.submit(self._load, key, self._loading[key])
            reservation.loads[key] = self._loading[key]

    def _pinned_bytes(self) -> int:
        return sum(self._hosted[key].nbytes for key in self._pins if key in self._hosted)

    def _load(self, key: ArtifactKey, load: "Future[None]") -> None:
        try:
            loaded = load_artifact(self._base, self._store, self._bank, key)
        except BaseException as error:
            with self._lock:
                del self._loading[key]
                load.set_exception(error)
        else:
            with self._lock:
                del self._loading[key]
                self._hosted[key] = loaded
                self.hosted_bytes += loaded.nbytes
                self._shrink()
                load.set_result(None)
        self._on_loaded()

    def _fill(self, loaded: Loaded) -> None:
        started = time.monotonic()
        slot = self._free[-1]
        self._bank.load(slot, loaded.adapter.lora, least_rank=loaded.least_rank)
        self._free.pop()
        self.swap_seconds.observe(time.monotonic() - started)
        embeddings = {encoder: vector.to(self._base.device) for encoder, vector in loaded.adapter.embeddings.items()}
        resident = Resident(
            loaded.key, loaded.phrase, loaded.class_name, loaded.layout_noise, loaded.lora_sha256, embeddings, slot
        )
        self._slots[loaded.key] = _Slot(resident)
        self._hosted.move_to_end(loaded.key)

    def _unpin(self, reservation: Reservation) -> None:
        if reservation.pinned:
            reservation.pinned = False
            self._pins -= Counter(reservation.keys)
            self._shrink()

    def _shrink(self) -> None:
        for key in list(self._hosted):
            if self.hosted_bytes <= self._host_bytes:
                return
            if not self._pins[key]:
                self.hosted_bytes -= self._hosted.pop(key).nbytes


def load_artifact(base: Base, store: ArtifactStore, bank: AdapterBank, key: ArtifactKey) -> Loaded:
    """Read an artifact and check all of it: checksums, names, shapes, kinds and finiteness of values, and its base.

    Raises:
        UnknownObject: there is none.
        WrongBase: it was made on another base than `base`.
        CorruptArtifact: it is not what was committed, or no adapter for this base.
        AdapterTooLarge: its rank is higher than the bank's.
        StoreError: the store cannot be read.
    """
    metadata, files = store.read(key.object_id, key.digest, only=(LORA_FILE, EMBEDDING_FILE))
    if metadata.base.fingerprint != base.fingerprint:
        raise WrongBase(
            f"the artifact {key} was made on the base {metadata.base.id!r} with the fingerprint "
            f"{metadata.base.fingerprint}, {base.name!r} has {base.fingerprint}: serve it with its own base, or "
            "personalize the object on this one"
        )
    try:
        adapter = parse_adapter(files, token=metadata.token, family=base.family)
        _check_rank(key, adapter, bank)
        bank.check(adapter.lora)
        _check_widths(adapter, base)
        if metadata.phrase.count(metadata.token) != 1:
            raise ObjdriveError(f"its phrase {metadata.phrase!r} does not hold its token {metadata.token!r} once")
    except AdapterTooLarge:
        raise
    except ObjdriveError as error:
        raise CorruptArtifact(f"the artifact {key}: {error}") from error
    return Loaded(
        key=key,
        phrase=marked_phrase(metadata.phrase, metadata.class_name, token=metadata.token),
        class_name=metadata.class_name,
        layout_noise=metadata.layout_noise,
        least_rank=metadata.least_rank,
        lora_sha256=metadata.files[LORA_FILE].sha256 if LORA_FILE in metadata.files else "",
        adapter=adapter,
    )


def _check_rank(key: ArtifactKey, adapter: Adapter, bank: AdapterBank) -> None:
    if adapter.rank > bank.rank:
        raise AdapterTooLarge(
            f"the artifact {key} has rank {adapter.rank}, the bank takes {bank.rank}: give the bank more"
        )


def _check_widths(adapter: Adapter, base: Base) -> None:
    for encoder, vocabulary in base.vocabularies.items():
        shape, expected = tuple(adapter.embeddings[encoder].shape), tuple(vocabulary.shape[1:])
        if shape != expected:
            raise ObjdriveError(f"the embedding for {encoder!r} has shape {shape}, the base takes {expected}")
