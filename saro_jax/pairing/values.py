"""Step values: how often continuations from the end of a step turn out well, and where it turns."""

import itertools
from collections.abc import Sequence

from scipy import special

from saro_jax.records import StepValue, content_id

LEVEL = 0.95


def step_value(trace_id: str, step: int, good: int, total: int) -> StepValue:
    """The value after a step out of `total` continuations, `good` of them good.

    v is the mean of the posterior under a uniform prior, Beta(1 + good, 1 + bad); ci its central
    95 % interval.
    """
    a, b = 1 + good, 1 + total - good
    low, high = special.betaincinv(a, b, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return StepValue(
        id=content_id("value", trace_id, step, good, total),
        parent_ids=(trace_id,),
        trace_id=trace_id,
        step=step,
        n_roll=total,
        n_good=good,
        v=round(a / (a + b), 4),
        ci=(round(float(low), 4), round(float(high), 4)),
    )


def first_risky(values: Sequence[float], low: float = 0.5, drop: float = 0.25) -> int | None:
    """The first step whose value is below `low` and at least `drop` below that before it.

    Values are shares of good continuations: values[0] the prompt's, values[i + 1] that after step
    i. None where the value never falls so.
    """
    for step, (before, after) in enumerate(itertools.pairwise(values)):
        if after < low and before - after >= drop:
            return step
    return None
