"""What became of every row: spooled to disk while a run goes on, then written as tables to the store."""

import json
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.ingest import Checked
from jobs.outcomes import RowOutcome
from objdrive.adapters.store import RESULTS_FILE, ArtifactStore
from objdrive.catalog.rows import Reject

REJECTS_FILE = "rejects.parquet"
_ROWS_PER_BATCH = 10_000
_METRICS = ("loss_object", "loss_class", "steps", "seconds")
_RESULT_FIELDS = ("object_id", "status", "digest", "class_name", "scene", "where", "warning", *_METRICS)
_REJECT_FIELDS = ("object_id", "where", "code", "message")
_TYPES = dict.fromkeys(_METRICS, pa.float64())


class Ledger:
    """Counts and keeps one line per row: in the results if it is in the store, else in the rejects.

    Lines are spooled to a temporary folder, so memory does not grow with the manifest. Safe for use from threads.

    Args:
        on_row: called for every row with its status and, if it is not in the store, the reason's code.
    """

    def __init__(self, on_row: Callable[[str, str], None] = lambda status, reason: None) -> None:
        self._on_row = on_row
        self._folder = tempfile.TemporaryDirectory(prefix="objdrive-ledger-")
        root = Path(self._folder.name)
        self._spools = {name: (root / name).open("w+") for name in (RESULTS_FILE, REJECTS_FILE)}
        self._lock = threading.Lock()
        self._metadata_kinds: dict[str, set[str]] = {}
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.warned = 0

    def reject(self, reject: Reject) -> None:
        """A row that can't be used."""
        self._reject("rejected", reject)

    def committed_before(self, record: Checked) -> None:
        """A row whose artifact was in the store when the run came to it."""
        self.outcome(record, RowOutcome("already", record.digest))

    def repeated(self, record: Checked) -> None:
        """A row that says again what an earlier row said."""
        self._result(record, "repeated", RowOutcome("already"))

    def outcome(self, record: Checked, outcome: RowOutcome) -> None:
        """A row that a worker dealt with."""
        if outcome.status != "failed":
            self._result(record, outcome.status, outcome)
            return
        row = record.row
        self._reject("failed", Reject(row.object_id, row.where, outcome.code, outcome.message))

    def write(self, store: ArtifactStore, run_id: str) -> None:
        """Write both tables to the run's folder in the store."""
        schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in _RESULT_FIELDS])
        for name, kinds in sorted(self._metadata_kinds.items()):
            schema = schema.append(pa.field(name, _column_type(kinds)))
        self._write_table(store, run_id, RESULTS_FILE, schema)
        rejects = pa.schema([(name, pa.string()) for name in _REJECT_FIELDS])
        self._write_table(store, run_id, REJECTS_FILE, rejects)

    def results(self, most: int) -> list[dict[str, Any]]:
        """The first lines of the results."""
        return list(islice(self._lines(RESULTS_FILE), most))

    def rejects(self, most: int) -> list[dict[str, Any]]:
        """The first lines of the rejects."""
        return list(islice(self._lines(REJECTS_FILE), most))

    def close(self) -> None:
        """Remove the spools."""
        for spool in self._spools.values():
            spool.close()
        self._folder.cleanup()

    def _reject(self, status: str, reject: Reject) -> None:
        with self._lock:
            self.reasons[reject.code] += 1
        self._line(REJECTS_FILE, status, {name: getattr(reject, name) for name in _REJECT_FIELDS}, reject.code)

    def _result(self, record: Checked, status: str, outcome: RowOutcome) -> None:
        row = record.row
        warning = "; ".join(filter(None, (*row.warnings, outcome.warning)))
        fields = {
            "object_id": row.object_id,
            "status": status,
            "digest": outcome.digest,
            "class_name": row.class_name,
            "scene": row.scene,
            "where": row.where,
            "warning": warning,
            **{name: outcome.metrics.get(name) for name in _METRICS},
        }
        # A free column may bear the name of one of ours.
        metadata = {f"row_{name}" if name in fields else name: value for name, value in row.metadata.items()}
        with self._lock:
            for name, value in metadata.items():
                self._metadata_kinds.setdefault(name, set()).update(() if value is None else (_kind(value),))
            self.warned += bool(warning)
        self._line(RESULTS_FILE, status, fields | metadata)

    def _line(self, name: str, status: str, fields: dict[str, Any], reason: str = "") -> None:
        with self._lock:
            self.counts[status] += 1
            self._spools[name].write(json.dumps(fields) + "\n")
        self._on_row(status, reason)

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        spool: IO[str] = self._spools[name]
        with self._lock:
            spool.flush()
        with Path(spool.name).open() as lines:
            yield from map(json.loads, lines)

    def _write_table(self, store: ArtifactStore, run_id: str, name: str, schema: pa.Schema) -> None:
        text = [field.name for field in schema if pa.types.is_string(field.type)]
        lines = self._lines(name)
        with store.open_run_file(run_id, name, "wb") as file, pq.ParquetWriter(file, schema) as writer:
            while some := list(islice(lines, _ROWS_PER_BATCH)):
                rows = [{**line, **{n: _text(line.get(n)) for n in text}} for line in some]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _kind(value: Any) -> str:
    if isinstance(value, bool | float):
        return type(value).__name__
    if isinstance(value, int) and abs(value) < 2**63:
        # Arrow refuses integers that a float can't hold exactly.
        return "int" if abs(value) <= 2**53 else "long"
    return "text"


def _column_type(kinds: set[str]) -> pa.DataType:
    types = (({"bool"}, pa.bool_()), ({"int", "long"}, pa.int64()), ({"int", "float"}, pa.float64()))
    return next((arrow for known, arrow in types if kinds and kinds <= known), pa.string())


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
