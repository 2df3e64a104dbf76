"""Agreement of judges: against counts done by hand and against the formulas' closed forms."""

import math

import numpy as np
import pytest

from saro_jax.judging.agreement import accuracy, confusion, kappa, precision, recall


def labels(counts: list[list[int]]) -> tuple[list[int], list[int]]:
    """(truth, judged) with these counts."""
    pairs = [(i, j) for i, row in enumerate(counts) for j, n in enumerate(row) for _ in range(n)]
    return [i for i, _ in pairs], [j for _, j in pairs]


@pytest.mark.parametrize("seed", range(5))
def test_against_matrix_formulas(seed: int):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 30, (3, 3))
    truth, judged = labels(counts.tolist())
    assert confusion(truth, judged, [0, 1, 2]) == counts.tolist()
    p = counts / counts.sum()
    observed, chance = np.trace(p), p.sum(0) @ p.sum(1)
    assert accuracy(truth, judged) == pytest.approx(observed, abs=1e-12)
    assert kappa(truth, judged) == pytest.approx((observed - chance) / (1 - chance), abs=1e-12)
    assert kappa(judged, truth) == pytest.approx(kappa(truth, judged), abs=1e-12)
    for label in range(3):
        got = recall(truth, judged, label), precision(truth, judged, label)
        want = (
            counts[label, label] / counts[label].sum(),
            counts[label, label] / counts[:, label].sum(),
        )
        assert got == pytest.approx(want, abs=1e-12)


def test_a_table_of_the_literature():
    # 20 + 15 of 50 equal, chance one half (the usual worked example): kappa 0.4.
    truth, judged = labels([[20, 5], [10, 15]])
    assert accuracy(truth, judged) == pytest.approx(0.7)
    assert kappa(truth, judged) == pytest.approx(0.4)


def test_the_ends():
    assert kappa("ab", "ab") == 1.0
    assert kappa("ab", "ba") == -1.0
    assert kappa("aabb", "abab") == 0.0
    assert all(math.isnan(x) for x in (accuracy([], []), kappa([], []), kappa("aa", "aa")))
    assert math.isnan(recall("aa", "ab", "b"))


def test_wrong_input():
    with pytest.raises(ValueError, match="2 labels and 1 judgments"):
        confusion("ab", "a", "ab")
    with pytest.raises(ValueError, match=r"label 'c'; allowed: \['a', 'b'\]"):
        confusion("ab", "ac", ["a", "b"])
