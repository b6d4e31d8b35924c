"""What an evaluation leaves: the table of figures, the plots and the page."""

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.evaluation.pictures import BASE_METHOD, CONTROLS, COPY
from jobs.evaluation.scoring import read_scores
from objdrive.evaluation.grids import ObjectGrid, Table, render_grids
from objdrive.evaluation.layout import Box, overlap
from objdrive.evaluation.plots import plot_sheet, plot_trade
from objdrive.evaluation.prompts import WITH_COMPANY, EvaluationPrompt
from objdrive.evaluation.ruler import METRICS
from objdrive.evaluation.scores import Array, scalarise
from objdrive.evaluation.summary import (
    Figure,
    Trade,
    difference_per_object,
    figure,
    mean_per_object,
    per_object,
    spread_per_object,
    variety,
)
from objdrive.pictures import encode_picture

PICTURES_FILE = "pictures.parquet"
SCORES_FILE = "scores.parquet"
SUMMARY_FILE = "summary.parquet"
REPORT_FILE = "report.html"
SHEET_FILE = "sheet.webp"

VARIETY = "variety of layouts"
ALL_THREE = "identity, prompts and variety"

_THUMBNAIL = 192
_SHEET_ROWS = 10
_NAMES = {
    "whole": "fidelity, whole picture",
    "object": "fidelity, object",
    "text": "generalization (text)",
    "identity_class": "identity in its class",
    "identity_all": "identity among all objects",
    "context": "prompt recognised",
}


def by_method(scores: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Scores by method: the base alone first, then methods as they first come, then what calibrates the ruler."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in scores:
        grouped.setdefault(row["method"], []).append(row)
    return {method: grouped[method] for method in _in_order(grouped)}


def _in_order(methods: Iterable[str]) -> list[str]:
    return sorted(methods, key=lambda method: (method in CONTROLS, method != BASE_METHOD))


def choose_trades(scores: Sequence[Mapping[str, Any]]) -> list[Trade]:
    """The trades that these scores allow.

    ``similarity`` is the paper's: cosines to the object and to the text. ``recognition`` is identity in the class and
    the prompt recognised, by an encoder without text where there is one, because that has no part in any base.
    """
    there = {(row["encoder"], metric) for row in scores for metric in METRICS if row[metric] is not None}
    encoders = list(dict.fromkeys(row["encoder"] for row in scores))
    reading = [one for one in encoders if (one, "text") in there]
    others = [one for one in encoders if one not in reading]
    trades = []
    if reading:
        trades.append(Trade("similarity", ((others or reading)[0], "object"), (reading[0], "text")))
    for one in (*others, *reading):
        if (one, "identity_class") in there and (one, "context") in there:
            trades.append(Trade("recognition", (one, "identity_class"), (one, "context")))
            break
    return trades


def recognition_trade(scores: Sequence[Mapping[str, Any]]) -> Trade | None:
    """The trade of recognitions, where these scores allow it."""
    return next((trade for trade in choose_trades(scores) if trade.name == "recognition"), None)


def trade_figures(rows: Sequence[Mapping[str, Any]], trade: Trade) -> dict[str, Figure] | None:
    """One method's fidelity, generalization and their harmonic mean; None if it has no pictures with both."""
    axes = (trade.fidelity, trade.generalization)
    means = per_object(rows, axes)
    if not means:
        return None
    found = {
        "fidelity": figure({one: values[:1] for one, values in means.items()}),
        "generalization": figure({one: values[1:] for one, values in means.items()}),
        "scalarised": figure(means, scalarise),
    }
    return {name: one for name, one in found.items() if one is not None}


def summarise(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Figures with intervals: every method by every encoder and metric, over all prompts and by their kind."""
    rows = []
    kinds = [None, *dict.fromkeys(row["kind"] for row in scores)]
    encoders = list(dict.fromkeys(row["encoder"] for row in scores))
    trades = choose_trades(scores)
    freedom = freedom_by_method(scores)
    for method, own in by_method(scores).items():
        for encoder in encoders:
            for metric in METRICS:
                for kind in kinds:
                    found = figure(per_object(own, [(encoder, metric)], kind=kind))
                    rows += [_row(method, encoder, metric, kind or "all", found)] if found else []
        for trade in trades:
            figures = trade_figures(own, trade) or {}
            rows += [_row(method, "", f"{trade.name}, {name}", "all", found) for name, found in figures.items()]
        rows += [_row(method, "", name, "all", found) for name, found in freedom[method].items()]
    return rows


def freedom_by_method(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Figure]]:
    """How free each method's pictures are of the one that it learned from.

    `VARIETY` and the variety of looks, by the features that tell identity, are told if the base alone was drawn too;
    with them `ALL_THREE`, the harmonic mean of identity, prompts and variety of layouts. How much of the photo's layout
    is copied is told if the photos were measured; how often something is drawn that is asked for once, always.
    """
    grouped = by_method(scores)
    base = grouped.get(BASE_METHOD, [])
    base_layouts = spread_per_object(base)
    photos = {row["object_id"]: Box(*row["box"]) for row in grouped.get(COPY, []) if row["box"]}
    recognition = recognition_trade(scores)
    base_looks = difference_per_object(base, recognition.fidelity[0]) if recognition else {}
    found: dict[str, dict[str, Figure | None]] = {}
    for method, own in grouped.items():
        figures = found.setdefault(method, {})
        layouts = variety(spread_per_object(own), base_layouts)
        figures[VARIETY] = _of_values(layouts)
        if recognition:
            looks = variety(difference_per_object(own, recognition.fidelity[0]), base_looks)
            figures["variety of looks"] = _of_values(looks)
            figures[ALL_THREE] = figure(three_per_object(own, layouts, recognition), scalarise)
        figures["layout copied"] = _of_values(mean_per_object(own, partial(_copied, photos=photos)))
        for often, name in enumerate(("nothing drawn", "drawn once", "drawn several times")):
            figures[name] = _of_values(mean_per_object(own, partial(_drawn_as_often, often=often)))
    return {method: {name: one for name, one in own.items() if one} for method, own in found.items()}


def three_per_object(
    rows: Sequence[Mapping[str, Any]], layouts: Mapping[str, float], recognition: Trade
) -> dict[str, Array]:
    """Object id -> (3,): one method's identity, prompts, and variety of its `layouts` (see `summary.variety`)."""
    means = per_object(rows, (recognition.fidelity, recognition.generalization))
    return {one: np.array([*means[one], layouts[one]]) for one in means if one in layouts}


def _of_values(values: Mapping[str, float]) -> Figure | None:
    return figure({one: np.array([value]) for one, value in values.items()})


def _copied(row: Mapping[str, Any], photos: Mapping[str, Box]) -> float | None:
    """How much of the photo's place and size a picture's things have, where a prompt leaves these to the method."""
    if row["kind"] in ("size", *WITH_COMPANY) or not row["box"] or row["object_id"] not in photos:
        return None
    return overlap(Box(*row["box"]), photos[row["object_id"]])


def _drawn_as_often(row: Mapping[str, Any], often: int) -> float | None:
    """1 if a picture has so many things, two standing for any more, else 0; None if the prompt asks for two."""
    return None if row["kind"] in WITH_COMPANY else float(min(row["things"], 2) == often)


def _row(method: str, encoder: str, metric: str, kind: str, found: Figure) -> dict[str, Any]:
    return {
        "method": method,
        "encoder": encoder,
        "metric": metric,
        "kind": kind,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "objects": found.objects,
    }


def write_pages(
    out: Path,
    pictures: Path,
    scores: Path,
    prompts: Sequence[EvaluationPrompt],
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    shown: int,
) -> None:
    """Write summary, plots, sheet and page of an evaluation to the folder `out`.

    Args:
        out: where to.
        pictures: the table of pictures.
        scores: the table of their scores.
        prompts: whose pictures the grids show.
        title: of the page.
        facts: (name, value) of what was done.
        shown: objects that get a grid.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = read_scores(scores)
    summary = summarise(rows)
    pq.write_table(pa.Table.from_pylist(summary), out / SUMMARY_FILE)
    plots = []
    for trade in choose_trades(rows):
        drawn = _plot(rows, trade)
        for kind, data in drawn.items():
            (out / f"{trade.name}.{kind}").write_bytes(data)
        plots.append(drawn["svg"])
    grids = _grids(pictures, prompts, shown)
    if grids:
        (out / SHEET_FILE).write_bytes(_sheet(grids, prompts))
    page = render_grids(title, facts, _tables(summary), plots, [prompt.text for prompt in prompts], grids)
    (out / REPORT_FILE).write_text(page, encoding="utf-8")


def _plot(rows: Sequence[Mapping[str, Any]], trade: Trade) -> dict[str, bytes]:
    points = {}
    for method, own in by_method(rows).items():
        if figures := trade_figures(own, trade):
            points[method] = figures["generalization"], figures["fidelity"]
    labels = [f"{_NAMES[metric]}, by {encoder}" for encoder, metric in (trade.generalization, trade.fidelity)]
    controls = [name for name in points if name in CONTROLS]
    return plot_trade(points, (labels[0], labels[1]), title=trade.name, controls=controls)


def _tables(summary: Sequence[Mapping[str, Any]]) -> list[Table]:
    """For each encoder a table of methods by metrics, and one of the trades; all over all prompts."""
    whole = [row for row in summary if row["kind"] == "all"]
    methods = list(dict.fromkeys(row["method"] for row in whole))
    tables = []
    for encoder in sorted({row["encoder"] for row in whole}):
        cells = {(row["method"], row["metric"]): _cell(row) for row in whole if row["encoder"] == encoder}
        metrics = list(dict.fromkeys(row["metric"] for row in whole if row["encoder"] == encoder))
        head = ("method", *(_NAMES.get(metric, metric) for metric in metrics))
        lines = [(method, *(cells.get((method, metric), "") for metric in metrics)) for method in methods]
        tables.append(Table(f"By {encoder}" if encoder else "Trades", head, lines))
    return tables


def _cell(row: Mapping[str, Any]) -> str:
    return str(Figure(row["value"], row["low"], row["high"], row["objects"]))


def _grids(pictures: Path, prompts: Sequence[EvaluationPrompt], shown: int) -> list[ObjectGrid]:
    """Grids of the first objects, each with the first picture of every method and prompt."""
    order = {prompt.id: place for place, prompt in enumerate(prompts)}
    cells: dict[str, dict[str, dict[int, bytes]]] = {}
    words: dict[str, str] = {}
    photos: dict[str, bytes] = {}
    for row in pq.read_table(pictures, filters=[("number", "==", 0)]).to_pylist():
        one = row["object_id"]
        if row["prompt_id"] not in order or (one not in words and len(words) == shown):
            continue
        words[one] = row["class_name"]
        webp = _webp(row["picture"])
        if row["method"] == COPY:
            photos[one] = webp
        else:
            cells.setdefault(one, {}).setdefault(row["method"], {})[order[row["prompt_id"]]] = webp
    return [
        ObjectGrid(
            one,
            words[one],
            photos.get(one, b""),
            {
                method: [cells[one][method].get(place, b"") for place in range(len(prompts))]
                for method in _in_order(cells.get(one, {}))
            },
        )
        for one in sorted(words)
    ]


def _sheet(grids: Sequence[ObjectGrid], prompts: Sequence[EvaluationPrompt]) -> bytes:
    """The first objects by every method, each object in another prompt; their photos come first if there are any."""
    methods = _in_order(dict.fromkeys(method for grid in grids for method in grid.rows))
    photos = any(grid.photo for grid in grids)
    rows = []
    for number, grid in enumerate(grids[:_SHEET_ROWS]):
        place = number % len(prompts)
        pictures = [grid.rows[method][place] if method in grid.rows else b"" for method in methods]
        rows.append((prompts[place].naming(grid.class_name), [grid.photo] * photos + pictures))
    return plot_sheet(["photo"] * photos + methods, rows)


def _webp(png: bytes) -> bytes:
    picture = Image.open(io.BytesIO(png))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return encode_picture(picture, "WEBP", quality=90)
