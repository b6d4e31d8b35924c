"""Where artifacts live: a folder at any fsspec address, safe for many readers and writers without a server.

::

    <url>/objects/<object_id>/current.json              which digest is served
    <url>/objects/<object_id>/<digest>/artifact.json    vouches for the other files of its folder
    <url>/runs/<run_id>/...                             tables and report of a run
    <url>/catalog/objects.parquet                       what the runs' tables say of every object, see `index`

Files come first, ``artifact.json`` last, ``current.json`` after it, each written atomically. A reader
trusts only what an ``artifact.json`` vouches for, so that a writer that dies leaves nothing that could be
mistaken for an artifact. Writers of the same artifact take turns (see `WriteClaim`): the first
commits, the others find it done. So do those who make an artifact the current one and those who remove it.
"""

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar

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
from objdrive.adapters.parallel import in_parallel
from objdrive.adapters.storage import TEMPORARY_PREFIX, open_files
from objdrive.errors import CorruptArtifact, ObjdriveError, StoreError, UnknownObject

CURRENT_FILE = "current.json"
RESULTS_FILE = "results.parquet"
"""A run's table of what it has in the store."""

_OBJECTS = "objects"
_RUNS = "runs"
_CATALOG = "catalog"
_INDEX_FILE = "objects.parquet"
_FIRST_POLL_SECONDS = 0.02
_LAST_POLL_SECONDS = 1.0
_Result = TypeVar("_Result")


class _Current(BaseModel):
    digest: str
    since: float = 0.0
    artifact: ArtifactMetadata | None = None
    """What ``artifact.json`` says, so that one read tells all. The first stores lack it."""


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
        written, writes, pauses = False, 0, _pauses()
        while (standing := self._settled(object_id, digest)) is None:
            if not claim.take():
                alive()
                time.sleep(next(pauses))
                continue
            try:
                standing = self._vouched(object_id, digest)
                if standing is None:
                    if writes == self._attempts:
                        raise StoreError(
                            f"{self.folder(object_id, digest)} does not read back as written, {writes} times"
                        )
                    writes += 1
                    written = self._write(claim, files, document, metadata)
                    standing = self._vouched(object_id, digest)
                if standing is not None and self._point(claim, _parse(standing, object_id, digest), look):
                    break
            finally:
                claim.release()
        return written and standing == document

    def current(self, object_id: str) -> ArtifactMetadata | None:
        """Return what is known of the object's current artifact, None if it has none. Two small reads."""
        digest = self._pointed(object_id)
        return None if digest is None else self.metadata(object_id, digest)

    def look_up(self, object_id: str) -> ArtifactMetadata | None:
        """Return what is known of the object's current artifact, None if it has none. One small read.

        For those who check the files when they `read` them: its ``artifact.json`` is not asked, and may be gone.
        Raises CorruptArtifact if what is there says nothing that holds.
        """
        address = f"{_object_folder(object_id)}/{CURRENT_FILE}"
        document = self._files.read(address)
        if document is None:
            return None
        try:
            current = _parse_current(document, object_id)
            if current.artifact is not None:
                return current.artifact
            address = f"{_folder(object_id, current.digest)}/{METADATA_FILE}"
            document = self._files.read(address)
            return None if document is None else _parse(document, object_id, current.digest)
        except CorruptArtifact as error:
            raise CorruptArtifact(f"{self.url}/{address}: {error}") from error

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
        claim = WriteClaim(self._files, _folder(object_id, digest), self._takeover_after)
        pauses = _pauses()
        while (metadata := self.metadata(object_id, digest)) is not None:
            if self._pointed(object_id) == digest:
                return
            if not claim.take():
                time.sleep(next(pauses))
                continue
            try:
                # It may have been removed between the look at it and the claim.
                if self.has(object_id, digest) and self._point(claim, metadata, look):
                    return
            finally:
                claim.release()
        raise ObjdriveError(f"{self.folder(object_id, digest)} is not a committed artifact; commit it first")

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

    def object_ids(self) -> Iterator[str]:
        """Yield the ids of the store's objects as the listing comes.

        In the order in which object stores list folders: ``a-b`` and ``a.b`` come before ``a``. Of S3, a page of a
        thousand is held in memory; of other storage, all ids.
        """
        return filter(_is_object_id, self._files.folders(_OBJECTS))

    def for_each(
        self, call: Callable[[str], _Result], object_ids: Iterable[str] | None = None
    ) -> "Iterator[tuple[str, Future[_Result]]]":
        """Call for every object (those of the store by default), many at once, e.g. with `current` or `verify`.

        Yields each object's id with its call, which has ended, in the order of the ids. A call that fails ends nothing:
        its future raises. A few hundred are under way at a time, whatever the store holds.
        """
        return in_parallel(call, self.object_ids() if object_ids is None else object_ids)

    def digests(self, object_id: str) -> list[str]:
        """Return the digests of the object's committed artifacts, sorted."""
        return [digest for digest in self._digest_folders(object_id) if self.has(object_id, digest)]

    def verify(self, object_id: str) -> list[str]:
        """Read all artifacts of the object in full and return what is wrong, one sentence each.

        A folder without ``artifact.json`` is not wrong: a writer is at it, or died and left it to `gc`.
        """
        problems, committed = [], set()
        for digest in self._digest_folders(object_id):
            document = self._files.read(f"{_folder(object_id, digest)}/{METADATA_FILE}")
            if document is None:
                continue
            metadata, damage = self._inspect(document, object_id, digest)
            problems += damage
            if metadata is not None:
                committed.add(digest)
        if (problems or committed) and self._pointed(object_id) not in committed:
            problems.append(
                f"{self.url}/{_OBJECTS}/{object_id}/{CURRENT_FILE} names no committed artifact; "
                "personalize the object again"
            )
        return problems

    def gc(self, older_than_seconds: float, *, dry_run: bool = False) -> "Iterator[tuple[str, Future[list[str]]]]":
        """Remove what nobody needs, many objects at once: yields each that was looked through, as it is done.

        What nobody needs are artifacts that the current one superseded more than `older_than_seconds` ago, folders that
        dead writers left, and temporary files, all last written longer ago than that. Never what ``current.json``
        names, nor an object's only artifact. Choose a time far longer than any commit takes and any reader stays
        behind.

        Nothing happens before the first object is asked for. May be broken off at any moment, and run beside writers
        and other collections.

        Yields:
            An address, and its future: the addresses that were removed (or would be, with `dry_run`), or what failed.
        """
        before = time.time() - older_than_seconds
        objects = (
            object_id
            for object_id, names in self._files.trees(_OBJECTS)
            if _is_object_id(object_id) and (names is None or _may_hold_garbage(names))
        )
        sweep = partial(self._sweep, before=before, dry_run=dry_run)
        for object_id, done in in_parallel(sweep, objects):
            yield f"{self.url}/{_OBJECTS}/{object_id}", done
        for folder, done in in_parallel(
            partial(self._sweep_leftovers, before=before, dry_run=dry_run), [_RUNS, _CATALOG]
        ):
            yield f"{self.url}/{folder}", done

    def folder(self, object_id: str, digest: str) -> str:
        """Return the address of the artifact's folder."""
        return f"{self.url}/{_folder(object_id, digest)}"

    def run_ids(self) -> list[str]:
        """Return the ids of the runs that wrote to the store, sorted: in the order in which they began."""
        return sorted(filter(_is_object_id, self._files.folders(_RUNS)))

    def run_path(self, run_id: str, name: str) -> str:
        """Return the address of a run's file."""
        return f"{self.url}/{_run_file(run_id, name)}"

    def write_run_file(self, run_id: str, name: str, data: bytes) -> None:
        """Write a run's file atomically, over an earlier one if there is."""
        self._files.replace(_run_file(run_id, name), data)

    def open_run_file(self, run_id: str, name: str, mode: str = "rb") -> IO[Any]:
        """Open a run's file as a stream. Raises StoreError if it is to be read and is not there."""
        return self._files.open(_run_file(run_id, name), mode)

    def read_index(self) -> bytes | None:
        """Return the table of all objects, None if there is none. See `objdrive.adapters.index`."""
        return self._files.read(f"{_CATALOG}/{_INDEX_FILE}")

    def write_index(self, data: bytes) -> None:
        """Write the table of all objects atomically, over an earlier one if there is."""
        self._files.replace(f"{_CATALOG}/{_INDEX_FILE}", data)

    def index_written(self) -> float | None:
        """Return when the table of all objects was last written, None if there is none. One small listing."""
        return self._files.files(_CATALOG).get(_INDEX_FILE)

    def _write(
        self, claim: WriteClaim, files: Mapping[str, bytes], document: bytes, metadata: ArtifactMetadata
    ) -> bool:
        names = self._files.files(_folder(metadata.object_id, metadata.digest))
        old = [name for name in names if not _is_leftover(name)]
        new = [*files.items(), (METADATA_FILE, document)]
        return _clear(claim, old) and all(claim.create(*file) for file in new)

    def _settled(self, object_id: str, digest: str) -> bytes | None:
        """Return the bytes of ``artifact.json`` if all that it says holds, and it is the object's current one."""
        return self._vouched(object_id, digest) if self._pointed(object_id) == digest else None

    def _vouched(self, object_id: str, digest: str) -> bytes | None:
        """Return the bytes of ``artifact.json`` if all that it says holds."""
        document = self._files.read(f"{_folder(object_id, digest)}/{METADATA_FILE}")
        return None if document is None or self._inspect(document, object_id, digest)[1] else document

    def _inspect(self, document: bytes, object_id: str, digest: str) -> tuple[ArtifactMetadata | None, list[str]]:
        """Return what an ``artifact.json`` says, None if it is not valid, and what is wrong with it and its files."""
        try:
            metadata = _parse(document, object_id, digest)
        except CorruptArtifact as error:
            return None, [f"{self.folder(object_id, digest)}/{METADATA_FILE}: {error}"]
        damage = []
        for name in metadata.files:
            try:
                self.read_file(metadata, name)
            except CorruptArtifact as error:
                damage.append(str(error))
        return metadata, damage

    def _point(self, claim: WriteClaim, artifact: ArtifactMetadata, look: Look | None) -> bool:
        """Make an artifact current, unless one outdoes it; False if its folder is not held any more: it may go."""
        if not claim.held():
            return False
        object_id, digest = artifact.object_id, artifact.digest
        if look is None or not self._is_outdone(object_id, digest, look):
            current = _Current(digest=digest, since=look.time if look else time.time(), artifact=artifact)
            self._files.replace(f"{_object_folder(object_id)}/{CURRENT_FILE}", current.model_dump_json().encode())
        return True

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
            return None if document is None else _parse_current(document, object_id)
        except CorruptArtifact:
            return None

    def _digest_folders(self, object_id: str) -> list[str]:
        folders = self._files.folders(_object_folder(object_id))
        return [name for name in folders if re.fullmatch(DIGEST_PATTERN, name)]

    def _sweep(self, object_id: str, *, before: float, dry_run: bool) -> list[str]:
        """Remove an object's garbage; return its addresses."""
        home = _object_folder(object_id)
        files = self._files.files(home)
        gone = [
            digest
            for digest in self._needless(object_id, files, before)
            if dry_run or self._remove(object_id, digest, before)
        ]
        kept = {name: written for name, written in files.items() if name.partition("/")[0] not in gone}
        addresses = [self.folder(object_id, digest) for digest in gone]
        return addresses + self._remove_leftovers(home, kept, before, dry_run=dry_run)

    def _needless(self, object_id: str, files: Mapping[str, float], before: float) -> list[str]:
        """Return the digests of those artifacts of the object, and beginnings of artifacts, that can go.

        Args:
            object_id: the object.
            files: all its files, with when they were written.
            before: what was written since then stays.
        """
        if not _may_hold_garbage(files):
            return []
        pointed = self._pointed(object_id)
        # Without a good current artifact, a committed one may be just about to become it. And readers may still be
        # with one that is not the current one since a moment ago.
        superseded = files.get(CURRENT_FILE, before) < before and pointed is not None and self.has(object_id, pointed)
        return [
            digest
            for digest in _digests(files)
            if digest != pointed
            and all(files[name] < before for name in _inside(digest, files))
            and (superseded or not self.has(object_id, digest))
        ]

    def _remove(self, object_id: str, digest: str, before: float) -> bool:
        """Remove an artifact unless it is needed, now that nobody else can change it; whether it is gone."""
        folder = _folder(object_id, digest)
        claim = WriteClaim(self._files, folder, self._takeover_after)
        if not claim.outbid(self._files.files(folder)):
            return False
        try:
            files = self._files.files(_object_folder(object_id))
            files.pop(f"{digest}/{claim.name}", None)
            if digest not in self._needless(object_id, files, before):
                return False
            inside = [name.removeprefix(f"{digest}/") for name in _inside(digest, files)]
            return _clear(claim, [name for name in inside if not name.startswith(CLAIM_PREFIX)])
        finally:
            claim.release()
            self._files.prune(folder)

    def _sweep_leftovers(self, folder: str, *, before: float, dry_run: bool) -> list[str]:
        return self._remove_leftovers(folder, self._files.files(folder), before, dry_run=dry_run)

    def _remove_leftovers(self, folder: str, files: Mapping[str, float], before: float, *, dry_run: bool) -> list[str]:
        leftovers = sorted(f"{folder}/{name}" for name in files if _is_leftover(name) and files[name] < before)
        for path in leftovers:
            if not dry_run:
                self._files.remove(path)
                self._files.prune(path.rpartition("/")[0])
        return [f"{self.url}/{path}" for path in leftovers]


def _pauses() -> Iterator[float]:
    """Yield ever longer waits, in seconds."""
    pause = _FIRST_POLL_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, _LAST_POLL_SECONDS)


def _clear(claim: WriteClaim, names: Iterable[str]) -> bool:
    """Remove an artifact's files from the folder that is held; False if it is not held to the end."""
    # artifact.json goes first: what it vouches for must all be there all the time.
    return all(claim.remove(name) for name in sorted(names, key=lambda name: name != METADATA_FILE))


def _digests(names: Iterable[str]) -> list[str]:
    """Return the digests whose folders hold these names of an object's files, sorted."""
    heads = {head for head, slash, _ in (name.partition("/") for name in names) if slash}
    return sorted(head for head in heads if re.fullmatch(DIGEST_PATTERN, head))


def _inside(digest: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{digest}/")]


def _may_hold_garbage(names: Collection[str]) -> bool:
    """Whether an object with these files can have any; the only artifact of an object never is."""
    digests = _digests(names)
    return (
        len(digests) > 1
        or any(f"{digest}/{METADATA_FILE}" not in names for digest in digests)
        or any(map(_is_leftover, names))
    )


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


def _parse_current(document: bytes, object_id: str) -> _Current:
    try:
        current = _Current.model_validate_json(document)
    except ValidationError as error:
        raise CorruptArtifact(f"not valid: {error}; personalize the object again") from error
    told = current.artifact
    if not re.fullmatch(DIGEST_PATTERN, current.digest) or (
        told is not None and (told.object_id, told.digest) != (object_id, current.digest)
    ):
        raise CorruptArtifact(
            f"names {current.digest[:64]!r}, which is no artifact of it; personalize the object again"
        )
    return current


def _is_object_id(name: str) -> bool:
    return re.fullmatch(OBJECT_ID_PATTERN, name) is not None


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
