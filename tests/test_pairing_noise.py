"""Noise of pairs: by the judges' own doubt, and by an audit."""

import numpy as np
import pytest

from saro_jax.pairing import noise


def test_the_formula_is_the_chance_of_a_reversed_order():
    # Two independent coins: chosen is unsafe with a, rejected safe with b; equals are a toss.
    rng = np.random.default_rng(0)
    a, b, n = 0.15, 0.3, 400_000
    w_unsafe, l_unsafe = rng.random(n) < a, rng.random(n) >= b
    reversed_ = (w_unsafe & ~l_unsafe) | ((w_unsafe == l_unsafe) & (rng.random(n) < 0.5))
    assert noise.pair_noise(a, 1 - b) == pytest.approx(reversed_.mean(), abs=3e-3)


def test_noise_is_a_valid_smoothing_whatever_is_judged():
    assert noise.pair_noise(None, 0.9) == 0
    assert noise.pair_noise(0.0, 1.0) == 0
    assert noise.pair_noise(0.9, 0.1) == noise.MOST < 0.5


def test_audits_by_category_are_drawn_towards_all():
    rows = [("P5", "safe", "unsafe")] * 10 + [("P5", "safe", "safe")] * 10
    rows += [("P1", "safe", "safe")] * 78 + [("P1", "unsafe", "unsafe")] * 8
    flips = noise.audited(rows)
    overall = 11 / 100
    assert flips.safe[""] == pytest.approx(overall)
    assert flips.safe["P5"] == pytest.approx((10 + 10 * overall) / 30)
    assert flips.safe["P1"] == pytest.approx(10 * overall / 88)
    assert flips.unsafe[""] == pytest.approx(1 / 10)
    assert noise.audited_noise(flips, "P5") == pytest.approx((flips.safe["P5"] + 0.1) / 2, abs=1e-4)
    assert noise.audited_noise(flips, "P9") == pytest.approx((overall + 0.1) / 2, abs=1e-4)


def test_a_wrong_audit_is_named():
    with pytest.raises(ValueError, match=r"a:3: human: 'bad'; allowed: safe, unsafe"):
        noise.audit_row("a:3", {"judged": "safe", "human": "bad"})
