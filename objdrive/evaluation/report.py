"""The contact sheet: one self-contained HTML page that shows what came out of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from objdrive.evaluation.pages import render_page


@dataclass(frozen=True)
class CaptionedPicture:
    """A WebP picture and what it shows."""

    caption: str
    webp: bytes


@dataclass(frozen=True)
class ReportedObject:
    """One object of the report; `note` is a warning or empty."""

    object_id: str
    class_name: str
    status: str
    digest: str
    note: str = ""
    pictures: Sequence[CaptionedPicture] = ()


@dataclass(frozen=True)
class Failure:
    """One row that has no adapter, and why."""

    object_id: str
    where: str
    code: str
    message: str


@dataclass(frozen=True)
class Report:
    """What the page says: a title, facts as (name, value), counts by outcome, objects, failures.

    `objects` and `failures` may be the first ones only; the counts say how many there are in all.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    counts: dict[str, int]
    objects: Sequence[ReportedObject] = field(default=())
    failures: Sequence[Failure] = field(default=())


def render(report: Report) -> str:
    """Return the page, which loads nothing from anywhere."""
    lost = sum(report.counts.get(name, 0) for name in ("rejected", "failed"))
    return render_page("report", **vars(report), lost=lost, kept=sum(report.counts.values()) - lost)
