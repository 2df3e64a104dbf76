"""Probes: is harmful intent written in a hidden state so that a linear reader finds it?

Legend: N prompts that are fitted, M that are tested, D hidden width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saro_jax.analysis import linear
from saro_jax.analysis.results import Probe

CONTROLS = 5  # probes on random labels
SMALLEST = 5  # prompts of a group that is read
TRAINED = "harmful|benign"
# What the probe has not seen: disguised harm against what only looks like it.
DISGUISED = (("jailbreak", "borderline"), ("jailbreak", "wrapped"), ("harmful", "borderline"))


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


def compare(
    model: str,
    position: str,
    states_NLD: np.ndarray,
    groups: Mapping[str, np.ndarray],
    bases: list[str],
    *,
    layers: Sequence[int],
    seed: int = 0,
) -> list[Probe]:
    """Probes of each layer, fitted on harmful against benign, read on these and on disguises.

    groups: rows of states by name; what is missing or smaller than SMALLEST is left out.
    """
    known = {name: rows for name, rows in groups.items() if len(rows) >= SMALLEST}
    if not {"harmful", "benign"} <= set(known):
        return []
    fitted = np.concatenate([known["benign"], known["harmful"]])
    y_N = np.repeat([0, 1], [len(known["benign"]), len(known["harmful"])])
    names = [bases[i] for i in fitted]
    found = []
    for layer in layers:
        x_ND = states_NLD[fitted, layer]
        own = cross_validated(x_ND, y_N, names, seed)
        shift = {"benign": own.scores[y_N == 0], "harmful": own.scores[y_N == 1]}
        found.append(_probe(model, layer, position, TRAINED, own, shift, len(y_N)))
        for harmful, harmless in DISGUISED:
            if not {harmful, harmless} <= set(known):
                continue
            rows = np.concatenate([known[harmless], known[harmful]])
            y_M = np.repeat([0, 1], [len(known[harmless]), len(known[harmful])])
            read = transfer(x_ND, y_N, states_NLD[rows, layer], y_M, seed)
            shift = {harmless: read.scores[y_M == 0], harmful: read.scores[y_M == 1]}
            test = f"{harmful}|{harmless}"
            found.append(_probe(model, layer, position, test, read, shift, len(y_M)))
    return found


def _probe(
    model: str,
    layer: int,
    position: str,
    test: str,
    read: Reading,
    shift: Mapping[str, np.ndarray],
    n: int,
) -> Probe:
    return Probe(
        model=model,
        layer=layer,
        position=position,
        train=TRAINED,
        test=test,
        auroc=read.auroc,
        selectivity=read.selectivity,
        shift={name: float(probability(scores).mean()) for name, scores in shift.items()},
        n=n,
    )
