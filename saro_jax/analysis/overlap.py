"""Overlap of groups of prompts in hidden space: classifier, neighbours, centroids, kernel test.

Legend: N prompts of two groups, D hidden width, R permutations.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from saro_jax.analysis import linear
from saro_jax.analysis.results import Overlap

NEIGHBOURS = 10
PERMUTATIONS = 200


def c2st(x_ND: np.ndarray, y_N: np.ndarray, parts: Sequence[np.ndarray]) -> float:
    """Classifier two-sample test: balanced accuracy on held-out folds (Lopez-Paz and Oquab 2017).

    0.5 = the groups overlap, 1 = a hyperplane parts them.
    """
    return linear.balanced_accuracy(linear.held_out(x_ND, y_N, parts), y_N)


@linear.one_thread()
def distances(x_ND: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of all pairs, float64 [N, N], never below 0."""
    x_ND = x_ND.astype(np.float64)
    x_ND = x_ND - x_ND.mean(0)
    square = (x_ND * x_ND).sum(1)
    d_NN = square[:, None] + square[None] - 2 * x_ND @ x_ND.T
    d_NN[d_NN < 1e-9 * square.max(initial=0)] = 0.0  # what is left of equal rows
    np.fill_diagonal(d_NN, 0.0)
    return d_NN


def knn_purity(d_NN: np.ndarray, y_N: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Share of the k nearest others that are of the own group; mean over both groups.

    Others at the distance of the k-th share the places that are left, so equal rows say 0.5.
    """
    k = min(k, len(y_N) - 1)
    d_NN = d_NN.copy()
    np.fill_diagonal(d_NN, np.inf)
    kth_N1 = np.partition(d_NN, k - 1, axis=1)[:, k - 1 : k]
    same_NN = y_N[:, None] == y_N[None]
    nearer_NN, tied_NN = d_NN < kth_N1, d_NN == kth_N1
    left_N = k - nearer_NN.sum(1)
    own_N = (nearer_NN & same_NN).sum(1) + left_N * (tied_NN & same_NN).sum(1) / tied_NN.sum(1)
    return float(np.mean([own_N[y_N == label].mean() / k for label in (0, 1)]))


def centroid_cosine(x_ND: np.ndarray, y_N: np.ndarray, centre_D: np.ndarray) -> float:
    """Cosine between the means of the two groups as seen from `centre_D`; 0 where one is there."""
    a, b = (x_ND[y_N == label].mean(0, dtype=np.float64) - centre_D for label in (0, 1))
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if min(norms) <= 1e-6 * np.linalg.norm(centre_D):  # the rounding of equal rows
        return 0.0
    return float(np.clip(a @ b / (norms[0] * norms[1]), -1, 1))


@linear.one_thread()
def mmd2(
    d_NN: np.ndarray, y_N: np.ndarray, seed: int = 0, permutations: int = PERMUTATIONS
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy, and its permutation p-value (Gretton et al. 2012).

    The kernel is exp(-d / m), m the median of the squared distances between different rows.
    """
    upper = d_NN[np.triu_indices(len(y_N), 1)]
    width = float(np.median(upper))
    width = width if width > 0 else float(upper.mean()) or 1.0
    k_NN = np.exp(-d_NN / width)
    np.fill_diagonal(k_NN, 0.0)
    rng = np.random.default_rng(seed)
    labels = np.stack([y_N, *(rng.permutation(y_N) for _ in range(permutations))])
    labels_RN = labels.astype(np.float64)
    n1 = int(y_N.sum())
    n0 = len(y_N) - n1
    rows_RN = labels_RN @ k_NN
    within1 = (rows_RN * labels_RN).sum(1)
    from1 = rows_RN.sum(1)
    across = from1 - within1
    within0 = k_NN.sum() - 2 * from1 + within1
    value_R = within1 / (n1 * (n1 - 1)) + within0 / (n0 * (n0 - 1)) - 2 * across / (n1 * n0)
    # Equal rows tie exactly in theory, and up to rounding here.
    count = int((value_R[1:] >= value_R[0] - 1e-12).sum())
    return float(value_R[0]), (1 + count) / (1 + permutations)


def compare(
    model: str,
    states_NLD: np.ndarray,
    groups: Mapping[str, np.ndarray],
    bases: list[str],
    tokens_N: np.ndarray,
    *,
    layers: Sequence[int],
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> list[Overlap]:
    """Every pair of groups in every layer.

    groups: rows of states by name, in order; bases [N] names what a prompt was made from, so that a
    request and its disguise are never on two sides of a fold; tokens_N: lengths, the control.
    """
    found = []
    pairs = []
    for a, b in itertools.combinations(groups, 2):
        rows = np.concatenate([groups[a], groups[b]])
        y_N = np.repeat([0, 1], [len(groups[a]), len(groups[b])])
        parts = linear.folds(y_N, [bases[i] for i in rows], seed)
        lengths_N1 = tokens_N[rows, None].astype(np.float64)
        pairs.append((a, b, rows, y_N, parts, c2st(lengths_N1, y_N, parts)))
    for layer in layers:
        x_ND = states_NLD[:, layer]
        centre_D = np.mean([x_ND[rows].mean(0, dtype=np.float64) for rows in groups.values()], 0)
        for a, b, rows, y_N, parts, by_length in pairs:
            mine_ND = x_ND[rows]
            d_NN = distances(linear.standardised(mine_ND))
            mmd, p = mmd2(d_NN, y_N, seed, permutations)
            found.append(
                Overlap(
                    model=model,
                    layer=layer,
                    groups=(a, b),
                    n=(len(groups[a]), len(groups[b])),
                    c2st=c2st(mine_ND, y_N, parts),
                    c2st_length=by_length,
                    knn_purity=knn_purity(d_NN, y_N),
                    centroid_cosine=centroid_cosine(mine_ND, y_N, centre_D),
                    mmd2=mmd,
                    p=p,
                )
            )
    return found
