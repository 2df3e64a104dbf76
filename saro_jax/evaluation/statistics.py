"""Owns the intervals and tests of an evaluation: pure functions of counts and arrays.

Legend: N rows, C clusters (a clean prompt and all its disguises and samples), B bootstrap draws, S
training seeds. Shares and differences are on the scale of the values, 0 to 1 for counts. Intervals
are two-sided and of 95 %, if nothing else is said. Every draw follows from `seed`.
"""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

Z95 = NormalDist().inv_cdf(0.975)
Z_ONE_SIDED = NormalDist().inv_cdf(0.95)
Z_POWER = NormalDist().inv_cdf(0.8)
DRAWS = 10_000
CHUNK = 4_000_000  # numbers of one chunk of draws


class Interval(NamedTuple):
    """An estimate with its interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """A difference with its interval, two-sided p, standard error and one-sided 95 % bounds."""

    value: float
    low: float
    high: float
    p: float
    error: float
    low_90: float
    high_90: float
    method: Literal["mcnemar mid-p", "paired cluster bootstrap"]


def wilson(count: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share (Wilson 1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    centre = (count + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(count * (n - count) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


# ---- clusters ------------------------------------------------------------------------------------


def cluster_bootstrap(
    value_N: Sequence[float], cluster_N: Sequence[Hashable], draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Mean of the rows, and the percentile interval when whole clusters are drawn again."""
    sums_C, sizes_C = _clusters(value_N, cluster_N)
    means_B = _drawn(sums_C, sizes_C, draws, seed)
    low, high = np.quantile(means_B, [0.025, 0.975])
    return Interval(float(sums_C.sum() / sizes_C.sum()), float(low), float(high))


def ratio_bootstrap(
    top_N: Sequence[float],
    bottom_N: Sequence[float],
    cluster_N: Sequence[Hashable],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean of `top` over the mean of `bottom`, paired rows; percentile interval over clusters."""
    top_C, _ = _clusters(top_N, cluster_N)
    bottom_C, _ = _clusters(bottom_N, cluster_N)
    ratio_B = _drawn(top_C, bottom_C, draws, seed)
    low, high = np.quantile(ratio_B, [0.025, 0.975])
    return Interval(float(top_C.sum() / bottom_C.sum()), float(low), float(high))


def hierarchical_bootstrap(
    value_SN: Sequence[Sequence[float]],
    cluster_N: Sequence[Hashable],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean over training seeds and rows; seeds are drawn again, and clusters, which they share.

    All seeds answer the same prompts, so that one draw of clusters is for all seeds (Owen 2007).
    With few seeds the interval is too narrow, as a bootstrap of few things is: the spread of 3
    seeds comes out smaller by about the square root of 2/3.
    """
    S = len(value_SN)
    parts = [_clusters(value_N, cluster_N) for value_N in value_SN]
    sums_SC, sizes_C = np.stack([sums_C for sums_C, _ in parts]), parts[0][1]
    C = len(sizes_C)
    rng = np.random.default_rng(seed)
    seeds_BS = rng.multinomial(S, np.full(S, 1 / S), size=draws) / S
    mean_B = np.empty(draws)
    for start in range(0, draws, max(1, CHUNK // C)):
        now = slice(start, min(draws, start + max(1, CHUNK // C)))
        index_BC = rng.integers(C, size=(now.stop - now.start, C))
        mixed_BC = seeds_BS[now] @ sums_SC
        mean_B[now] = np.take_along_axis(mixed_BC, index_BC, 1).sum(1) / sizes_C[index_BC].sum(1)
    low, high = np.quantile(mean_B, [0.025, 0.975])
    return Interval(float(sums_SC.sum() / sizes_C.sum() / S), float(low), float(high))


def balance_bootstrap(
    unsafe_N: Sequence[float],
    unsafe_cluster_N: Sequence[Hashable],
    complied_N: Sequence[float],
    complied_cluster_N: Sequence[Hashable],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Harmonic mean of 1 - mean(unsafe) and mean(complied), two sets of prompts; bootstrap."""

    def harmonic(safe: np.ndarray, complied: np.ndarray) -> np.ndarray:
        total = safe + complied
        return np.where(total > 0, 2 * safe * complied / np.where(total > 0, total, 1), 0.0)

    unsafe_B = _drawn(*_clusters(unsafe_N, unsafe_cluster_N), draws, seed)
    complied_B = _drawn(*_clusters(complied_N, complied_cluster_N), draws, seed + 1)
    low, high = np.quantile(harmonic(1 - unsafe_B, complied_B), [0.025, 0.975])
    value = harmonic(np.array(1 - np.mean(unsafe_N)), np.array(np.mean(complied_N)))
    return Interval(float(value), float(low), float(high))


def _clusters(
    value_N: Sequence[float], cluster_N: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of the rows of each cluster, in order of first appearance."""
    place: dict[Hashable, int] = {}
    index_N = [place.setdefault(one, len(place)) for one in cluster_N]
    if len(index_N) != len(value_N) or not index_N:
        raise ValueError(f"statistics: {len(value_N)} values and {len(index_N)} clusters")
    sums_C = np.bincount(index_N, np.asarray(value_N, float))
    return sums_C, np.bincount(index_N).astype(float)


def _drawn(top_C: np.ndarray, bottom_C: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """sum(top) / sum(bottom) of clusters drawn with replacement, [draws]."""
    C = len(top_C)
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, draws, max(1, CHUNK // C)):
        size = min(draws - start, max(1, CHUNK // C))
        index_BC = rng.integers(C, size=(size, C))
        parts.append(top_C[index_BC].sum(1) / bottom_C[index_BC].sum(1))
    return np.concatenate(parts)


# ---- two models on the same prompts --------------------------------------------------------------


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact two-sided mid-p of two discordant counts (Fagerland et al. 2013)."""
    n, k = only_a + only_b, min(only_a, only_b)
    terms = [math.exp(_log_choose(n, i) - n * math.log(2)) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(terms) - terms[-1])


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def paired_shares(only_a: int, only_b: int, n: int, z: float = Z95) -> Interval:
    """Share of b minus share of a on n paired prompts; adjusted Wald (Bonett and Price 2012)."""
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = z * math.sqrt((a + b - (b - a) ** 2) / (n + 2))
    return Interval((only_b - only_a) / n, max(-1.0, b - a - half), min(1.0, b - a + half))


def paired(
    a_N: Sequence[float],
    b_N: Sequence[float],
    cluster_N: Sequence[Hashable],
    draws: int = DRAWS,
    seed: int = 0,
) -> Paired:
    """b minus a, row by row of the same prompts.

    Values 0 and 1 with clusters of one row: McNemar's mid-p and the adjusted Wald interval.
    Otherwise whole clusters are drawn again, percentile interval, p by the share of draws on the
    other side of 0.
    """
    delta_N = np.asarray(b_N, float) - np.asarray(a_N, float)
    n = len(delta_N)
    binary = set(a_N) | set(b_N) <= {0, 1}
    if binary and len(set(cluster_N)) == n:
        only_a, only_b = int((delta_N < 0).sum()), int((delta_N > 0).sum())
        value, low, high = paired_shares(only_a, only_b, n)
        _, low_90, high_90 = paired_shares(only_a, only_b, n, Z_ONE_SIDED)
        error = math.sqrt((only_a + only_b + 2) / (n + 2) / n)
        p = mcnemar(only_a, only_b)
        return Paired(value, low, high, p, error, low_90, high_90, "mcnemar mid-p")
    delta_B = _drawn(*_clusters(delta_N.tolist(), cluster_N), draws, seed)
    low, low_90, high_90, high = (
        float(q) for q in np.quantile(delta_B, [0.025, 0.05, 0.95, 0.975])
    )
    tail = min(np.sum(delta_B <= 0), np.sum(delta_B >= 0))
    p = min(1.0, 2 * (float(tail) + 1) / (draws + 1))
    error = float(delta_B.std())
    value = float(delta_N.mean())
    return Paired(value, low, high, p, error, low_90, high_90, "paired cluster bootstrap")


def detectable(discordant: float, n: int) -> float:
    """The paired difference that a two-sided 5 % test finds with 80 % power: about 2.8 sqrt(q/n).

    `discordant` is the share q of prompts on which the two models differ.
    """
    return (Z95 + Z_POWER) * math.sqrt(discordant / n)


def non_inferiority(
    low: float, high: float, margin: float
) -> Literal["non-inferior", "inferior", "inconclusive"]:
    """What one-sided 95 % bounds of new minus old say of "not worse by more than the margin"."""
    if low > -margin:
        return "non-inferior"
    return "inferior" if high < -margin else "inconclusive"


def holm(p_N: Sequence[float]) -> list[float]:
    """p-values corrected for being several (Holm 1979), in the order they came."""
    corrected = [0.0] * len(p_N)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(p_N)), key=lambda i: p_N[i])):
        running = max(running, min(1.0, (len(p_N) - rank) * p_N[i]))
        corrected[i] = running
    return corrected


# ---- people's labels -----------------------------------------------------------------------------


class Corrected(NamedTuple):
    """A mean corrected by people's labels; weight 0 is the mean of the labels alone."""

    value: float
    low: float
    high: float
    weight: float


def ppi(
    judged_U: Sequence[float],
    label_L: Sequence[float],
    judged_L: Sequence[float],
    weight: float | None = None,
) -> Corrected:
    """PPI++ (Angelopoulos et al. 2023): mean of what people would say of all U + L rows.

    U rows have a judge's value only, L rows, drawn at random, a person's label too. The estimate is
    weight * mean_U(judged) + mean_L(label - weight * judged). weight None: the one of the least
    variance, within 0 and 1. The interval is normal, and never narrower than if one label more had
    contradicted the judge.
    """
    f_U = np.asarray(judged_U, float)
    y_L, f_L = np.asarray(label_L, float), np.asarray(judged_L, float)
    n, N = len(y_L), len(f_U)
    if n < 2 or len(f_L) != n:
        raise ValueError(f"statistics: {n} labels and {len(f_L)} judgments; at least 2 are needed")
    if N == 0:
        weight = 0.0
    if weight is None:
        spread = float(np.concatenate([f_U, f_L]).var())
        shared = float(np.mean((y_L - y_L.mean()) * (f_L - f_L.mean())))
        weight = min(1.0, max(0.0, shared / ((1 + n / N) * spread))) if spread > 0 else 0.0
    residual_L = y_L - weight * f_L
    value = (weight * float(f_U.mean()) if N else 0.0) + float(residual_L.mean())
    variance = max(float(residual_L.var(ddof=1)), (1 / n) * (1 - 1 / n)) / n
    variance += weight**2 * float(f_U.var()) / N if N else 0.0
    half = Z95 * math.sqrt(variance)
    value, low, high = np.clip([value, value - half, value + half], 0.0, 1.0).tolist()
    return Corrected(value, low, high, weight)
