"""The control plane alone: everything that the job does around a fine-tune that does nothing.

Usage: ``python benchmarks/control_plane.py``. For each number of rows, a run in a process of its own: reading,
checking and decoding, planning, leasing, committing (a real, small artifact), tables. Prints milliseconds per row and
the driver's peak memory. ``--dry-run`` plans only; ``--no-commit`` leaves the storage out, for memory alone.
"""

import argparse
import io
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image

from jobs.cluster import connect
from jobs.ingest import Target, source_record
from jobs.ledger import Ledger
from jobs.metrics import RunMetrics
from jobs.outcomes import RowOutcome
from jobs.plan import Unit
from jobs.room import WorkersRequest
from jobs.run import BatchRun, new_run_id
from objdrive.adapters.adapter import Adapter, adapter_files
from objdrive.adapters.artifact import ArtifactMetadata, BaseRef, SceneMember, Sources
from objdrive.adapters.store import ArtifactStore
from objdrive.base.family import STABLE_DIFFUSION
from objdrive.catalog.manifest import pieces

_DIGEST = "0" * 32
_ROWS_PER_ROW_GROUP = 50_000


@dataclass
class NoOp:
    """Commits a small artifact for every row, without any training."""

    store: ArtifactStore | None
    group_size: int = 16

    def __call__(self, payloads: list[Unit], alive: Callable[[], None]) -> list[list[RowOutcome]]:
        return [[self._commit(unit)] for unit in payloads]

    def _commit(self, unit: Unit) -> RowOutcome:
        if self.store is None:
            return RowOutcome("committed", _DIGEST)
        (record,) = unit.rows
        row, token = record.row, f"<{record.row.object_id}>"
        metadata = ArtifactMetadata(
            object_id=row.object_id,
            class_name=row.class_name,
            token=token,
            phrase=token,
            digest=_DIGEST,
            members=[SceneMember(object_id=row.object_id, class_name=row.class_name, token=token)],
            base=BaseRef(id="none", fingerprint=_DIGEST),
            recipe={},
            recipe_digest=_DIGEST,
            method_version=0,
            metrics={},
            sources=Sources(image=source_record(record.image)),
            versions={},
            created="",
        )
        adapter = Adapter({}, {STABLE_DIFFUSION.text_encoder: torch.zeros(128)})
        self.store.commit(adapter_files(adapter, token=token, family=STABLE_DIFFUSION), metadata)
        return RowOutcome("committed", _DIGEST)


@dataclass(frozen=True)
class MakeNoOp:
    """Makes `NoOp` in a worker."""

    store_url: str

    def __call__(self) -> NoOp:
        return NoOp(ArtifactStore(self.store_url) if self.store_url else None)


def write_manifest(folder: Path, rows: int) -> Path:
    """A Parquet manifest of so many rows that share one small picture."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[16:48, 16:48] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (folder / "picture.png").write_bytes(buffer.getvalue())
    path = folder / "manifest.parquet"
    names = ("object_id", "image", "mask", "class_name", "price")
    schema = pa.schema([(name, pa.string()) for name in names[:4]] + [("price", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, _ROWS_PER_ROW_GROUP):
            numbers = range(first, min(rows, first + _ROWS_PER_ROW_GROUP))
            count = len(numbers)
            ids = [f"object-{number:07}" for number in numbers]
            columns = [ids, ["picture.png"] * count, [""] * count, ["teapot"] * count, list(numbers)]
            writer.write_table(pa.table(columns, schema=schema))
    return path


def measure(rows: int, *, commit: bool, dry: bool) -> None:
    """One run, in this process."""
    connect()
    metrics = RunMetrics(new_run_id())
    with tempfile.TemporaryDirectory() as name, closing(Ledger(metrics.row)) as ledger:
        folder = Path(name)
        manifest = write_manifest(folder, rows)
        store = ArtifactStore(f"{folder}/store")
        make = MakeNoOp(store.url if commit else "")
        run = BatchRun(
            pieces(str(manifest)),
            Target(store.url, _DIGEST, _DIGEST),
            make,
            WorkersRequest(2, 2),
            ledger,
            metrics,
            prompt_fault=lambda class_names: "",
            limit=None,
            previews=0,
            stall_seconds=600,
        )
        started = time.perf_counter()
        if dry:
            run.plan_only()
        else:
            run.work_off()
            ledger.write(store, run.id)
        seconds = time.perf_counter() - started
        if ledger.counts["committed"] + ledger.counts["to train"] != rows:
            raise RuntimeError(f"rows are missing: {ledger.counts}, {ledger.rejects(3)}")
    ray.shutdown()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{rows:9,}   {seconds:7.1f}   {seconds / rows * 1000:20.2f}   {peak:17.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--no-commit", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if len(arguments.rows) == 1:
        measure(arguments.rows[0], commit=not arguments.no_commit, dry=arguments.dry_run)
        return
    print("     rows   seconds   milliseconds per row   driver's peak MiB", flush=True)
    options = [option for option in sys.argv[1:] if option in ("--no-commit", "--dry-run")]
    for rows in arguments.rows:
        # Peak memory is a process's own.
        subprocess.run([sys.executable, __file__, *options, "--rows", str(rows)], check=True)


if __name__ == "__main__":
    main()
