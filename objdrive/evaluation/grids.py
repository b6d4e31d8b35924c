"""The page of an evaluation: table, plots, and for each object a grid of methods by prompts."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from objdrive.evaluation.report import Picture, figure, page

_STYLE = """
.grid { overflow-x: auto; } .grid table { width: auto; } .grid td, .grid th { padding: .15rem; border: 0; }
.grid th { font-weight: normal; font-size: .75rem; color: var(--muted); vertical-align: middle; max-width: 96px; }
.grid img { width: 96px; height: 96px; image-rendering: auto; } .scores th, .scores td { overflow-wrap: normal; }
.scores td + td { font-variant-numeric: tabular-nums; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots img { width: 36rem; max-width: 100%; height: auto;
background: #fff; }
"""


@dataclass(frozen=True)
class ObjectGrid:
    """What was drawn of one object.

    Attributes:
        object_id: which.
        class_name: what it is.
        photo: WebP, or empty.
        rows: for each method its WebP pictures, in the order of the prompts; empty for those that it has none for.
    """

    object_id: str
    class_name: str
    photo: bytes
    rows: Mapping[str, Sequence[bytes]]


@dataclass(frozen=True)
class Table:
    """A table of texts under a heading; `head` names its columns."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def render_grids(
    title: str,
    facts: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    plots: Sequence[bytes],
    prompts: Sequence[str],
    objects: Sequence[ObjectGrid],
) -> str:
    """Return the page, which loads nothing from anywhere.

    Args:
        title: of the page.
        facts: (name, value) of what was evaluated and how.
        tables: figures.
        plots: SVG.
        prompts: the heads of the grids' columns.
        objects: a grid each.
    """
    return page(title, facts, _parts(tables, plots, prompts, objects), style=_STYLE)


def _parts(
    tables: Sequence[Table], plots: Sequence[bytes], prompts: Sequence[str], objects: Sequence[ObjectGrid]
) -> Iterable[str]:
    if plots:
        yield '<div class="plots">'
        for plot in plots:
            data = base64.b64encode(plot).decode()
            yield f'<img alt="fidelity against generalization" src="data:image/svg+xml;base64,{data}">'
        yield "</div>"
    for table in tables:
        yield f"<h2>{escape(table.title)}</h2>{_cells(table)}"
    for shown in objects:
        yield f'<section class="object"><b>{escape(shown.object_id)}</b> · {escape(shown.class_name)}'
        if shown.photo:
            yield figure(Picture("input", shown.photo))
        yield '<div class="grid"><table><tr><th></th>'
        yield "".join(f"<th>{escape(prompt)}</th>" for prompt in prompts)
        yield "</tr>"
        for method, pictures in shown.rows.items():
            yield f"<tr><th>{escape(method)}</th>"
            yield "".join(f"<td>{_image(method, picture) if picture else ''}</td>" for picture in pictures)
            yield "</tr>"
        yield "</table></div></section>"


def _cells(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows)
    return f'<table class="scores"><tr>{head}</tr>' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _image(method: str, picture: bytes) -> str:
    return f'<img alt="{escape(method)}" src="data:image/webp;base64,{base64.b64encode(picture).decode()}">'
