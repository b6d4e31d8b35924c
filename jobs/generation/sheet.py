"""What a run leaves beside its pictures: the contact sheet, and the table of what could not be drawn."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, islice
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.generation.plan import Order, Plan
from jobs.generation.settings import PlannedPicture
from objdrive.adapters.storage import Files
from objdrive.evaluation.sheet import (
    SheetFault,
    SheetFront,
    SheetGroup,
    SheetPage,
    SheetPicture,
    render_front,
    render_sheet,
)

FRONT_FILE = "index.html"
REJECTS_FILE = "rejects.parquet"
_REJECT_FIELDS = ("object_id", "prompt_id", "seed", "code", "message")
_REJECTS = pa.schema([(name, pa.int64() if name == "seed" else pa.string()) for name in _REJECT_FIELDS])
_PICTURES_PER_PAGE = 96
_SHOWN_FAULTS = 1_000
_ROWS_PER_TABLE = 10_000
_UP = "../.."
"""From a run's folder to that of the pictures."""

_Item = TypeVar("_Item")


def run_file(run_id: str, name: str) -> str:
    """Where a file of a run is, below the address of the pictures."""
    return f"runs/{run_id}/{name}"


def write_rejects(files: Files, run_id: str, plan: Plan) -> None:
    """Write a line for everything that could not be drawn."""
    with files.open(run_file(run_id, REJECTS_FILE), "wb") as file, pq.ParquetWriter(file, _REJECTS) as writer:
        for rows in _batched(plan.faults(), _ROWS_PER_TABLE):
            writer.write_table(pa.Table.from_pylist(list(rows), _REJECTS))


def write_sheet(files: Files, run_id: str, plan: Plan, facts: Sequence[tuple[str, str]], most: int) -> None:
    """Write the contact sheet of the first pictures, at most so many, by object and by prompt."""
    pages = {
        "By object": _write_pages(files, run_id, plan, "object", most),
        "By prompt": _write_pages(files, run_id, plan, "prompt", most),
    }
    faults = [
        SheetFault(*("" if one[name] is None else str(one[name]) for name in _REJECT_FIELDS))
        for one in plan.faults(_SHOWN_FAULTS)
    ]
    counts = {name: count for name, count in plan.counts.items() if count}
    there = sum(counts.get(name, 0) for name in ("drawn", "found", "already"))
    front = SheetFront("objdrive: pictures of a catalog", facts, counts, min(there, most), pages, faults)
    files.replace(run_file(run_id, FRONT_FILE), render_front(front).encode())


def _write_pages(files: Files, run_id: str, plan: Plan, order: Order, most: int) -> list[tuple[str, str, str]]:
    """Write all pages of an order; their files, each with the names of its first and its last group."""
    written: list[tuple[str, str, str]] = []
    # Read one page ahead: a page has to know whether there is a next one.
    ahead = chain(_batched(plan.shown(order, most), _PICTURES_PER_PAGE), [()])
    page = next(ahead)
    for number, following in enumerate(ahead, 1):
        groups = list(_groups(page, order))
        name = _file_name(order, number)
        links = {
            "all pages": FRONT_FILE,
            "previous": written[-1][0] if written else "",
            "next": _file_name(order, number + 1) if following else "",
        }
        title = f"Pictures by {order}, page {number}"
        files.replace(run_file(run_id, name), render_sheet(SheetPage(title, links, groups)).encode())
        written.append((name, groups[0].name, groups[-1].name))
        page = following
    return written


def _file_name(order: Order, number: int) -> str:
    return f"by-{order}-{number:05}.html"


def _groups(page: Sequence[tuple[PlannedPicture, str]], order: Order) -> Iterator[SheetGroup]:
    for name, shown in groupby(page, key=lambda one: one[0].object_id if order == "object" else one[0].prompt_id):
        some = list(shown)
        first = some[0][0]
        note = first.class_name if order == "object" else first.prompt
        pictures = [
            SheetPicture(
                f"{_UP}/{path}",
                f"{picture.prompt_id if order == 'object' else picture.object_id}, seed {picture.seed}",
            )
            for picture, path in some
        ]
        yield SheetGroup(name, note, pictures)


def _batched(items: Iterable[_Item], most: int) -> Iterator[tuple[_Item, ...]]:
    stream = iter(items)
    return iter(lambda: tuple(islice(stream, most)), ())
