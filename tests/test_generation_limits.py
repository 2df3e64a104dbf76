"""Rates in a sliding window, against a count of every window; budgets with what is under way."""

import random

import pytest

from saro_jax.generation import limits
from saro_jax.generation.limits import Budget, Rate, Use


@pytest.mark.parametrize("seed", range(5))
def test_no_window_ever_holds_more_than_the_rate(seed: int):
    rng, now = random.Random(seed), [0.0]
    rate = Rate(100, 60.0, lambda: now[0])
    taken: list[tuple[float, int]] = []
    for _ in range(200):
        now[0] += rng.random() * 5
        units = rng.randint(1, 60)
        while (delay := rate.wait(units)) > 0:
            now[0] += delay
        rate.take(units)
        taken.append((now[0], units))
    for at, _ in taken:
        assert sum(units for when, units in taken if at - 60 < when <= at) <= 100
    # And it waits no longer than it must: the window is nearly full much of the time.
    assert now[0] < sum(units for _, units in taken) / 100 * 60 * 1.6


def test_what_is_larger_than_the_rate_goes_alone():
    now = [0.0]
    rate = Rate(10, 60.0, lambda: now[0])
    assert rate.wait(50) == 0
    rate.take(50)
    assert rate.wait(1) == pytest.approx(60)
    now[0] = 60.0
    assert rate.wait(50) == 0
    assert Rate(None).wait(1e9) == 0


def test_a_budget_counts_what_is_under_way():
    budget = Budget(3, None, None)
    one = Use(1, 10, 0.5)
    budget.used, budget.reserved = Use(1, 10, 0.5), Use(1, 99, 9.0)
    assert budget.room(one) and not budget.room(one + one)
    assert budget.complaint(one) is None  # what is reserved may not be used
    budget.used = Use(3, 1, 1.0)
    said = budget.complaint(one)
    assert said and said.startswith("server.max_requests=3: 3 are used, and one more request")
    assert not Budget(None, 5, None).room(one) and not Budget(None, None, 0.4).room(one)
    assert Budget(1, 10, 0.5).room(one) and one - one == Use()


def test_cost_is_per_million():
    assert limits.cost(1000, 500, 2.5, 10.0) == pytest.approx(0.0075)
