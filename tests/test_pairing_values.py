"""Step values against scipy's Beta distribution; the first risky step."""

import pytest
from scipy import stats

from saro_jax.pairing import values


@pytest.mark.parametrize(("good", "total"), [(0, 4), (2, 4), (4, 4), (0, 0), (7, 16)])
def test_values_are_the_posterior_of_a_uniform_prior(good, total):
    found = values.step_value("t", 2, good, total)
    posterior = stats.beta(1 + good, 1 + total - good)
    assert found.v == pytest.approx(posterior.mean(), abs=5e-5)
    assert found.ci == pytest.approx(posterior.interval(0.95), abs=5e-5)
    assert (found.n_good, found.n_roll, found.step, found.trace_id) == (good, total, 2, "t")


@pytest.mark.parametrize(
    ("shares", "step"),
    [
        ([0.75, 0.75, 0.25, 0.0], 1),
        ([0.75, 0.5, 0.25], 1),  # 0.5 is not below 0.5
        ([0.75, 0.6, 0.45, 0.3], None),  # a slope, no drop
        ([0.25, 0.0], 0),
        ([0.0, 0.0], None),
        ([1.0], None),
    ],
)
def test_the_first_risky_step(shares, step):
    assert values.first_risky(shares) == step
