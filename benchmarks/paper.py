"""The paper's comparison: the same steps for every method, each with its best learning rate, on drawings never seen.

Usage: ``python benchmarks/paper.py --out FOLDER`` (``--smoke`` tries it out in minutes, on plain shapes).

Every method is fine-tuned on the development half at several learning rates, the base's own times `FACTORS`. The one
with the highest scalarised recognition is fine-tuned on the test half, once. Each such cell is a store with its scores,
kept in the folder, so that an interrupted run goes on where it stopped. At the end there are, for each half, the table,
the plots and the page, and ``results.md`` with the sweep, the figures and the differences.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs.evaluation.compose import GALLERY_FILE, MANIFEST_FILE, PROMPTS
from jobs.evaluation.pages import (
    PICTURES_FILE,
    SCORES_FILE,
    by_method,
    choose_trades,
    trade_figures,
    write_pages,
)
from jobs.evaluation.pictures import CONTROLS
from objdrive.base_files import BaseFiles, find_base
from objdrive.evaluate import read_prompts
from objdrive.recipe import make_recipe
from objdrive.scores import pareto_front, scalarise
from objdrive.summary import Figure, Trade, difference, per_object

JOBS = Path(__file__).resolve().parents[1] / "jobs"
HALVES = ("development", "test")
FACTORS = (0.3, 1.0, 3.0)
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "textual_inversion": ("textual_inversion", ()),
    "lora": ("lora", ()),
    "dreambooth": ("dreambooth", ()),
    "paper": ("paper", ()),
    "paper without prototype": ("paper", ("embedding_start=class",)),
    "paper without regularization": ("paper", ("ccr_weight=0",)),
    "paper without object loss": ("paper", ("masked=false",)),
    "objdrive": ("objdrive", ()),
}
"""Preset and overrides of each; the base alone comes besides."""
OURS = "paper"
_ROWS_LOST = 3


@dataclass(frozen=True)
class Effort:
    """How much is done.

    Attributes:
        steps: of every fine-tune; None: what suits the base.
        factors: of the base's learning rates.
        methods: which.
        prompts: YAML list of them.
        seeds: pictures of each object and prompt.
        sample_steps: of drawing; None: what suits the base.
        encoders: what pictures are judged by.
        drawn: plain shapes in place of icons.
    """

    steps: int | None = None
    factors: tuple[float, ...] = FACTORS
    methods: tuple[str, ...] = tuple(METHODS)
    prompts: str = str(PROMPTS)
    seeds: int = 2
    sample_steps: int | None = None
    encoders: tuple[str, ...] = ("imagenet", "clip")
    drawn: bool = False


SMOKE = Effort(
    steps=2,
    factors=(1.0,),
    methods=("lora", "paper"),
    prompts=str(Path(__file__).resolve().parent / "smoke_prompts.yaml"),
    seeds=1,
    sample_steps=2,
    encoders=("clip",),
    drawn=True,
)


@dataclass(frozen=True)
class Cell:
    """One method at one learning rate on one half."""

    method: str
    factor: float
    half: str

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.method.replace(' ', '-')}-x{self.factor:g}"


class Benchmark:
    """All cells in a folder."""

    def __init__(self, out: Path, data: Path, base: BaseFiles, effort: Effort) -> None:
        self._out, self._data, self._base, self._effort = out, data, base, effort
        self._set = out / "set"

    def run(self) -> None:
        """Do what is not done yet."""
        self._compose()
        chosen = {}
        lines = ["# Methods compared", "", *self._describe(), "", "## Learning rates, development half", ""]
        lines += ["| method | factor of the base's rates | scalarised recognition |", "|---|---|---|"]
        for method in self._effort.methods:
            swept = {factor: self._quality(Cell(method, factor, "development")) for factor in self._effort.factors}
            chosen[method] = max(swept, key=lambda factor: swept[factor])
            lines += [
                f"| {method} | {factor:g}{' (best)' if factor == chosen[method] else ''} | {value:.3f} |"
                for factor, value in swept.items()
            ]
        for half in HALVES:
            cells = [Cell(method, factor, half) for method, factor in chosen.items()]
            for cell in cells:
                self._fill(cell)
            lines += ["", f"## The {half} half", "", *self._compare(half, cells)]
        (self._out / "results.md").write_text("\n".join(lines) + "\n")
        print(f"results {self._out / 'results.md'}")

    def _compose(self) -> None:
        if all((self._set / half / GALLERY_FILE).is_file() for half in HALVES):
            return
        options = ["--drawn"] if self._effort.drawn else ["--data", str(self._data)]
        _job("evaluation_set.py", "--out", str(self._set), "--prompts", self._effort.prompts, *options)

    def _folder(self, cell: Cell) -> Path:
        return self._out / cell.half / cell.name

    def _fill(self, cell: Cell) -> None:
        """Fine-tune and measure a cell, unless it is there with just these settings."""
        folder, half = self._folder(cell), self._set / cell.half
        preset, changes = METHODS[cell.method]
        overrides = self._overrides(preset, changes, cell.factor)
        settings = {"cell": asdict(cell), "preset": preset, "overrides": overrides, "base": self._base.fingerprint()}
        settings |= {"effort": asdict(self._effort), "set": (half / MANIFEST_FILE).read_text()}
        note, done = folder / "cell.json", json.dumps(settings, sort_keys=True)
        if note.is_file() and note.read_text() == done:
            return
        print(f"{cell.half}: {cell.method}, learning rates x {cell.factor:g}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        changed = [word for override in overrides for word in ("--set", override)]
        store = str(folder / "store")
        base = ["--base", self._base.name]
        personalize = [str(half / MANIFEST_FILE), "--store", store, *base, "--recipe", preset, *changed]
        # A rate that is too high may lose rows; how many objects are left stands in every table.
        _job("batch_personalize.py", *personalize, "--previews", "0", may_lose_rows=True)
        effort = self._effort
        evaluate = ["--store", f"{cell.method}={store}", *base, "--prompts", effort.prompts]
        evaluate += ["--gallery", str(half / GALLERY_FILE), "--seeds", str(effort.seeds), "--out", str(folder)]
        evaluate += [word for name in effort.encoders for word in ("--encoder", name)]
        evaluate += ["--steps", str(effort.sample_steps)] if effort.sample_steps else []
        evaluate += ["--base-alone", "--controls"] if cell.method == OURS else []
        _job("evaluate.py", *evaluate)
        note.write_text(done)

    def _overrides(self, preset: str, changes: Sequence[str], factor: float) -> list[str]:
        recipe = make_recipe(preset, tuning=self._base.tuning, overrides=changes)
        rates = {"lora_lr": recipe.lora_lr if recipe.rank else 0.0, "embedding_lr": recipe.embedding_lr}
        steps = self._effort.steps or recipe.steps
        # A rate of 0 is part of the method.
        return [*changes, f"steps={steps}", *(f"{name}={rate * factor:g}" for name, rate in rates.items() if rate)]

    def _quality(self, cell: Cell) -> float:
        self._fill(cell)
        rows = [row for row in self._scores([cell]) if row["method"] == cell.method]
        figures = trade_figures(rows, _recognition(rows))
        return figures["scalarised"].value if figures else 0.0

    def _scores(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        tables = [pq.read_table(self._folder(cell) / SCORES_FILE) for cell in cells]
        rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
        return rows

    def _compare(self, half: str, cells: Sequence[Cell]) -> list[str]:
        """Pages of a half, and its figures and differences as Markdown."""
        folders = [self._folder(cell) for cell in cells]
        write_pages(
            self._out / half,
            [folder / PICTURES_FILE for folder in folders],
            [folder / SCORES_FILE for folder in folders],
            read_prompts(Path(self._effort.prompts)),
            title=f"objdrive: methods compared, {half} half",
            facts=[("method " + cell.method, f"learning rates x {cell.factor:g}") for cell in cells],
            shown=12,
        )
        rows = self._scores(cells)
        lines = []
        for trade in choose_trades(rows):
            lines += [*_figures(rows, trade), "", *_differences(rows, trade), ""]
        return lines

    def _describe(self) -> list[str]:
        effort = self._effort
        recipe = make_recipe(tuning=self._base.tuning)
        return [
            f"Base `{self._base.name}`, {effort.steps or recipe.steps} steps, {effort.seeds} seeds, "
            f"{effort.sample_steps or recipe.sample_steps} steps of drawing, judged by {', '.join(effort.encoders)}. "
            "Intervals: 95%, bootstrap over objects. `copy` is the input photo, `scenes` are composed pictures."
        ]


def _recognition(rows: Sequence[Mapping[str, Any]]) -> Trade:
    return next(trade for trade in choose_trades(rows) if trade.name == "recognition")


def _figures(rows: Sequence[Mapping[str, Any]], trade: Trade) -> list[str]:
    """A table of the trade, with the contenders on the front marked."""
    found = {method: trade_figures(own, trade) for method, own in by_method(rows).items()}
    figures = {method: one for method, one in found.items() if one}
    contenders = [method for method in figures if method not in CONTROLS]
    points = [[figures[method][axis].value for axis in ("fidelity", "generalization")] for method in contenders]
    front = {method for method, best in zip(contenders, pareto_front(np.array(points)), strict=True) if best}
    names = [f"{metric} by {encoder}" for encoder, metric in (trade.fidelity, trade.generalization)]
    lines = [
        f"**{trade.name}**",
        "",
        f"| method | {names[0]} | {names[1]} | scalarised | objects | on the front |",
        "|---" * 6 + "|",
    ]
    for method, one in figures.items():
        cells = " | ".join(_cell(one[name]) for name in ("fidelity", "generalization", "scalarised"))
        lines.append(f"| {method} | {cells} | {one['scalarised'].objects} | {'yes' if method in front else ''} |")
    if OURS in contenders:
        ours = np.array(points[contenders.index(OURS)])
        ahead = [method for method, place in zip(contenders, points, strict=True) if (np.array(place) > ours).all()]
        lines += ["", f"Better than `{OURS}` on both axes: {', '.join(ahead) or 'none'}."]
    return lines


def _differences(rows: Sequence[Mapping[str, Any]], trade: Trade) -> list[str]:
    """What `OURS` has over every other method, on both axes, paired by object."""
    means = {method: per_object(own, (trade.fidelity, trade.generalization)) for method, own in by_method(rows).items()}
    lines = [f"| {OURS} less | fidelity | generalization | scalarised |", "|---" * 4 + "|"]
    for method, theirs in means.items():
        if method in (OURS, *CONTROLS) or not theirs or not means.get(OURS):
            continue
        ours = means[OURS]
        gains = [
            difference(ours, theirs),
            difference(ours, theirs, lambda values: values[:, 1]),
            difference(ours, theirs, scalarise),
        ]
        lines.append(f"| {method} | " + " | ".join(map(_cell, gains)) + " |")
    return lines


def _cell(one: Figure) -> str:
    return f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"


def _job(script: str, *options: str, may_lose_rows: bool = False) -> None:
    """Run one of the jobs on this benchmark's cluster; its output goes where this process's goes."""
    path = os.pathsep.join(filter(None, (str(JOBS.parent), os.environ.get("PYTHONPATH"))))
    finished = subprocess.run(
        [sys.executable, str(JOBS / script), *options], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    if finished.returncode and not (may_lose_rows and finished.returncode == _ROWS_LOST):
        sys.exit(f"{script} failed with status {finished.returncode}; run this again to go on from here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; a rerun goes on in it")
    parser.add_argument("--data", type=Path, default=Path("icons"), help="folder with the icons; fetched if none")
    parser.add_argument("--base", default="tiny64")
    parser.add_argument("--steps", type=int, help="of every fine-tune (what suits the base)")
    parser.add_argument("--seeds", type=int, default=Effort.seeds)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--smoke", action="store_true", help="plain shapes, two methods, two steps: tries it all out")
    arguments = parser.parse_args()
    effort = Effort(steps=arguments.steps, seeds=arguments.seeds, methods=tuple(arguments.methods))
    if "RAY_ADDRESS" not in os.environ:
        context = ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    out = arguments.out.absolute()
    Benchmark(out, arguments.data, find_base(arguments.base), SMOKE if arguments.smoke else effort).run()


if __name__ == "__main__":
    main()
