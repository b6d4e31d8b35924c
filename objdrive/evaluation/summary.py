"""From scores of pictures to figures of methods: means over objects, with intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from objdrive.evaluation.layout import Box, spread
from objdrive.evaluation.scores import Array, Statistic, bootstrap_interval


@dataclass(frozen=True)
class Figure:
    """One figure of one method: its value, the ends of its interval over objects, and how many objects it is of."""

    value: float
    low: float
    high: float
    objects: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Trade:
    """Two metrics that a method trades against each other, each of one encoder: ``(encoder, metric)``."""

    name: str
    fidelity: tuple[str, str]
    generalization: tuple[str, str]


def per_object(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[tuple[str, str]], *, kind: str | None = None
) -> dict[str, Array]:
    """Object id -> (M,) means over an object's pictures.

    Every object counts alike, however many pictures it has; objects without some metric are left out.

    Args:
        rows: scores of one method, with the columns object_id, kind, encoder and the metrics.
        metrics: M pairs of encoder and metric.
        kind: only pictures of prompts of this kind.
    """
    sums: dict[str, list[list[float]]] = {}
    for row in rows:
        if kind in (None, row["kind"]):
            lists = sums.setdefault(row["object_id"], [[] for _ in metrics])
            for (encoder, metric), values in zip(metrics, lists, strict=True):
                if row["encoder"] == encoder and row[metric] is not None:
                    values.append(row[metric])
    return {one: np.array([np.mean(v) for v in lists]) for one, lists in sorted(sums.items()) if all(lists)}


def spread_per_object(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Object id -> how differently its pictures of one prompt are laid out, the mean over prompts (`layout.spread`).

    Args:
        rows: scores of one method, with the columns object_id, prompt_id, number, and box: its four values in order, or
            None where nothing was seen. Prompts with fewer than two pictures that show something are left out.
    """
    boxes: dict[tuple[str, str], dict[int, Box]] = {}
    for row in rows:
        if row["box"]:
            boxes.setdefault((row["object_id"], row["prompt_id"]), {})[row["number"]] = Box(*row["box"])
    return _means((one, spread(list(found.values()))) for (one, _), found in boxes.items() if len(found) > 1)


def difference_per_object(rows: Sequence[Mapping[str, Any]], encoder: str) -> dict[str, float]:
    """Object id -> how differently its pictures of one prompt look: one minus the cosine, the mean over pairs of seeds.

    Args:
        rows: scores of one method, with the columns object_id, prompt_id, encoder and features. Prompts with one
            picture are left out.
        encoder: whose features.
    """
    found: dict[tuple[str, str], list[Array]] = {}
    for row in rows:
        if row["encoder"] == encoder:
            found.setdefault((row["object_id"], row["prompt_id"]), []).append(row["features"])
    return _means((one, _apart(np.stack(features))) for (one, _), features in found.items() if len(features) > 1)


def _apart(features: Array) -> float:
    """The mean of one minus the cosine over all pairs of features (N, D) of unit length."""
    cosines = features @ features.T
    return float(np.mean(1 - cosines[np.triu_indices(len(features), 1)]))


def mean_per_object(
    rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]
) -> dict[str, float]:
    """Object id -> the mean over its pictures of what `value` makes of their scores; None does not count."""
    return _means((row["object_id"], one) for row in rows if (one := value(row)) is not None)


def _means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Object id -> the mean of its values."""
    found: dict[str, list[float]] = {}
    for object_id, value in values:
        found.setdefault(object_id, []).append(value)
    return {one: float(np.mean(own)) for one, own in sorted(found.items())}


def variety(ours: Mapping[str, float], bases: Mapping[str, float]) -> dict[str, float]:
    """Object id -> how different its pictures are against the base's own for the class word, at most 1.

    More than the base's own is no merit, and one picture for all seeds has none.
    """
    return {one: min(1.0, value / bases[one]) for one, value in ours.items() if bases.get(one)}


def figure(means: Mapping[str, Array], statistic: Statistic | None = None) -> Figure | None:
    """A figure of `per_object` means (one, or as many as the statistic takes); None if there are no objects."""
    if not means:
        return None
    values = np.stack(list(means.values()))
    whole = values.mean(axis=0, keepdims=True)
    value = whole[0, 0] if statistic is None else statistic(whole)[0]
    return Figure(float(value), *bootstrap_interval(values, statistic), len(values))


def difference(ours: Mapping[str, Array], theirs: Mapping[str, Array], statistic: Statistic | None = None) -> Figure:
    """How much larger a figure is for one method than for another, over the objects of both.

    The pictures are paired (same objects, prompts and seeds), so the interval is far narrower than those of the two.

    Raises:
        ValueError: they have no objects in common.
    """
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise ValueError("the methods have no objects in common")
    width = len(ours[common[0]])
    values = np.stack([np.concatenate([ours[one], theirs[one]]) for one in common])
    of_means: Statistic = statistic or (lambda means: means[:, 0])

    def gain(means: Array) -> Array:
        result: Array = of_means(means[:, :width]) - of_means(means[:, width:])
        return result

    value = gain(values.mean(axis=0, keepdims=True))[0]
    return Figure(float(value), *bootstrap_interval(values, gain), len(common))
