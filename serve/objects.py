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
from objdrive.adapters.store import ArtifactStore
from objdrive.errors import StoreError
from serve.errors import ApiError, logger

FRESH_SECONDS = 2.0
"""Seconds after its commit by which a new artifact is served."""

_T = TypeVar("_T")
_STALE_SECONDS = 600.0
_PATIENCE_SECONDS = 5.0
_PATIENCE_IF_KNOWN_SECONDS = 1.0
_REMEMBERED = 4096
_THREADS = 16


@dataclass
class _Known:
    artifact: ArtifactMetadata | None
    since: float
    asked: float


@dataclass
class Objects:
    """Looks objects up in a store, from one event loop.

    An answer of the store is used for `FRESH_SECONDS`. While the store can't be reached, its last answers are used for
    ten minutes, so that objects in use can still be drawn. Requests for other objects fail with 503 within `patience`
    seconds.
    """

    store: ArtifactStore
    clock: Callable[[], float] = time.monotonic
    patience: float = _PATIENCE_SECONDS
    _known: OrderedDict[str, _Known] = field(default_factory=OrderedDict, init=False)
    _asked: dict[str, asyncio.Future[ArtifactMetadata | None]] = field(default_factory=dict, init=False)
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_THREADS, thread_name_prefix="store"), init=False
    )

    async def find(self, object_id: str) -> ArtifactMetadata:
        """The object's current artifact.

        Raises:
            ApiError: 404, there is no such object; 503, the store can't be reached.
        """
        artifact = await self._look(object_id) if re.fullmatch(OBJECT_ID_PATTERN, object_id) else None
        if artifact is None:
            raise ApiError("unknown_object", f"there is no object {object_id[:128]!r}: GET /v1/models lists them all")
        return artifact

    async def find_all(self, object_ids: Sequence[str]) -> list[ArtifactMetadata]:
        """The current artifacts of these objects, without those that are gone."""
        found = await asyncio.gather(*(self._look(object_id) for object_id in object_ids))
        return [artifact for artifact in found if artifact is not None]

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

    async def _look(self, object_id: str) -> ArtifactMetadata | None:
        known = self._known.get(object_id)
        if known is None:
            return await self._patiently(asyncio.shield(self._ask(object_id)))
        self._known.move_to_end(object_id)
        now = self.clock()
        if now - known.asked < FRESH_SECONDS:
            return known.artifact
        patience = min(self.patience, _PATIENCE_IF_KNOWN_SECONDS)
        try:
            return await self._patiently(asyncio.shield(self._ask(object_id)), patience)
        except ApiError:
            if now - known.since > _STALE_SECONDS:
                raise
            # So that not every request waits while the store is away.
            known.asked = self.clock()
            return known.artifact

    def _ask(self, object_id: str) -> "asyncio.Future[ArtifactMetadata | None]":
        """Ask the store once for all requests that wait for the object."""
        asked = self._asked.get(object_id)
        if asked is None:
            started = self.clock()
            loop = asyncio.get_running_loop()
            asked = loop.run_in_executor(self._threads, self.store.current, object_id)
            self._asked[object_id] = asked
            asked.add_done_callback(lambda done: self._answered(object_id, started, done))
        return asked

    def _answered(self, object_id: str, started: float, done: "asyncio.Future[ArtifactMetadata | None]") -> None:
        self._asked.pop(object_id, None)
        if done.cancelled() or done.exception() is not None:
            return
        self._known[object_id] = _Known(done.result(), started, started)
        self._known.move_to_end(object_id)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    async def _patiently(self, asked: "asyncio.Future[_T]", patience: float | None = None) -> _T:
        try:
            return await asyncio.wait_for(asked, patience or self.patience)
        except (TimeoutError, StoreError) as error:
            logger.warning("the store can't be reached: %s", error or "no answer in time")
            raise ApiError("store_unreachable", "the store can't be reached at the moment") from error
