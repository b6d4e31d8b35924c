"""The page of an evaluation: tables, plots, and for each object a grid of methods by prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from objdrive.evaluation.pages import render_page


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
    return render_page("grids", title=title, facts=facts, tables=tables, plots=plots, prompts=prompts, objects=objects)
