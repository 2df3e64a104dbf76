"""Tests analysis/overlap.py on planted structure and against brute force."""

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform
from scipy.stats import kstest
from sklearn.neighbors import NearestNeighbors
from test_analysis_linear import planted

from saro_jax.analysis import linear, overlap


def measured(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """(C2ST, purity, MMD², p) of two groups."""
    parts = linear.folds(y, [str(i) for i in range(len(y))])
    d = overlap.distances(linear.standardised(x))
    return (overlap.c2st(x, y, parts), overlap.knn_purity(d, y), *overlap.mmd2(d, y))


def test_separable_groups_are_told_apart_by_every_measure():
    x, y = planted(6.0)
    c2st, purity, mmd2, p = measured(x, y)
    assert c2st > 0.98
    assert purity > 0.98
    assert mmd2 > 0.1
    assert p == pytest.approx(1 / (1 + overlap.PERMUTATIONS))


def test_overlapping_groups_are_told_apart_by_none():
    found = np.array([measured(*planted(0.0, seed=seed)) for seed in range(8)])
    c2st, purity, mmd2, p = found.mean(0)
    assert abs(c2st - 0.5) < 0.05
    assert abs(purity - 0.5) < 0.03
    assert abs(mmd2) < 0.003
    assert 0.25 < p < 0.75


def test_measures_grow_with_the_gap():
    found = np.array([measured(*planted(gap))[:3] for gap in (0.0, 0.5, 1.0, 2.0)])
    assert (np.diff(found, axis=0) > 0).all()


def test_groups_that_do_not_differ_in_mean_are_seen_by_the_kernel_alone():
    x, y = planted(0.0)
    x[y == 1] *= 3.0
    c2st, _, mmd2, p = measured(x, y)
    assert c2st < 0.65
    assert mmd2 > 0
    assert p < 0.01


def test_equal_rows_say_nothing():
    y = np.array([0] * 30 + [1] * 10)
    x = np.full((40, 5), 3.7, np.float32)
    assert measured(x, y) == (0.5, pytest.approx(0.5, abs=0.02), 0.0, 1.0)
    assert overlap.centroid_cosine(x, y, x.mean(0)) == 0.0


def test_distances_are_scipys():
    x = np.random.default_rng(0).normal(size=(30, 7)) + 100
    np.testing.assert_allclose(overlap.distances(x), squareform(pdist(x, "sqeuclidean")), atol=1e-9)


def test_purity_is_that_of_brute_force_neighbours():
    x, y = planted(1.5, n=40)
    y[:20] = 0  # unequal groups
    near = NearestNeighbors(n_neighbors=10).fit(x).kneighbors(return_distance=False)
    own = (y[near] == y[:, None]).mean(1)
    want = (own[y == 0].mean() + own[y == 1].mean()) / 2
    assert overlap.knn_purity(overlap.distances(x), y) == pytest.approx(want, abs=1e-12)


def test_mmd2_is_the_double_sum_of_its_definition():
    x, y = planted(1.0, n=12)
    y[:6] = 0
    d = squareform(pdist(x, "sqeuclidean"))
    kernel = np.exp(-d / np.median(pdist(x, "sqeuclidean")))
    ones, zeros = np.flatnonzero(y == 1), np.flatnonzero(y == 0)

    def within(rows):
        return np.mean([kernel[i, j] for i in rows for j in rows if i != j])

    want = within(ones) + within(zeros) - 2 * np.mean([kernel[i, j] for i in ones for j in zeros])
    assert overlap.mmd2(d, y)[0] == pytest.approx(want, abs=1e-12)


def test_p_values_are_uniform_where_nothing_differs():
    p = []
    for seed in range(60):
        x, y = planted(0.0, n=15, width=4, seed=seed)
        p.append(overlap.mmd2(overlap.distances(x), y, seed, 99)[1])
    assert kstest(p, "uniform").pvalue > 0.01


def test_centroid_cosine_by_hand():
    x = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    y = np.array([0, 0, 1, 1])  # means (2, 0) and (1, 2)
    assert overlap.centroid_cosine(x, y, np.zeros(2)) == pytest.approx(2 / (2 * 5**0.5))
    assert overlap.centroid_cosine(x, y, np.array([1.5, 1.0])) == pytest.approx(-1)


def test_every_pair_of_groups_is_compared_in_every_layer():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(90, 3, 12)).astype(np.float32)
    groups = {name: np.arange(90)[i::3] for i, name in enumerate(("a", "b", "c"))}
    states[groups["c"], 2] += 3  # c stands apart in the last layer alone
    tokens = np.full(90, 7)
    tokens[groups["b"]] = 9  # and b by its length
    found = overlap.compare(
        "m", states, groups, [str(i) for i in range(90)], tokens, layers=(0, 2), permutations=50
    )
    by = {(one.layer, *one.groups): one for one in found}
    assert len(by) == len(found) == 6
    assert {one.n for one in found} == {(30, 30)}
    assert by[2, "a", "c"].c2st > 0.95 and by[2, "a", "c"].p < 0.05
    assert by[2, "a", "c"].centroid_cosine < -0.9
    assert by[0, "a", "c"].c2st < 0.7 and by[2, "a", "b"].c2st < 0.7
    assert by[0, "a", "b"].c2st_length == 1.0 and by[0, "a", "c"].c2st_length == 0.5
