"""A contact sheet of many pictures: static pages, by object and by prompt, that show the pictures where they lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from objdrive.evaluation.pages import render_page


@dataclass(frozen=True)
class SheetPicture:
    """A picture by its address from the page, and what is said under it."""

    address: str
    caption: str


@dataclass(frozen=True)
class SheetGroup:
    """Pictures that belong together; `note` is said beside the `name`."""

    name: str
    note: str
    pictures: Sequence[SheetPicture]


@dataclass(frozen=True)
class SheetPage:
    """One page: its `title`, where the others are by name (empty: nowhere), and what it shows."""

    title: str
    links: Mapping[str, str]
    groups: Sequence[SheetGroup]


@dataclass(frozen=True)
class SheetFault:
    """What could not be drawn, and why; `prompt` and `seed` are empty if it is true of the whole object."""

    object_id: str
    prompt: str
    seed: str
    code: str
    message: str


@dataclass(frozen=True)
class SheetFront:
    """The first page.

    Attributes:
        title: of the sheet.
        facts: as (name, value).
        counts: pictures by what became of them.
        shown: how many pictures the pages show.
        pages: for each order, such as "by object", the pages as (file, first name, last name).
        faults: the first ones.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    counts: Mapping[str, int]
    shown: int
    pages: Mapping[str, Sequence[tuple[str, str, str]]]
    faults: Sequence[SheetFault]


def render_front(front: SheetFront) -> str:
    """The first page, which loads nothing."""
    failed = front.counts.get("failed", 0)
    there = sum(front.counts.get(name, 0) for name in ("drawn", "found", "already"))
    return render_page("sheet_front", **vars(front), failed=failed, there=there)


def render_sheet(page: SheetPage) -> str:
    """A page of pictures, which loads these alone."""
    return render_page("sheet", **vars(page), facts=())
