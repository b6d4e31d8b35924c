"""What became of a row."""

from dataclasses import dataclass, field
from typing import Literal

from jobs.ingest import Checked


@dataclass(frozen=True)
class RowOutcome:
    """What became of one row: a digest if it is in the store, else a reason code and a message."""

    status: Literal["committed", "already", "failed"]
    digest: str = ""
    code: str = ""
    message: str = ""
    warning: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


def fail_row(record: Checked, code: str, message: str) -> RowOutcome:
    """The outcome of a row that gets no adapter; the message says which row it is about."""
    return RowOutcome("failed", code=code, message=f"{record.row.where}: {message}")
