"""The arithmetic of measuring, against cases that can be worked out otherwise."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from objdrive.evaluation.scores import best_match, bootstrap_interval, pareto_front, scalarise, unit
from objdrive.evaluation.summary import difference, figure, per_object


def test_features_are_brought_to_length_one():
    assert np.allclose(unit(np.array([[3.0, 4.0], [0.0, -2.0]])), [[0.6, 0.8], [0, -1]])


@pytest.mark.parametrize("feature", [0.0, float("nan")])
def test_features_without_direction_are_refused(feature):
    with pytest.raises(ValueError, match="without a length"):
        unit(np.array([[1.0, 0.0], [feature, 0.0]]))


def test_the_best_match_is_the_largest_cosine_of_all_pairs():
    rng = np.random.default_rng(0)
    windows, views = unit(rng.standard_normal((3, 4, 5))), unit(rng.standard_normal((6, 5)))
    expected = [max(float(w @ v) for w, v in itertools.product(some, views)) for some in windows]
    assert np.allclose(best_match(windows, views), expected)


def _binomial_quantile(count, chance, level):
    total = 0.0
    for hits in range(count + 1):
        total += math.comb(count, hits) * chance**hits * (1 - chance) ** (count - hits)
        if total >= level:
            return hits / count
    raise AssertionError


@pytest.mark.parametrize("hits", [13, 16, 18])
def test_the_interval_of_a_share_is_bca_of_the_binomial_distribution(hits):
    # The mean of 20 zeros and ones drawn again is binomial, so that BCa (Efron, 1987) can be computed exactly.
    values = np.array([1.0] * hits + [0.0] * (20 - hits))
    chance, normal = hits / 20, NormalDist()
    below = sum(math.comb(20, k) * chance**k * (1 - chance) ** (20 - k) for k in range(hits))
    bias = normal.inv_cdf(below + math.comb(20, hits) * chance**hits * (1 - chance) ** (20 - hits) / 2)
    left_out = np.array([np.delete(values, one).mean() for one in range(20)])
    pulls = left_out.mean() - left_out
    acceleration = (pulls**3).sum() / (6 * (pulls**2).sum() ** 1.5)

    def end(level):
        reach = bias + normal.inv_cdf(level)
        return _binomial_quantile(20, chance, normal.cdf(bias + reach / (1 - acceleration * reach)))

    expected = end(0.025), end(0.975)
    assert bootstrap_interval(values[:, None], resamples=40_000) == pytest.approx(expected)


def test_where_objects_agree_or_are_one_the_interval_has_no_width():
    assert bootstrap_interval(np.full((6, 1), 0.25)) == (0.25, 0.25)
    assert bootstrap_interval(np.array([[0.7]])) == (0.7, 0.7)


def test_an_interval_is_finite_where_leaving_one_out_changes_nothing():
    # Either object alone scores 0, both together 0.5.
    low, high = bootstrap_interval(np.eye(2), scalarise)
    assert (low, high) == pytest.approx((0, 0.5))


def test_the_interval_of_many_objects_is_the_normal_one():
    values = np.random.default_rng(1).normal(0.4, 0.1, (500, 1))
    reach = 1.96 * values.std() / math.sqrt(500)
    assert bootstrap_interval(values, resamples=20_000) == pytest.approx(
        (values.mean() - reach, values.mean() + reach), abs=2e-4
    )


def test_the_interval_of_a_statistic_resamples_whole_objects():
    # Two figures of an object that add up to one: their sum has no spread, unless they are drawn apart.
    share = np.random.default_rng(2).random(12)
    values = np.stack([share, 1 - share], axis=1)
    assert bootstrap_interval(values, lambda means: means.sum(axis=1)) == pytest.approx((1, 1))


def test_the_same_seed_gives_the_same_interval_and_another_a_like_one():
    values = np.random.default_rng(3).random((30, 1))
    first = bootstrap_interval(values, seed=1)
    assert first == bootstrap_interval(values, seed=1)
    assert first != bootstrap_interval(values, seed=2)
    assert first == pytest.approx(bootstrap_interval(values, seed=2), abs=0.01)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one object"):
        bootstrap_interval(np.zeros((0, 1)))


def test_scalarised_is_the_harmonic_mean():
    points = np.array([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0], [0.0, 0.0]])
    assert np.allclose(scalarise(points), [0.5, 0.18, 0, 0])
    assert np.allclose(scalarise(np.array([[0.5, 1.0, 0.25], [0.5, 1.0, 0.0]])), [3 / 7, 0])


def test_the_front_holds_what_no_point_dominates():
    points = np.array([[0.9, 0.1], [0.5, 0.5], [0.4, 0.5], [0.1, 0.9], [0.5, 0.5], [0.05, 0.9]])
    assert pareto_front(points).tolist() == [True, True, False, True, True, False]


def test_the_front_agrees_with_its_definition_on_random_points():
    points = np.random.default_rng(4).integers(0, 5, (60, 2)) / 4
    dominated = [any(all(q >= p) and any(q > p) for q in points) for p in points]
    assert pareto_front(points).tolist() == [not one for one in dominated]


def _row(object_id, value, *, kind="context", encoder="imagenet"):
    return {"object_id": object_id, "kind": kind, "encoder": encoder, "context": value, "object": 0.5}


def test_every_object_counts_alike_however_many_pictures_it_has():
    rows = [_row("a", 1.0), _row("a", 1.0), _row("a", 1.0), _row("b", 0.0)]
    found = figure(per_object(rows, [("imagenet", "context")]))
    assert (found.value, found.objects) == (0.5, 2)


def test_other_kinds_encoders_and_missing_values_do_not_count():
    rows = [_row("a", 1.0), _row("a", 0.0, kind="style"), _row("a", 0.0, encoder="clip"), _row("b", None)]
    assert per_object(rows, [("imagenet", "context")], kind="context") == {"a": [1.0]}
    assert figure(per_object(rows, [("dino", "context")])) is None


def test_a_difference_is_paired_by_object():
    # Objects differ widely, methods by a constant: only pairing sees that nothing of it is chance.
    theirs = {str(number): np.array([value]) for number, value in enumerate(np.linspace(0, 0.8, 20))}
    ours = {one: value + 0.1 for one, value in theirs.items()} | {"unpaired": np.array([0.0])}
    found = difference(ours, theirs)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.objects == 20


def test_a_difference_of_scalarised_trades_is_that_of_their_means():
    ours = {"a": np.array([1.0, 0.2]), "b": np.array([0.6, 0.4])}
    theirs = {"a": np.array([0.1, 0.9]), "b": np.array([0.3, 0.7])}
    expected = 2 * 0.8 * 0.3 / 1.1 - 2 * 0.2 * 0.8 / 1.0
    assert difference(ours, theirs, scalarise).value == pytest.approx(expected)


def test_methods_without_common_objects_cannot_be_compared():
    with pytest.raises(ValueError, match="no objects in common"):
        difference({"a": np.array([1.0])}, {"b": np.array([1.0])})
