"""Tests analysis/probes.py on planted directions."""

import numpy as np
import pytest

from saro_jax.analysis import probes


def states(n: int, direction: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(n) % 2
    x = np.random.default_rng(seed).normal(size=(n, len(direction)))
    return x + np.outer(y, direction), y


INTENT = np.eye(30)[0] * 5
TOPIC = np.eye(30)[1] * 5


def test_a_direction_that_is_shared_transfers():
    x, y = states(80, INTENT, 0)
    test, labels = states(60, INTENT, 1)
    found = probes.transfer(x, y, test, labels)
    assert found.auroc is not None and found.auroc > 0.97
    assert found.selectivity is not None and found.selectivity > 0.2
    probability = probes.probability(found.scores)
    assert probability[labels == 1].mean() > 0.7 > 0.3 > probability[labels == 0].mean()


def test_a_direction_that_is_another_does_not():
    x, y = states(80, INTENT, 0)
    test, labels = states(200, TOPIC, 1)
    found = probes.transfer(x, y, test, labels)
    assert found.auroc == pytest.approx(0.5, abs=0.15)
    assert found.selectivity is not None and found.selectivity < 0.1


def test_groups_that_any_direction_tells_apart_are_not_selective():
    # All of the width differs: a probe of shuffled labels ranks the tested groups as well.
    x, y = states(80, INTENT, 0)
    test, labels = states(60, np.full(30, 40.0), 1)
    found = probes.transfer(x, y, test, labels)
    assert found.auroc is not None and found.auroc > 0.97
    assert found.selectivity is not None and found.selectivity < 0.2


def test_cross_validated_holds_groups_out():
    x, y = states(80, INTENT, 0)
    groups = [f"g{i // 2}" for i in range(80)]  # a twin of either label in each
    found = probes.cross_validated(x, y, groups)
    assert found.auroc is not None and found.auroc > 0.95
    noise = probes.cross_validated(np.random.default_rng(2).normal(size=(80, 30)), y, groups)
    assert noise.auroc == pytest.approx(0.5, abs=0.15)


def test_one_class_alone_has_no_auroc():
    x, y = states(20, INTENT, 0)
    found = probes.transfer(x, y, x, np.ones(20, int))
    assert found.auroc is None and found.selectivity is None


def test_probability_is_the_logistic_function():
    scores = np.array([-800.0, -1.0, 0.0, 2.0, 800.0])
    np.testing.assert_allclose(probes.probability(scores)[1:4], 1 / (1 + np.exp(-scores[1:4])))
    assert probes.probability(scores)[0] == 0 and probes.probability(scores)[-1] == 1
