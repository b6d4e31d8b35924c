"""The store's current artifact of an object, looked up at most every few seconds."""

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from objdrive.adapters.artifact import OBJECT_ID_PATTERN, ArtifactMetadata
from objdrive.adapters.parallel import THREADS
from objdrive.adapters.store import ArtifactStore
from objdrive.errors import CorruptArtifact, StoreError
from serve.errors import ApiError, logger

FRESH_SECONDS = 2.0
"""Seconds after its commit by which a new artifact is served."""

_T = TypeVar("_T")
_STALE_SECONDS = 600.0
_PATIENCE_SECONDS = 5.0
_PATIENCE_IF_KNOWN_SECONDS = 1.0
_ENTRY_BYTES = 500
_REMEMBERED_BYTES = 256 * 2**20
# As many calls as the storage's connections take.
_THREADS = THREADS


@dataclass
class _Known:
    """What the store said of an object: its artifact's metadata as JSON, which takes less memory than read."""

    document: bytes | None
    since: float
    asked: float

    @property
    def nbytes(self) -> int:
        return _ENTRY_BYTES + len(self.document or b"")


@dataclass
class Objects:
    """Looks objects up in a store, from one event loop.

    An answer of the store is used for `FRESH_SECONDS`. While the store can't be reached, its last answers are used for
    ten minutes, so that objects in use can still be drawn. Requests for other objects fail with 503 within `patience`
    seconds. What objects were asked for last is remembered, up to `remembered_bytes`.
    """

    store: ArtifactStore
    clock: Callable[[], float] = time.monotonic
    patience: float = _PATIENCE_SECONDS
    remembered_bytes: int = _REMEMBERED_BYTES
    _bytes: int = field(default=0, init=False)
    _known: OrderedDict[str, _Known] = field(default_factory=OrderedDict, init=False)
    _asked: dict[str, asyncio.Future[bytes | None]] = field(default_factory=dict, init=False)
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_THREADS, thread_name_prefix="store"), init=False
    )

    async def find(self, object_id: str) -> ArtifactMetadata:
        """The object's current artifact.

        Raises:
            ApiError: 404, there is no such object; 503, the store can't be reached.
            CorruptArtifact: what the store has of it says nothing that holds.
        """
        document = await self._look(object_id) if re.fullmatch(OBJECT_ID_PATTERN, object_id) else None
        if document is None:
            raise ApiError("unknown_object", f"there is no object {object_id[:128]!r}: GET /v1/models lists them all")
        return ArtifactMetadata.model_validate_json(document)

    async def find_all(self, object_ids: Sequence[str]) -> list[ArtifactMetadata]:
        """The current artifacts of these objects, without those that are gone or damaged."""
        found = await asyncio.gather(*(self._look_past_damage(object_id) for object_id in object_ids))
        return [ArtifactMetadata.model_validate_json(document) for document in found if document is not None]

    async def picture(self, artifact: ArtifactMetadata, name: str) -> bytes:
        """One of the artifact's files, checked against its checksum.

        Raises:
            ApiError: 503, the store can't be reached.
            ObjdriveError: the file is not the one that was committed.
        """
        loop = asyncio.get_running_loop()
        return await self._patiently(loop.run_in_executor(self._threads, self.store.read_file, artifact, name))

    def close(self) -> None:
        """Stop the lookups."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look_past_damage(self, object_id: str) -> bytes | None:
        try:
            return await self._look(object_id)
        except CorruptArtifact as error:
            logger.warning("a page leaves an object out: %s", error)
            return None

    async def _look(self, object_id: str) -> bytes | None:
        known = self._known.get(object_id)
        if known is None:
            return await self._patiently(asyncio.shield(self._ask(object_id)))
        self._known.move_to_end(object_id)
        now = self.clock()
        if now - known.asked < FRESH_SECONDS:
            return known.document
        patience = min(self.patience, _PATIENCE_IF_KNOWN_SECONDS)
        try:
            return await self._patiently(asyncio.shield(self._ask(object_id)), patience)
        except ApiError:
            if now - known.since > _STALE_SECONDS:
                raise
            # So that not every request waits while the store is away.
            known.asked = self.clock()
            return known.document

    def _ask(self, object_id: str) -> "asyncio.Future[bytes | None]":
        """Ask the store once for all requests that wait for the object."""
        asked = self._asked.get(object_id)
        if asked is None:
            started = self.clock()
            loop = asyncio.get_running_loop()
            asked = loop.run_in_executor(self._threads, self._document, object_id)
            self._asked[object_id] = asked
            asked.add_done_callback(lambda done: self._answered(object_id, started, done))
        return asked

    def _document(self, object_id: str) -> bytes | None:
        artifact = self.store.look_up(object_id)
        return None if artifact is None else artifact.model_dump_json().encode()

    def _answered(self, object_id: str, started: float, done: "asyncio.Future[bytes | None]") -> None:
        self._asked.pop(object_id, None)
        if done.cancelled() or done.exception() is not None:
            return
        self._forget(object_id)
        known = self._known[object_id] = _Known(done.result(), started, started)
        self._bytes += known.nbytes
        while self._bytes > self.remembered_bytes:
            self._forget(next(iter(self._known)))

    def _forget(self, object_id: str) -> None:
        known = self._known.pop(object_id, None)
        self._bytes -= known.nbytes if known else 0

    async def _patiently(self, asked: "asyncio.Future[_T]", patience: float | None = None) -> _T:
        try:
            return await asyncio.wait_for(asked, patience or self.patience)
        except (TimeoutError, StoreError) as error:
            logger.warning("the store can't be reached: %s", error or "no answer in time")
            raise ApiError("store_unreachable", "the store can't be reached at the moment") from error
