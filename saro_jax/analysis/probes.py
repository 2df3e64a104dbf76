"""Probes: is harmful intent written in a hidden state so that a linear reader finds it?

Legend: N prompts that are fitted, M that are tested, D hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saro_jax.analysis import linear

CONTROLS = 5  # probes on random labels


@dataclass(frozen=True)
class Reading:
    """What a probe says: AUROC on the tested rows, the controls' AUROC, log-odds of harm [M]."""

    auroc: float | None
    control: float | None
    scores: np.ndarray

    @property
    def selectivity(self) -> float | None:
        """AUROC above that of probes on random labels."""
        if self.auroc is None or self.control is None:
            return None
        return self.auroc - self.control


def transfer(
    x_ND: np.ndarray, y_N: np.ndarray, test_MD: np.ndarray, y_M: np.ndarray, seed: int = 0
) -> Reading:
    """A probe fitted on some rows and read on others.

    The control is the mean of max(AUROC, 1 - AUROC) of probes fitted on shuffled labels: what any
    direction tells where the tested groups lie far apart (after Hewitt and Liang 2019).
    """
    scores = linear.decide(x_ND, y_N, test_MD)
    rng = np.random.default_rng(seed)
    found = [
        linear.auroc(linear.decide(x_ND, rng.permutation(y_N), test_MD), y_M)
        for _ in range(CONTROLS)
    ]
    return Reading(linear.auroc(scores, y_M), _folded(found), scores)


def cross_validated(
    x_ND: np.ndarray, y_N: np.ndarray, groups: Sequence[str], seed: int = 0
) -> Reading:
    """A probe read on the rows it was fitted on, each by folds that hold its whole group out."""
    parts = linear.folds(y_N, groups, seed)
    scores = linear.held_out(x_ND, y_N, parts)
    rng = np.random.default_rng(seed)
    found = [
        linear.auroc(linear.held_out(x_ND, rng.permutation(y_N), parts), y_N)
        for _ in range(CONTROLS)
    ]
    return Reading(linear.auroc(scores, y_N), _folded(found), scores)


def probability(scores: np.ndarray) -> np.ndarray:
    """Log-odds as probabilities."""
    return 0.5 * (1 + np.tanh(scores / 2))


def _folded(found: Sequence[float | None]) -> float | None:
    known = [max(one, 1 - one) for one in found if one is not None]
    return float(np.mean(known)) if known else None
