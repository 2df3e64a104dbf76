"""Linear classifiers on hidden states: L2-logistic, scored on held-out groups of prompts.

Legend: N prompts, D hidden width, F folds. scikit-learn (the extra `analysis`) does the fitting.
"""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

FOLDS = 5
STRENGTH = 4.0  # inverse of the penalty, times the number of features: the same at any width


def check() -> None:
    """Refuse, before anything is computed, where scikit-learn is missing."""
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError("scikit-learn is not installed: pip install 'saro_jax[analysis]'")


@cache
def _threads() -> Any:
    import sklearn.linear_model  # noqa: F401 - the libraries that are loaded by then are limited
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small are faster on one thread, and sums then come out in the same order."""
    with _threads().limit(limits=1):
        yield


def standardised(x_ND: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """Each feature less its mean, by its deviation (of `like`, where given); constant ones are 0.

    A handful of hidden dimensions of a language model are a hundred times larger than the others,
    and would be all that a distance or a penalty sees.
    """
    like = x_ND if like is None else like
    mean, deviation = like.mean(0, dtype=np.float64), like.std(0, dtype=np.float64)
    flat = deviation <= 1e-6 * np.maximum(np.abs(mean), 1e-12)
    return (x_ND - mean) * np.where(flat, 0.0, 1.0 / np.where(flat, 1.0, deviation))


@one_thread()
def decide(
    x_ND: np.ndarray, y_N: np.ndarray, test_MD: np.ndarray, strength: float = STRENGTH
) -> np.ndarray:
    """Log-odds of class 1 for the test rows [M], of a logistic regression fitted on x and y.

    Minimises |w|² / 2 + C times the summed loss, C = strength / D. Both classes weigh the same;
    features are standardised by the rows that are fitted.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    fitted, tested = standardised(x_ND), standardised(test_MD, x_ND)
    # The weights lie in the span of the rows, where there are fewer coordinates than features.
    if x_ND.shape[1] > len(x_ND):
        basis = np.linalg.qr(fitted.T)[0]
        fitted, tested = fitted @ basis, tested @ basis
    model = LogisticRegression(
        C=strength / x_ND.shape[1], class_weight="balanced", tol=1e-6, max_iter=1000
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # then it is nearly there
        return model.fit(fitted, y_N).decision_function(tested)


def folds(y_N: np.ndarray, groups: Sequence[str], seed: int = 0) -> list[np.ndarray]:
    """Test rows of each fold; a group is in one fold, classes are spread as evenly as groups allow.

    As many as there are groups in the smaller class, at most FOLDS; ValueError below two.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    names = np.asarray(groups)
    count = min(FOLDS, *(len(set(names[y_N == label])) for label in (0, 1)))
    if count < 2:
        raise ValueError("cross-validation needs two groups of prompts in each class")
    splits = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    return [test for _, test in splits.split(np.zeros((len(y_N), 1)), y_N, names)]


def held_out(
    x_ND: np.ndarray,
    y_N: np.ndarray,
    parts: Sequence[np.ndarray],
    strength: float = STRENGTH,
) -> np.ndarray:
    """Log-odds of class 1 [N], each row's by a classifier that has not seen its fold."""
    scores = np.zeros(len(y_N))
    for test in parts:
        train = np.ones(len(y_N), bool)
        train[test] = False
        if len(set(y_N[train])) == 2:  # else nothing is known, and 0 says so
            scores[test] = decide(x_ND[train], y_N[train], x_ND[test], strength)
    return scores


def balanced_accuracy(scores_N: np.ndarray, y_N: np.ndarray) -> float:
    """Share of each class on its side of 0, mean over the two; a score of 0 is half right."""
    right = np.where(scores_N == 0, 0.5, (scores_N > 0) == (y_N == 1))
    return float(np.mean([right[y_N == label].mean() for label in (0, 1)]))


def auroc(scores_N: np.ndarray, y_N: np.ndarray) -> float | None:
    """Share of (1, 0) pairs in the right order, ties half; None where a class is empty."""
    if not 0 < y_N.sum() < len(y_N):
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y_N, scores_N))
