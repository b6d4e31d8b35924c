"""Ray Data: a manifest's rows, read, checked and decoded in parallel, as a stream in manifest order."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import ray
import ray.data
from ray.data import TaskPoolStrategy

from jobs.spool import spooled
from objdrive.adapters.artifact import ArtifactMetadata, Member, SourceRecord, adapter_digest
from objdrive.adapters.store import ArtifactStore, Look
from objdrive.catalog.addresses import unsigned
from objdrive.catalog.manifest import Piece, read_piece
from objdrive.catalog.photos import decode_photo
from objdrive.catalog.rows import AUTO_MASK, Reject, Row
from objdrive.catalog.sources import SourceMark, read_source, stat_source
from objdrive.errors import RowError, StoreError
from objdrive.training.recipe import METHOD_VERSION

_ROWS_PER_BATCH = 64
_BLOCK_BYTES = 32 * 2**10
_THREADS = 4
_CPUS_PER_TASK = 0.1
# As a source, a mask that is taken from the picture never changes.
_AUTO = SourceMark(AUTO_MASK, 0, AUTO_MASK)


@dataclass(frozen=True)
class Target:
    """What a run turns rows into: artifacts of one recipe on one base, in one store.

    `hosts` are the only ones that pictures are fetched from by HTTP; empty: see `objdrive.catalog.web.web_options`.
    """

    store_url: str
    recipe_digest: str
    base_fingerprint: str
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """A row that can be used.

    `digest` and `members` (object ids) name the artifact that is committed for exactly this row and target; both are
    empty if there is none. `outdated`: the store takes another artifact for the object's current one. `look`: which
    one that was when the row was checked.
    """

    row: Row
    image: SourceMark
    mask: SourceMark | None
    digest: str = ""
    members: tuple[str, ...] = ()
    outdated: bool = False
    look: Look | None = None


def ingest(pieces: list[Piece], target: Target, *, cores: int) -> Iterator[Checked | Reject]:
    """Stream a manifest's rows, in order: usable ones as `Checked`, the others as `Reject`.

    Every failure is caught row by row, because Ray Data can only drop whole blocks. At most `cores` tasks check rows
    at a time.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Small blocks: the first rows come soon, and the rows of one file are checked by many tasks.
    context.target_max_block_size = _BLOCK_BYTES
    # Tasks take a small share of a core in Ray's books, because workers hold the rest; without a bound, an idle
    # cluster would start ten processes on each core.
    readers = max(1, cores // 4)
    items = [{"piece": json.dumps(asdict(piece))} for piece in pieces]
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    checked = (
        # Different shares keep Ray Data from fusing the two steps, which would check a file's rows in one task.
        rows.map_batches(
            _read, batch_size=1, num_cpus=_CPUS_PER_TASK / 2, compute=TaskPoolStrategy(size=readers)
        ).map_batches(
            # Ray's annotations do not know `fn_kwargs`.
            _check_all,  # type: ignore[arg-type]
            batch_size=None,
            fn_kwargs={"target": target},
            num_cpus=_CPUS_PER_TASK,
            compute=TaskPoolStrategy(size=cores),
        )
    )
    batches = checked.iter_batches(batch_size=None)
    # While its consumer waits, Ray Data's executor polls without a pause and takes a whole core (2.60): it is read to
    # its end at once.
    yield from map(unpack, spooled(chain.from_iterable(batch["record"] for batch in batches)))


def _read(batch: Any) -> Iterator[dict[str, list[str]]]:
    rows = read_piece(Piece(**json.loads(batch["piece"][0])))
    while some := list(islice(rows, _ROWS_PER_BATCH)):
        yield {"record": [pack(row) for row in some]}


def _check_all(batch: Any, target: Target) -> dict[str, list[str]]:
    store = ArtifactStore(target.store_url)

    def check(record: str) -> str:
        row = unpack(record)
        return pack(row if isinstance(row, Reject) else check_row(row, store, target))

    # Most of a row's time is waiting for the storage.
    with ThreadPoolExecutor(_THREADS) as threads:
        return {"record": list(threads.map(check, batch["record"]))}


def check_row(row: Row, store: ArtifactStore, target: Target) -> Checked | Reject:
    """Check that a row's picture and mask can be used, and whether its artifact is committed already.

    A committed row whose sources still have the size and mark noted in its artifact is not read again.
    """
    try:
        image = stat_source(row.image, role="image", hosts=target.hosts)
        mask = _stat_mask(row.mask, target.hosts)
        now, current = time.time(), store.current(row.object_id)
        look = Look(current.digest if current else None, now)
        if current and _made_from(current, row, image, mask, target):
            return Checked(row, image, mask, current.digest, tuple(m.object_id for m in current.members), look=look)
        member = read_photo(row, image, mask, target.hosts)[1]
        digest = adapter_digest([member], **digest_inputs(target))
        if not row.scene and store.has(row.object_id, digest):
            outdated = current is None or current.digest != digest
            return Checked(row, image, mask, digest, (row.object_id,), outdated, look)
        return Checked(row, image, mask, look=look)
    except RowError as error:
        return Reject(row.object_id, row.where, error.code, f"{row.where}: {error}")
    except StoreError as error:
        return Reject(row.object_id, row.where, "store_failed", f"{row.where}: {error}")


def _stat_mask(mask: str, hosts: tuple[str, ...]) -> SourceMark | None:
    if mask == AUTO_MASK:
        return _AUTO
    return stat_source(mask, role="mask", hosts=hosts) if mask else None


def read_photo(row: Row, image: SourceMark, mask: SourceMark | None, hosts: tuple[str, ...] = ()) -> tuple[Any, Member]:
    """Read and decode a row's picture and mask: the `Photo`, and its part of the artifact's digest."""
    image_bytes = read_source(image, role="image", hosts=hosts)
    if mask == _AUTO:
        photo = decode_photo(image_bytes, AUTO_MASK, name=row.object_id)
        return photo, Member(hashlib.sha256(image_bytes).hexdigest(), AUTO_MASK, row.class_name)
    mask_bytes = read_source(mask, role="mask", hosts=hosts) if mask else None
    photo = decode_photo(image_bytes, mask_bytes, name=row.object_id)
    mask_sha256 = hashlib.sha256(mask_bytes).hexdigest() if mask_bytes is not None else ""
    return photo, Member(hashlib.sha256(image_bytes).hexdigest(), mask_sha256, row.class_name)


def digest_inputs(target: Target) -> dict[str, Any]:
    """What `adapter_digest` needs besides the members."""
    return {
        "recipe_digest": target.recipe_digest,
        "base_fingerprint": target.base_fingerprint,
        "method_version": METHOD_VERSION,
    }


def _made_from(
    artifact: ArtifactMetadata, row: Row, image: SourceMark, mask: SourceMark | None, target: Target
) -> bool:
    return (
        artifact.recipe_digest == target.recipe_digest
        and artifact.base.fingerprint == target.base_fingerprint
        and artifact.method_version == METHOD_VERSION
        and artifact.class_name == row.class_name
        and artifact.scene == row.scene
        # Of equal size alone, another picture would do.
        and all(mark.mark for mark in (image, mask) if mark)
        and artifact.sources.image == source_record(image)
        and artifact.sources.mask == (source_record(mask) if mask else None)
    )


def source_record(mark: SourceMark) -> SourceRecord:
    """A source's mark as artifacts note it, without signatures."""
    return SourceRecord(uri=unsigned(mark.uri), size=mark.size, mark=mark.mark)


def pack(record: Row | Checked | Reject) -> str:
    """A record as JSON, for Ray's blocks and for the disk."""
    return json.dumps([type(record).__name__, asdict(record)])


def unpack(text: str) -> Any:
    """The record that `pack` packed."""
    kind, fields = json.loads(text)
    unpack: dict[str, Callable[[dict[str, Any]], Any]] = {
        "Row": _unpack_row,
        "Reject": lambda f: Reject(**f),
        "Checked": _unpack_checked,
    }
    return unpack[kind](fields)


def _unpack_row(fields: dict[str, Any]) -> Row:
    return Row(**fields | {"warnings": tuple(fields["warnings"])})


def _unpack_checked(fields: dict[str, Any]) -> Checked:
    mask = fields["mask"]
    return Checked(
        row=_unpack_row(fields["row"]),
        image=SourceMark(**fields["image"]),
        mask=SourceMark(**mask) if mask else None,
        digest=fields["digest"],
        members=tuple(fields["members"]),
        outdated=fields["outdated"],
        look=Look(**fields["look"]) if fields["look"] else None,
    )
