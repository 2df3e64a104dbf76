"""Tests analysis/linear.py against scipy, and on planted structure."""

import importlib.util

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import mannwhitneyu

from saro_jax.analysis import linear


def planted(gap: float, n: int = 60, width: int = 20, seed: int = 0):
    """Two Gaussian groups, their means `gap` apart in half of the dimensions; labels."""
    rng = np.random.default_rng(seed)
    y = np.arange(2 * n) % 2
    x = rng.normal(size=(2 * n, width))
    x[:, ::2] += gap * y[:, None]
    return x, y


def test_standardised_has_no_scale_and_constant_features_are_zero():
    x = np.random.default_rng(0).normal(size=(50, 3)) * [1, 1000, 0] + [0, 5, 7.3]
    z = linear.standardised(x)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(z.std(0), [1, 1, 0], atol=1e-12)


@pytest.mark.parametrize("width", [4, 200])
def test_decide_is_the_minimum_of_the_penalised_likelihood(width: int):
    x, y = planted(1.0, n=20, width=width)
    y[:6] = 0  # classes of different size weigh the same
    strength = 0.1 * width
    z = linear.standardised(x)
    weight = np.where(y == 1, len(y) / (2 * y.sum()), len(y) / (2 * (1 - y).sum()))

    def loss(theta):
        score = z @ theta[1:] + theta[0]
        nll = weight * np.logaddexp(0, np.where(y == 1, -score, score))
        gradient = weight * (1 / (1 + np.exp(-score)) - y)
        slope = 0.1 * z.T @ gradient + theta[1:]
        value = 0.1 * nll.sum() + theta[1:] @ theta[1:] / 2
        return value, np.concatenate([[0.1 * gradient.sum()], slope])

    best = minimize(loss, np.zeros(1 + width), jac=True, method="L-BFGS-B", tol=1e-14).x
    np.testing.assert_allclose(
        linear.decide(x, y, x, strength), z @ best[1:] + best[0], rtol=0, atol=1e-3
    )


def test_folds_hold_whole_groups_out_and_cover_all():
    y = np.array([0, 1] * 30)
    groups = [f"g{i // 3}" for i in range(60)]
    parts = linear.folds(y, groups, seed=1)
    assert len(parts) == linear.FOLDS
    assert sorted(np.concatenate(parts)) == list(range(60))
    for test in parts:
        inside = {groups[i] for i in test}
        assert inside.isdisjoint(groups[i] for i in range(60) if i not in test)


def test_folds_need_two_groups_a_class():
    with pytest.raises(ValueError, match="two groups"):
        linear.folds(np.array([0, 0, 1, 1]), ["a", "b", "c", "c"])


def test_copies_of_a_group_do_not_leak_into_its_test():
    # Each group is one point and its near copies, with a label that means nothing.
    rng = np.random.default_rng(0)
    centres, labels = rng.normal(size=(40, 60)), np.arange(40) % 2
    x = np.repeat(centres, 4, 0) + 0.01 * rng.normal(size=(160, 60))
    y, names = np.repeat(labels, 4), np.repeat([f"g{i}" for i in range(40)], 4)
    leaky = linear.folds(y, [str(i) for i in range(160)])
    honest = linear.folds(y, list(names))
    assert linear.balanced_accuracy(linear.held_out(x, y, leaky, 40.0), y) > 0.95
    assert linear.balanced_accuracy(linear.held_out(x, y, honest, 40.0), y) < 0.65


def test_balanced_accuracy_by_hand():
    scores, y = np.array([1.0, -1.0, 0.0, 2.0, -3.0]), np.array([1, 1, 0, 0, 0])
    assert linear.balanced_accuracy(scores, y) == pytest.approx((1 / 2 + (0.5 + 0 + 1) / 3) / 2)


def test_auroc_is_the_mann_whitney_statistic():
    rng = np.random.default_rng(0)
    scores, y = np.round(rng.normal(size=80), 1), rng.integers(0, 2, 80)  # rounded: ties
    u = mannwhitneyu(scores[y == 1], scores[y == 0]).statistic
    assert linear.auroc(scores, y) == pytest.approx(u / (y.sum() * (1 - y).sum()), abs=1e-12)
    assert linear.auroc(scores, np.ones(80)) is None


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    linear.check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'saro_jax\[analysis\]'"):
        linear.check()
