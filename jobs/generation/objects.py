"""Which objects of a store a run draws."""

import re
from collections.abc import Callable, Collection, Iterator
from functools import partial

from objdrive.adapters.artifact import OBJECT_ID_PATTERN, ArtifactMetadata
from objdrive.adapters.parallel import in_parallel
from objdrive.adapters.store import ArtifactStore
from objdrive.catalog.manifest import read_manifest
from objdrive.catalog.rows import Reject, Row
from objdrive.errors import ObjdriveError, RowError, WrongBase

_MANIFEST = re.compile(r"\.(csv|parquet|pq|jsonl|ndjson)$", re.IGNORECASE)


class Selection:
    """Objects as a user names them.

    Args:
        named: a manifest's address, or ids with commas between; empty: all that the store has.
        classes: only objects of these class words; empty: of all.
        fingerprint: of the base that draws.

    Raises:
        ObjdriveError: what is named is neither.
    """

    def __init__(self, named: str, classes: Collection[str], fingerprint: str) -> None:
        self._manifest = named if self.is_manifest(named) else ""
        self._ids = () if self._manifest else tuple(dict.fromkeys(one.strip() for one in named.split(",") if named))
        for one in self._ids:
            if not re.fullmatch(OBJECT_ID_PATTERN, one):
                raise ObjdriveError(
                    f"--objects {named}: {one!r} is neither an object id nor a manifest (CSV, Parquet or JSON Lines)"
                )
        self._classes = classes
        self._fingerprint = fingerprint

    @staticmethod
    def is_manifest(named: str) -> bool:
        """Whether what a user names is a manifest's address."""
        return bool(_MANIFEST.search(named)) or "/" in named or "*" in named

    def artifacts(self, store: ArtifactStore) -> Iterator[tuple[str, ArtifactMetadata | ObjdriveError]]:
        """Yield each object's id with its current artifact, or with why it can't be drawn. An id may come again."""
        for object_id, looked in self._looked_up(store):
            if isinstance(looked, ObjdriveError) or not self._classes or looked.class_name in self._classes:
                yield object_id, looked

    def _looked_up(self, store: ArtifactStore) -> Iterator[tuple[str, ArtifactMetadata | ObjdriveError]]:
        look = partial(_look, store, self._fingerprint)
        if self._manifest:
            for row, looked in in_parallel(partial(_look_at_row, look), read_manifest(self._manifest)):
                yield row.object_id, looked.result()
        else:
            for object_id, looked in store.for_each(look, self._ids or None):
                yield object_id, looked.result()


def _look_at_row(
    look: Callable[[str], ArtifactMetadata | ObjdriveError], row: Row | Reject
) -> ArtifactMetadata | ObjdriveError:
    return RowError(row.code, row.message) if isinstance(row, Reject) else look(row.object_id)


def _look(store: ArtifactStore, fingerprint: str, object_id: str) -> ArtifactMetadata | ObjdriveError:
    """What can be known of an object without its adapter."""
    try:
        artifact, _ = store.read(object_id, only=())
    except ObjdriveError as error:
        return error
    if artifact.base.fingerprint != fingerprint:
        return WrongBase(
            f"the artifact of {object_id!r} was made on the base {artifact.base.id!r} with the fingerprint "
            f"{artifact.base.fingerprint}, not on {fingerprint}: name its base with --base"
        )
    return artifact
