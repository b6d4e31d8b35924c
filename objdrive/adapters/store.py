"""Where artifacts live: a folder at any fsspec address, safe for many readers and writers without a server.

::

    <url>/objects/<object_id>/current.json              which digest is served
    <url>/objects/<object_id>/<digest>/artifact.json    vouches for the other files of its folder
    <url>/runs/<run_id>/...                             tables and report of a run

Files come first, ``artifact.json`` last, ``current.json`` after it, each written atomically. A reader
trusts only what an ``artifact.json`` vouches for, so that a writer that dies leaves nothing that could be
mistaken for an artifact. Writers of the same artifact take turns (see `WriteClaim`): the first
commits, the others find it done.
"""

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from pydantic import BaseModel, ValidationError

from objdrive.adapters.artifact import (
    DIGEST_PATTERN,
    FILE_NAME_PATTERN,
    METADATA_FILE,
    OBJECT_ID_PATTERN,
    ArtifactMetadata,
    FileRecord,
)
from objdrive.adapters.claim import CLAIM_PREFIX, WriteClaim
from objdrive.adapters.storage import TEMPORARY_PREFIX, open_files
from objdrive.errors import CorruptArtifact, ObjdriveError, StoreError, UnknownObject

CURRENT_FILE = "current.json"
RESULTS_FILE = "results.parquet"
"""A run's table of what it has in the store."""

_OBJECTS = "objects"
_RUNS = "runs"
_FIRST_POLL_SECONDS = 0.02
_LAST_POLL_SECONDS = 1.0


class _Current(BaseModel):
    digest: str
    since: float = 0.0


@dataclass(frozen=True)
class Look:
    """Which artifact was an object's current one at a time (seconds since the epoch): when a new one was asked for."""

    digest: str | None
    time: float


class ArtifactStore:
    """Artifacts at `url`, any fsspec address (a folder, ``s3://bucket/prefix``, ...). Picklable.

    A writer that has stood still for `takeover_after` seconds is taken for dead; all writers of a store
    must agree on it. Every storage call is tried up to `attempts` times, 0.1 s and then ever longer apart.
    A folder that is not there (yet) is an empty store; with `must_exist`, for readers, it is storage that fails, as an
    unmounted file system is. All methods raise StoreError when the storage keeps failing, and ObjdriveError for an
    object id, digest or file name that is not well formed.
    """

    def __init__(self, url: str, *, takeover_after: float = 30.0, attempts: int = 4, must_exist: bool = False) -> None:
        """Open the store. Nothing is read or made yet."""
        self._files = open_files(url, attempts, landmark=_OBJECTS if must_exist else "")
        self._takeover_after = takeover_after
        self._attempts = attempts
        self._must_exist = must_exist

    def __reduce__(self) -> tuple[Callable[..., "ArtifactStore"], tuple[str]]:
        """Reopen by address where unpickled: connections and locks stay behind."""
        open_store = partial(
            ArtifactStore,
            takeover_after=self._takeover_after,
            attempts=self._attempts,
            must_exist=self._must_exist,
        )
        return open_store, (self.url,)

    @property
    def url(self) -> str:
        """The store's address; an absolute path if it is local."""
        return self._files.url

    def commit(
        self,
        files: Mapping[str, bytes],
        metadata: ArtifactMetadata,
        *,
        look: Look | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> bool:
        """Store an artifact whole or not at all, and make it its object's current one.

        With `look`, it does not become current if another one has become so since that was asked for later: a writer
        that stood still comes too late. `metadata.files` is filled in from `files`. Returns True if this call
        committed the artifact, False if it was there already: its bytes then stay, be they other than `files`. A
        damaged artifact is replaced. While another writer is at it, waits, and calls `alive` about once a second or
        more often.
        """
        document = _document(files, metadata)
        object_id, digest = metadata.object_id, metadata.digest
        claim = WriteClaim(self._files, _folder(object_id, digest), self._takeover_after)
        written, writes, pause = False, 0, _FIRST_POLL_SECONDS
        while (standing := self._vouched(object_id, digest)) is None:
            if writes == self._attempts:
                raise StoreError(f"{self.folder(object_id, digest)} does not read back as written, {writes} times")
            if claim.take():
                writes += 1
                written = self._write(claim, files, document, metadata)
            else:
                alive()
                time.sleep(pause)
                pause = min(2 * pause, _LAST_POLL_SECONDS)
        self._point(object_id, digest, look)
        return written and standing == document

    def current(self, object_id: str) -> ArtifactMetadata | None:
        """Return what is known of the object's current artifact, None if it has none. Two small reads."""
        digest = self._pointed(object_id)
        return None if digest is None else self.metadata(object_id, digest)

    def metadata(self, object_id: str, digest: str) -> ArtifactMetadata | None:
        """Return what ``artifact.json`` says, None if there is none or it is not valid. One small read."""
        folder = _folder(object_id, digest)
        document = self._files.read(f"{folder}/{METADATA_FILE}")
        try:
            return None if document is None else _parse(document, object_id, digest)
        except CorruptArtifact:
            return None

    def has(self, object_id: str, digest: str) -> bool:
        """Whether the artifact is committed. One small read."""
        return self.metadata(object_id, digest) is not None

    def point(self, object_id: str, digest: str, *, look: Look | None = None) -> None:
        """Make a committed artifact the current one, e.g. to go back to an earlier one. `look`: see `commit`."""
        if not self.has(object_id, digest):
            raise ObjdriveError(f"{self.folder(object_id, digest)} is not a committed artifact; commit it first")
        self._point(object_id, digest, look)

    def read(
        self, object_id: str, digest: str | None = None, *, only: Collection[str] | None = None
    ) -> tuple[ArtifactMetadata, dict[str, bytes]]:
        """Return an artifact (the current one by default) with its files by name, checked.

        With `only`, read just those of its files. Raises UnknownObject if there is none, and CorruptArtifact if a
        file is missing or not the one that was committed.
        """
        chosen = self._pointed(object_id) if digest is None else digest
        document = None if chosen is None else self._files.read(f"{_folder(object_id, chosen)}/{METADATA_FILE}")
        if chosen is None or document is None:
            what = "current artifact" if digest is None else f"artifact {digest}"
            raise UnknownObject(f"object {object_id!r} has no {what} in {self.url}; personalize it first")
        try:
            metadata = _parse(document, object_id, chosen)
        except CorruptArtifact as error:
            raise CorruptArtifact(f"{self.folder(object_id, chosen)}/{METADATA_FILE}: {error}") from error
        names = metadata.files if only is None else metadata.files.keys() & only
        return metadata, {name: self.read_file(metadata, name) for name in names}

    def read_file(self, metadata: ArtifactMetadata, name: str) -> bytes:
        """Return one file of the artifact, checked. Raises as `read` does."""
        if name not in metadata.files:
            raise ObjdriveError(f"the artifact has no file {name!r}; it has {sorted(metadata.files)}")
        address = f"{_folder(metadata.object_id, metadata.digest)}/{name}"
        data = self._files.read(address)
        if data is None:
            raise CorruptArtifact(f"{self.url}/{address} is missing; personalize the object again")
        if FileRecord.of(data) != metadata.files[name]:
            raise CorruptArtifact(
                f"{self.url}/{address} is damaged: {len(data)} bytes that do not match the checksum of the "
                f"{metadata.files[name].size} bytes committed; personalize the object again"
            )
        return data

    def object_ids(self, start_after: str = "") -> Iterator[str]:
        """Yield the ids of the store's objects after `start_after`, in order. One listing, held in memory."""
        for name in self._files.folders(_OBJECTS):
            if name > start_after and re.fullmatch(OBJECT_ID_PATTERN, name):
                yield name

    def digests(self, object_id: str) -> list[str]:
        """Return the digests of the object's committed artifacts, sorted."""
        return [digest for digest in self._digest_folders(object_id) if self.has(object_id, digest)]

    def verify(self, object_id: str) -> list[str]:
        """Read all artifacts of the object in full and return what is wrong, one sentence each.

        A folder without ``artifact.json`` is not wrong: a writer is at it, or died and left it to `gc`.
        """
        problems = []
        for digest in self._digest_folders(object_id):
            document = self._files.read(f"{_folder(object_id, digest)}/{METADATA_FILE}")
            problems += [] if document is None else self._damage(document, object_id, digest)
        if self.current(object_id) is None and (problems or self.digests(object_id)):
            problems.append(
                f"{self.url}/{_OBJECTS}/{object_id}/{CURRENT_FILE} names no committed artifact; "
                "personalize the object again"
            )
        return problems

    def gc(self, older_than_seconds: float, *, dry_run: bool = False) -> list[str]:
        """Remove what nobody needs and was last written over `older_than_seconds` ago; return the addresses.

        That is: artifacts superseded by the current one, folders that dead writers left, temporary files.
        Never what ``current.json`` names. Choose a time far longer than any commit takes and any reader
        stays behind.
        """
        before = time.time() - older_than_seconds
        removed = []
        for address, paths in self._garbage(before):
            removed.append(f"{self.url}/{address}")
            if not dry_run:
                for path in paths:
                    self._files.remove(path)
                self._files.prune(address.rpartition("/")[0])
        return removed

    def folder(self, object_id: str, digest: str) -> str:
        """Return the address of the artifact's folder."""
        return f"{self.url}/{_folder(object_id, digest)}"

    def run_ids(self) -> list[str]:
        """Return the ids of the runs that wrote to the store, sorted: in the order in which they began."""
        return [name for name in self._files.folders(_RUNS) if re.fullmatch(OBJECT_ID_PATTERN, name)]

    def run_path(self, run_id: str, name: str) -> str:
        """Return the address of a run's file."""
        return f"{self.url}/{_run_file(run_id, name)}"

    def write_run_file(self, run_id: str, name: str, data: bytes) -> None:
        """Write a run's file atomically, over an earlier one if there is."""
        self._files.replace(_run_file(run_id, name), data)

    def open_run_file(self, run_id: str, name: str, mode: str = "rb") -> IO[Any]:
        """Open a run's file as a stream. Raises StoreError if it is to be read and is not there."""
        return self._files.open(_run_file(run_id, name), mode)

    def _write(
        self, claim: WriteClaim, files: Mapping[str, bytes], document: bytes, metadata: ArtifactMetadata
    ) -> bool:
        try:
            # Another writer may have committed between the look at the artifact and the claim.
            if self._vouched(metadata.object_id, metadata.digest) is not None:
                return False
            names = self._files.names(_folder(metadata.object_id, metadata.digest))
            # artifact.json goes first and comes last: what it vouches for must all be there all the time.
            old = sorted((n for n in names if not _is_leftover(n)), key=lambda name: name != METADATA_FILE)
            new = [*files.items(), (METADATA_FILE, document)]
            return all(claim.remove(name) for name in old) and all(claim.create(*file) for file in new)
        finally:
            claim.release()

    def _vouched(self, object_id: str, digest: str) -> bytes | None:
        """Return the bytes of ``artifact.json`` if all that it says holds."""
        document = self._files.read(f"{_folder(object_id, digest)}/{METADATA_FILE}")
        return None if document is None or self._damage(document, object_id, digest) else document

    def _damage(self, document: bytes, object_id: str, digest: str) -> list[str]:
        try:
            metadata = _parse(document, object_id, digest)
        except CorruptArtifact as error:
            return [f"{self.folder(object_id, digest)}/{METADATA_FILE}: {error}"]
        damage = []
        for name in metadata.files:
            try:
                self.read_file(metadata, name)
            except CorruptArtifact as error:
                damage.append(str(error))
        return damage

    def _point(self, object_id: str, digest: str, look: Look | None) -> None:
        if look is not None and self._is_outdone(object_id, digest, look):
            return
        current = _Current(digest=digest, since=look.time if look else time.time())
        self._files.replace(f"{_object_folder(object_id)}/{CURRENT_FILE}", current.model_dump_json().encode())

    def _is_outdone(self, object_id: str, digest: str, look: Look) -> bool:
        # Clocks are compared only for what changed meanwhile: a wrong one can't hold up an object for long.
        current = self._read_current(object_id)
        return current is not None and current.digest not in (digest, look.digest) and current.since > look.time

    def _pointed(self, object_id: str) -> str | None:
        current = self._read_current(object_id)
        return current.digest if current else None

    def _read_current(self, object_id: str) -> _Current | None:
        document = self._files.read(f"{_object_folder(object_id)}/{CURRENT_FILE}")
        try:
            current = None if document is None else _Current.model_validate_json(document)
        except ValidationError:
            return None
        return current if current and re.fullmatch(DIGEST_PATTERN, current.digest) else None

    def _digest_folders(self, object_id: str) -> list[str]:
        folders = self._files.folders(_object_folder(object_id))
        return [name for name in folders if re.fullmatch(DIGEST_PATTERN, name)]

    def _garbage(self, before: float) -> Iterator[tuple[str, list[str]]]:
        """Yield what to remove: a file or folder, and the files to remove for it, in order."""
        for object_id in self.object_ids():
            home = _object_folder(object_id)
            names = {f"{home}/{name}" for name in self._files.names(home)}
            for folder in self._needless_folders(object_id):
                inside = {name for name in names if name.startswith(f"{folder}/")}
                if inside and all(self._is_older(name, before) for name in inside):
                    # artifact.json goes first: it must not vouch for what is on its way out.
                    yield folder, sorted(inside, key=lambda name: not name.endswith(f"/{METADATA_FILE}"))
                    names -= inside
            yield from self._leftovers(names, before)
        yield from self._leftovers({f"{_RUNS}/{name}" for name in self._files.names(_RUNS)}, before)

    def _needless_folders(self, object_id: str) -> list[str]:
        pointed = self._pointed(object_id)
        # Without a good current artifact, a committed one may be just about to become it.
        superseded = pointed is not None and self.has(object_id, pointed)
        return [
            _folder(object_id, digest)
            for digest in self._digest_folders(object_id)
            if digest != pointed and (superseded or not self.has(object_id, digest))
        ]

    def _leftovers(self, paths: Iterable[str], before: float) -> Iterator[tuple[str, list[str]]]:
        for path in sorted(paths):
            if _is_leftover(path) and self._is_older(path, before):
                yield path, [path]

    def _is_older(self, path: str, before: float) -> bool:
        modified = self._files.modified(path)
        return modified is not None and modified < before


def _document(files: Mapping[str, bytes], metadata: ArtifactMetadata) -> bytes:
    for name in files:
        _check(FILE_NAME_PATTERN, "file name", name)
        if name == METADATA_FILE:
            raise ObjdriveError(f"{METADATA_FILE} is written by the store; leave it out of the files")
    records = {name: FileRecord.of(data) for name, data in files.items()}
    return metadata.model_copy(update={"files": records}).model_dump_json(indent=2).encode()


def _parse(document: bytes, object_id: str, digest: str) -> ArtifactMetadata:
    try:
        metadata = ArtifactMetadata.model_validate_json(document)
    except ValidationError as error:
        raise CorruptArtifact(f"not valid: {error}; personalize the object again") from error
    if (metadata.object_id, metadata.digest) != (object_id, digest):
        raise CorruptArtifact(
            f"speaks of object {metadata.object_id!r}, digest {metadata.digest}; personalize the object again"
        )
    return metadata


def _is_leftover(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith((TEMPORARY_PREFIX, CLAIM_PREFIX))


def _object_folder(object_id: str) -> str:
    return f"{_OBJECTS}/{_check(OBJECT_ID_PATTERN, 'object id', object_id)}"


def _folder(object_id: str, digest: str) -> str:
    return f"{_object_folder(object_id)}/{_check(DIGEST_PATTERN, 'digest', digest)}"


def _run_file(run_id: str, name: str) -> str:
    run = _check(OBJECT_ID_PATTERN, "run id", run_id)
    return f"{_RUNS}/{run}/{_check(FILE_NAME_PATTERN, 'file name', name)}"


def _check(pattern: str, what: str, value: str) -> str:
    if not re.fullmatch(pattern, value):
        raise ObjdriveError(f"{what} {value!r} is not well formed; it must match {pattern}")
    return value
