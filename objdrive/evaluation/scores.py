"""The arithmetic of measuring, as pure functions: similarities, intervals, the front of the best trades."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

Array = NDArray[np.floating]
Statistic = Callable[[Array], Array]
"""(R, M) means of M figures -> (R,) values."""


def unit(features: Array) -> Array:
    """Features (..., D) at length 1.

    Raises:
        ValueError: one of them has no length, so no direction either.
    """
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    if not (lengths > 0).all():
        raise ValueError("features without a length: the encoder gave zeros, or values that are not numbers")
    scaled: Array = features / lengths
    return scaled


def centres(features: Array, cells: NDArray[np.intp], shape: tuple[int, ...]) -> Array:
    """(rows, columns, D): directions of the means of features (N, D) in their cells (N, 2) of a table."""
    sums = np.zeros((*shape, features.shape[1]), np.float32)
    np.add.at(sums, tuple(cells.T), features)
    return unit(sums)


def best_match(windows: Array, views: Array) -> Array:
    """(...,): cosine of the window and the view that agree most, of windows (..., W, D) and views (V, D), unit."""
    found: Array = (windows @ views.T).max(axis=(-2, -1))
    return found


def bootstrap_interval(
    values: Array,
    statistic: Statistic | None = None,
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> tuple[float, float]:
    """BCa interval of a statistic of means, over objects drawn again with replacement (Efron, 1987).

    Args:
        values: (N, M), M figures of each of N objects.
        statistic: of the M means; default: the first mean.
        level: share of repeated experiments whose interval holds the true value, if there are enough objects.
        resamples: how many.
        seed: of the draws; the same values and seed give the same interval.

    Returns:
        Its ends. It has no width where all objects agree, or there is but one.

    Raises:
        ValueError: no values.
    """
    if values.ndim != 2 or not len(values):
        raise ValueError(f"expected values (N, M) of at least one object, got shape {values.shape}")
    count = len(values)
    of_means: Statistic = statistic or (lambda means: means[:, 0])

    def of_objects(drawn: NDArray[np.intp], axis: int) -> Array:
        means = values[drawn].mean(axis=-2)
        found: Array = of_means(means.reshape(-1, values.shape[1])).reshape(drawn.shape[:-1])
        return found

    everything = np.arange(count)
    if count == 1:
        point = float(of_objects(everything[None], -1)[0])
        return point, point
    without_one = np.array([np.delete(everything, one) for one in everything])
    # BCa divides by the spread of these.
    method = "BCa" if np.ptp(of_objects(without_one, -1)) > 1e-12 else "percentile"
    options = {"confidence_level": level, "n_resamples": resamples, "vectorized": True, "batch": 1000}
    found = bootstrap((everything,), of_objects, method=method, rng=np.random.default_rng(seed), **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def scalarise(points: Array) -> Array:
    """(...,): harmonic mean of figures (..., K) in [0, 1], which is high only if all are."""
    found = (points > 0).all(axis=-1)
    inverse = (1 / np.where(points > 0, points, 1)).mean(axis=-1)
    means: Array = np.where(found, 1 / inverse, 0.0)
    return means


def pareto_front(points: Array) -> NDArray[np.bool_]:
    """(N,): which points (N, K) are on the front: no other is at least as large on every axis and larger on one."""
    no_worse = (points[None, :, :] >= points[:, None, :]).all(axis=-1)
    better = (points[None, :, :] > points[:, None, :]).any(axis=-1)
    front: NDArray[np.bool_] = np.logical_not(np.logical_and(no_worse, better).any(axis=-1))
    return front
