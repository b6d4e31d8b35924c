"""The paper's comparison: the same steps for every method, each with its best learning rate, on drawings never seen.

Usage: ``python benchmarks/paper.py --out FOLDER`` (``--smoke`` tries it out in minutes, on plain shapes).

Every preset is fine-tuned on objects of the development half at several learning rates, `FACTORS` of those that suit
the base with most presets. With the rate of the highest harmonic mean of identity, prompts and variety it is
fine-tuned on the test half, once; so are the ablations of the paper's method, at the rate of that, and the default as
it is shipped. Each ablation is tried once more where its part has something to do. What `objdrive` makes of fewer and
of more steps is measured on the development half. For each of the four there are the table, the plots and the page of
an evaluation; ``results.md`` has the figures and the differences. An interrupted run goes on where it stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from comparing import DEVELOPMENT, SMOKE_PROMPTS, TEST, Contender, Drawn, cell, have_cluster, job, measure, parser
from magenta import magenta_by_object, on_magenta

from jobs.evaluation.compose import GALLERY_FILE, MANIFEST_FILE, PROMPTS
from jobs.evaluation.pages import (
    ALL_THREE,
    PICTURES_FILE,
    by_method,
    choose_trades,
    freedom_by_method,
    recognition_trade,
    three_per_object,
    trade_figures,
)
from jobs.evaluation.pictures import BASE_METHOD, CONTROLS
from objdrive.base.files import BaseFiles, find_base
from objdrive.base.stable_diffusion import Base
from objdrive.evaluation.scores import Array, pareto_front, scalarise
from objdrive.evaluation.summary import (
    Figure,
    Trade,
    difference,
    figure,
    per_object,
    spread_per_object,
    variety,
)
from objdrive.training.recipe import make_recipe

FACTORS = (0.3, 1.0, 3.0)
SHARES = (0.25, 0.5, 2.0)
PAPER, DEFAULT = "paper", "objdrive"
SHIPPED = f"{DEFAULT} as shipped"
PRESETS = ("textual_inversion", "lora", "t_lora", "dreambooth", PAPER, DEFAULT)
ABLATIONS = {
    "paper without prototype": "embedding_start=class",
    "paper without regularization": "ccr_weight=0",
    "paper without object loss": "masked=false",
}


@dataclass(frozen=True)
class Trial:
    """Circumstances in which a part of the paper's method has something to do.

    Attributes:
        name: of the circumstances.
        ablation: of `ABLATIONS`, the one without that part.
        factor: of the learning rates of the method.
        share: of its steps.
        magenta: whether photos have a ground that plainly does not belong to the object.
    """

    name: str
    ablation: str
    factor: float = 1.0
    share: float = 1.0
    magenta: bool = False


TRIALS = (
    Trial("a quarter of the steps", "paper without prototype", share=0.25),
    Trial("3 times the learning rates", "paper without regularization", factor=3.0),
    Trial("magenta grounds", "paper without object loss", magenta=True),
)


@dataclass(frozen=True)
class Effort:
    """How much is done.

    Attributes:
        steps: of every fine-tune; None: what suits the base.
        presets: which.
        factors: of the learning rates that suit the base with most presets.
        shares: of those steps, for `DEFAULT`; all of them are in the sweep.
        tuned_on: objects of the development half, the first ones, that learning rates are chosen on.
        reported_on: objects of the test half, likewise.
        prompts: YAML list of them.
        seeds: pictures of each object and prompt.
        sample_steps: of drawing; None: what suits the base.
        encoders: what pictures are judged by; learning rates are chosen by the first.
        drawn: plain shapes in place of icons.
        share_gpu: processes that work side by side on one GPU.
    """

    steps: int | None = None
    presets: tuple[str, ...] = PRESETS
    factors: tuple[float, ...] = FACTORS
    shares: tuple[float, ...] = SHARES
    tuned_on: int = 22
    reported_on: int = 22
    prompts: str = str(PROMPTS)
    seeds: int = 2
    sample_steps: int | None = None
    encoders: tuple[str, ...] = ("imagenet", "clip")
    drawn: bool = False
    share_gpu: int = 1


SMOKE = Effort(
    steps=2,
    presets=("lora", PAPER, DEFAULT),
    factors=(1.0,),
    shares=(0.5,),
    tuned_on=1,
    reported_on=1,
    prompts=str(SMOKE_PROMPTS),
    seeds=2,
    sample_steps=2,
    encoders=("clip",),
    drawn=True,
)


class Benchmark:
    """All comparisons in a folder."""

    def __init__(self, out: Path, data: Path, base: BaseFiles, effort: Effort) -> None:
        self._out, self._data, self._base, self._effort = out, data, base, effort
        self._set = out / "set"

    def run(self) -> None:
        """Do what is not done yet."""
        self._compose()
        lines = ["# Methods compared", "", self._describe()]
        chosen, best, swept = self._tune()
        self._write(lines, ["", "## Learning rates, development half", "", *swept])
        self._write(lines, ["", "## The test half", "", *self._compare(chosen)])
        self._write(lines, ["## Ablations where their part has something to do", "", *self._try(chosen[PAPER]), ""])
        self._write(
            lines, [f"## Steps of `{DEFAULT}`, development half", "", *self._cut(chosen[DEFAULT], best[DEFAULT])]
        )
        print(f"results {self._out / 'results.md'}")

    def _write(self, lines: list[str], part: Sequence[str]) -> None:
        """Part by part: the whole takes hours."""
        lines += part
        (self._out / "results.md").write_text("\n".join(lines) + "\n")

    def _compose(self) -> None:
        if all((self._set / half / GALLERY_FILE).is_file() for half in (DEVELOPMENT, TEST)):
            return
        options = ["--drawn"] if self._effort.drawn else ["--data", str(self._data)]
        options += ["--resolution", str(Base.load(self._base.name, device="cpu").resolution)]
        job("evaluation_set.py", "--out", str(self._set), "--prompts", self._effort.prompts, *options)

    def _tune(self) -> tuple[dict[str, float], dict[str, Figure | None], list[str]]:
        """The best factor of the learning rates for each preset, what it reaches, and the table it is chosen from."""
        swept = {
            (preset, factor): self._contender(DEVELOPMENT, f"{preset} x{factor:g}", preset, factor=factor)
            for preset in self._effort.presets
            for factor in self._effort.factors
        }
        found = self._quality("tuning", list(swept.values()))
        quality = {key: found.get(contender.name) for key, contender in swept.items()}
        chosen = {
            preset: max(self._effort.factors, key=lambda factor: _value(quality[preset, factor]))
            for preset in self._effort.presets
        }
        lines = [f"| preset | learning rates | {ALL_THREE} | objects |", "|---" * 4 + "|"]
        for (preset, factor), reached in quality.items():
            rates = ", ".join(one for one in swept[preset, factor].overrides if "_lr=" in one)
            mark = " (chosen)" if chosen[preset] == factor else ""
            lines.append(f"| {preset} | {rates}{mark} | {cell(reached)} | {_objects(reached)} |")
        return chosen, {preset: quality[preset, factor] for preset, factor in chosen.items()}, lines

    def _cut(self, factor: float, full: Figure | None) -> list[str]:
        """The table of what fewer and more steps give; `full` is what all steps have given in the sweep."""
        steps = [round(share * self._steps) for share in self._effort.shares]
        contenders = [
            self._contender(DEVELOPMENT, f"{count} steps", DEFAULT, factor=factor, steps=count) for count in steps
        ]
        found = self._quality("steps", contenders)
        figures = {self._steps: full} | {
            count: found.get(one.name) for count, one in zip(steps, contenders, strict=True)
        }
        lines = [f"| {DEFAULT} | {ALL_THREE} | objects |", "|---" * 3 + "|"]
        return lines + [
            f"| {count} steps | {cell(figures[count])} | {_objects(figures[count])} |" for count in sorted(figures)
        ]

    def _compare(self, chosen: Mapping[str, float]) -> list[str]:
        contenders = [self._contender(TEST, preset, preset, factor=factor) for preset, factor in chosen.items()]
        contenders += [
            self._contender(TEST, name, PAPER, change, factor=chosen[PAPER]) for name, change in ABLATIONS.items()
        ]
        shipped = (f"steps={self._steps}",)
        contenders.append(Contender(SHIPPED, self._set / TEST / MANIFEST_FILE, DEFAULT, shipped))
        rows = self._measure(TEST, TEST, contenders, self._effort.reported_on, whole=True)
        lines = [*_freedom(rows), ""]
        for trade in choose_trades(rows):
            lines += [*_figures(rows, trade), "", *_differences(rows, trade), ""]
        return lines

    def _try(self, factor: float) -> list[str]:
        """What the paper's method has over its ablations in `TRIALS`, paired by object."""
        magenta = on_magenta(self._set / TEST / MANIFEST_FILE, self._out / "magenta")
        pairs = [[f"{PAPER}, {one.name}", f"{one.ablation}, {one.name}"] for one in TRIALS]
        contenders = []
        for trial, names in zip(TRIALS, pairs, strict=True):
            steps = round(trial.share * self._steps)
            for name, changes in zip(names, ((), (ABLATIONS[trial.ablation],)), strict=True):
                one = self._contender(TEST, name, PAPER, *changes, factor=factor * trial.factor, steps=steps)
                contenders.append(replace(one, manifest=magenta) if trial.magenta else one)
        rows = self._measure("trials", TEST, contenders, self._effort.reported_on)
        return _trial_table(rows, magenta_by_object(self._out / "trials" / PICTURES_FILE), pairs)

    @property
    def _steps(self) -> int:
        return self._effort.steps or make_recipe(tuning=self._base.tuning).steps

    def _contender(
        self, half: str, name: str, preset: str, *changes: str, factor: float, steps: int | None = None
    ) -> Contender:
        common = {field: value for field, value in self._base.tuning.items() if field != "presets"}
        recipe = make_recipe(preset, tuning=common, overrides=changes)
        rates = {"lora_lr": recipe.lora_lr if recipe.rank else 0.0, "embedding_lr": recipe.embedding_lr}
        # A rate of 0 is part of the method.
        scaled = [f"{name}={rate * factor:g}" for name, rate in rates.items() if rate]
        overrides = (*changes, f"steps={steps or self._steps}", *scaled)
        return Contender(name, self._set / half / MANIFEST_FILE, preset, overrides)

    def _quality(self, part: str, contenders: Sequence[Contender]) -> dict[str, Figure]:
        """`ALL_THREE` on objects of the development half, by name."""
        rows = self._measure(part, DEVELOPMENT, contenders, self._effort.tuned_on)
        return {name: one[ALL_THREE] for name, one in freedom_by_method(rows).items() if ALL_THREE in one}

    def _measure(
        self, part: str, half: str, contenders: Sequence[Contender], objects: int, *, whole: bool = False
    ) -> list[dict[str, Any]]:
        effort = self._effort
        encoders, controls = (effort.encoders, ("--controls",)) if whole else (effort.encoders[:1], ())
        options = ("--base-alone", *controls)
        drawn = Drawn(effort.prompts, effort.seeds, effort.sample_steps, encoders, options)
        gallery = self._set / half / GALLERY_FILE
        out, base = self._out / part, self._base.name
        return measure(out, contenders, gallery, base, drawn, objects=objects, share_gpu=effort.share_gpu)

    def _describe(self) -> str:
        effort = self._effort
        recipe = make_recipe(tuning=self._base.tuning)
        return (
            f"Base `{self._base.name}`, {self._steps} steps, pictures of {effort.seeds} seed(s) in "
            f"{effort.sample_steps or recipe.sample_steps} steps, judged by {', '.join(effort.encoders)}. Learning "
            f"rates chosen on {effort.tuned_on} objects, by {ALL_THREE} as {effort.encoders[0]} sees it. "
            "Intervals: 95%, bootstrap over "
            "objects. `copy` is the input photo, `scenes` are composed pictures."
        )


def _freedom(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How free every method is, with the prompts that need freedom, and what `SHIPPED` has over the others."""
    freedom, trade = freedom_by_method(rows), _recognition(rows)
    names = list(dict.fromkeys(name for one in freedom.values() for name in one))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    grouped = by_method(rows)
    spreads = {method: spread_per_object(own) for method, own in grouped.items()}
    three = {
        method: three_per_object(own, variety(spreads[method], spreads[BASE_METHOD]), trade)
        for method, own in grouped.items()
    }
    ours = three.get(SHIPPED, {})
    heads = [*names, *(f"prompts of the kind {kind}" for kind in kinds), f"more of {ALL_THREE} by {SHIPPED}"]
    lines = ["**freedom**", "", f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method, own in grouped.items():
        cells = [cell(freedom[method].get(name)) for name in names]
        cells += [cell(figure(per_object(own, [trade.generalization], kind=kind))) for kind in kinds]
        rival = method not in (SHIPPED, *CONTROLS) and ours.keys() & three[method].keys()
        cells.append(cell(difference(ours, three[method], scalarise)) if rival else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


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
        cells = " | ".join(cell(one[name]) for name in ("fidelity", "generalization", "scalarised"))
        lines.append(f"| {method} | {cells} | {one['scalarised'].objects} | {'yes' if method in front else ''} |")
    if PAPER in contenders:
        ours = np.array(points[contenders.index(PAPER)])
        ahead = [method for method, place in zip(contenders, points, strict=True) if (np.array(place) > ours).all()]
        lines += ["", f"Better than `{PAPER}` on both axes: {', '.join(ahead) or 'none'}."]
    return lines


def _differences(rows: Sequence[Mapping[str, Any]], trade: Trade) -> list[str]:
    """What `PAPER` and `DEFAULT`, also as shipped, have over every other method, on both axes, paired by object."""
    means = {method: per_object(own, (trade.fidelity, trade.generalization)) for method, own in by_method(rows).items()}
    lines = ["| | less | fidelity | generalization | scalarised |", "|---" * 5 + "|"]
    for ours in (PAPER, DEFAULT, SHIPPED):
        for method, theirs in means.items():
            if method in (ours, *CONTROLS) or not theirs or not means.get(ours):
                continue
            gains = [
                difference(means[ours], theirs),
                difference(means[ours], theirs, _second),
                difference(means[ours], theirs, scalarise),
            ]
            lines.append(f"| {ours} | {method} | " + " | ".join(map(cell, gains)) + " |")
    return lines


def _trial_table(
    rows: Sequence[Mapping[str, Any]], tinged: Mapping[str, Mapping[str, Array]], pairs: Sequence[Sequence[str]]
) -> list[str]:
    """Recognition and share of magenta of every method, and what the first of each pair has over the second."""
    trade = _recognition(rows)
    means = {name: per_object(own, (trade.fidelity, trade.generalization)) for name, own in by_method(rows).items()}
    lines = ["| | fidelity | generalization | share of magenta |", "|---" * 4 + "|"]
    for name, own in means.items():
        cells = figure(own), figure(own, _second), figure(tinged[name])
        lines.append(f"| {name} | " + " | ".join(map(cell, cells)) + " |")
    for ours, theirs in pairs:
        if means.get(ours) and means.get(theirs):
            more = difference(means[ours], means[theirs]), difference(means[ours], means[theirs], _second)
            gains = *more, difference(tinged[ours], tinged[theirs])
            lines.append(f"| more than {theirs} | " + " | ".join(map(cell, gains)) + " |")
    return lines


def _recognition(rows: Sequence[Mapping[str, Any]]) -> Trade:
    """The trade that trials are judged by, and whose two figures `ALL_THREE` takes."""
    trade = recognition_trade(rows)
    assert trade is not None
    return trade


def _second(values: Array) -> Array:
    """(N,) of (N, 2): of the two figures of a trade, the second."""
    second: Array = values[:, 1]
    return second


def _value(figure: Figure | None) -> float:
    """What a rate is chosen by: an object that it lost counts as nothing."""
    return figure.value * figure.objects if figure else 0.0


def _objects(figure: Figure | None) -> int:
    return figure.objects if figure else 0


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, default=Effort.seeds, help="pictures of each object and prompt (2)")
    options.add_argument("--tuned-on", type=int, default=Effort.tuned_on, metavar="N",
                        help="objects of the development half that learning rates are chosen on (22)")  # fmt: skip
    options.add_argument("--reported-on", type=int, default=Effort.reported_on, metavar="N",
                        help="objects of the test half that methods are compared on (22)")  # fmt: skip
    options.add_argument("--share-gpu", type=int, default=Effort.share_gpu, metavar="N",
                        help="processes side by side on one GPU, which one alone leaves idle (1)")  # fmt: skip
    options.add_argument(
        "--smoke", action="store_true", help="plain shapes, three methods, two steps: tries it all out"
    )
    arguments = options.parse_args()
    if arguments.seeds < 2:
        options.error(f"--seeds {arguments.seeds} must be at least 2: variety is told by two pictures of a prompt")
    effort = SMOKE
    if not arguments.smoke:
        objects = {"tuned_on": arguments.tuned_on, "reported_on": arguments.reported_on}
        effort = Effort(seeds=arguments.seeds, share_gpu=arguments.share_gpu, **objects)
    have_cluster()
    out = arguments.out.absolute() / ("smoke" if arguments.smoke else "")
    Benchmark(out, arguments.data, find_base(arguments.base), effort).run()


if __name__ == "__main__":
    main()
