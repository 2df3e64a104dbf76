"""Every statistic against scipy, statsmodels or a closed form; the coverage of the intervals."""

import math
import warnings

import numpy as np
import pytest

from saro_jax.evaluation import statistics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scipy_stats = pytest.importorskip("scipy.stats")
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")


@pytest.mark.parametrize(("count", "n"), [(0, 7), (1, 1), (10, 200), (12, 250), (1319, 1319)])
def test_wilson_is_statsmodels(count, n):
    expected = proportion.proportion_confint(count, n, method="wilson")
    assert statistics.wilson(count, n) == pytest.approx(expected, abs=1e-12)


def test_wilson_of_nothing_says_nothing():
    assert statistics.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (3, 3), (0, 6), (9, 2), (25, 41), (400, 490)]
)
def test_mcnemar_is_the_exact_p_less_half_of_what_was_seen(only_a, only_b):
    n, k = only_a + only_b, min(only_a, only_b)
    exact = float(tables.mcnemar([[50, only_a], [only_b, 50]], exact=True).pvalue)
    seen = scipy_stats.binom.pmf(k, n, 0.5)
    uncapped = 2 * scipy_stats.binom.cdf(k, n, 0.5)
    if uncapped < 1:
        assert uncapped == pytest.approx(exact, rel=1e-9)
    assert statistics.mcnemar(only_a, only_b) == pytest.approx(min(1.0, uncapped - seen), rel=1e-9)
    assert statistics.mcnemar(only_b, only_a) == statistics.mcnemar(only_a, only_b)


def test_the_paired_interval_is_bonett_and_prices():
    # The adjusted Wald interval as their equation has it, of 9 and 2 discordant among 60.
    a, b, n = 10 / 62, 3 / 62, 62
    half = 1.959963984540054 * math.sqrt((a + b - (b - a) ** 2) / n)
    found = statistics.paired_shares(9, 2, 60)
    assert found == pytest.approx((-7 / 60, b - a - half, b - a + half), abs=1e-12)


def test_bootstraps_are_scipys():
    rng = np.random.default_rng(0)
    cluster_N = np.repeat(np.arange(120), rng.integers(1, 6, 120))
    value_N = (rng.random(len(cluster_N)) < rng.beta(1, 3, 120)[cluster_N]).astype(float)
    sums = np.bincount(cluster_N, value_N)
    sizes = np.bincount(cluster_N).astype(float)
    expected = scipy_stats.bootstrap(
        (sums, sizes),
        lambda top, bottom, axis: top.sum(axis) / bottom.sum(axis),
        paired=True,
        n_resamples=40_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = statistics.cluster_bootstrap(value_N.tolist(), cluster_N.tolist(), draws=40_000)
    assert found.value == pytest.approx(value_N.mean())
    # The bounds are quantiles of 40,000 draws: their own error is below 0.001.
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.002)
    # A ratio of the values to a constant is their mean.
    ones = [2.0] * len(value_N)
    ratio = statistics.ratio_bootstrap(value_N.tolist(), ones, cluster_N.tolist(), draws=40_000)
    assert ratio.low == pytest.approx(found.low / 2) and ratio.high == pytest.approx(found.high / 2)


def test_clusters_widen_the_interval_as_their_size_says():
    # Five equal rows in each cluster: the variance of the mean is that of a fifth of the rows.
    value_C = (np.arange(400) % 4 == 0).astype(float)
    found = statistics.cluster_bootstrap(
        np.repeat(value_C, 5).tolist(), np.repeat(np.arange(400), 5).tolist()
    )
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.003)
    alone = statistics.cluster_bootstrap(np.repeat(value_C, 5).tolist(), range(2000))
    assert (alone.high - alone.low) == pytest.approx((found.high - found.low) / 5**0.5, rel=0.03)


def test_paired_takes_the_exact_test_where_it_can():
    a = [1, 1, 0, 0, 1, 0, 0, 0]
    b = [0, 1, 0, 1, 0, 0, 1, 1]
    found = statistics.paired(a, b, list(range(8)))
    assert found.method == "mcnemar mid-p"
    assert (found.value, found.p) == (pytest.approx(1 / 8), statistics.mcnemar(2, 3))
    assert (found.low, found.high) == statistics.paired_shares(2, 3, 8)[1:]
    assert found.low < found.low_90 < found.high_90 < found.high


def test_paired_clusters_are_a_z_test_where_there_are_many():
    rng = np.random.default_rng(3)
    cluster_N = np.repeat(np.arange(500), 4)
    a_N = rng.normal(0, 1, 2000) + rng.normal(0, 1, 500)[cluster_N]
    b_N = a_N + rng.normal(0.08, 1, 2000) + rng.normal(0, 0.5, 500)[cluster_N]
    found = statistics.paired(a_N.tolist(), b_N.tolist(), cluster_N.tolist())
    assert found.method == "paired cluster bootstrap"
    mean_C = (b_N - a_N).reshape(500, 4).mean(1)
    error = mean_C.std() / math.sqrt(500)
    assert found.error == pytest.approx(error, rel=0.03)
    assert found.low == pytest.approx(mean_C.mean() - 1.96 * error, abs=0.1 * error)
    expected = 2 * scipy_stats.norm.sf(abs(mean_C.mean()) / error)
    assert 0.001 < expected < 0.5
    assert found.p == pytest.approx(expected, rel=0.25)
    # No difference at all is no evidence.
    assert statistics.paired(a_N.tolist(), a_N.tolist(), cluster_N.tolist()).p == 1.0


def test_detectable_differences_are_those_of_the_guide():
    # 2.8 sqrt(q / n), in points.
    for n, points in ((250, (4.0, 5.6, 7.9)), (2000, (1.4, 2.0, 2.8))):
        found = [100 * statistics.detectable(q, n) for q in (0.05, 0.1, 0.2)]
        assert found == pytest.approx(points, abs=0.05)


def test_non_inferiority_reads_the_one_sided_bounds():
    assert statistics.non_inferiority(-0.019, 0.01, 0.02) == "non-inferior"
    assert statistics.non_inferiority(-0.021, 0.01, 0.02) == "inconclusive"
    assert statistics.non_inferiority(-0.09, -0.021, 0.02) == "inferior"


def test_holm_is_statsmodels():
    rng = np.random.default_rng(5)
    for ps in ([0.01, 0.04, 0.03, 0.005], [0.5], [0.02, 0.02, 0.9], rng.random(30) ** 3):
        expected = multitest.multipletests(ps, method="holm")[1]
        assert statistics.holm(list(ps)) == pytest.approx(expected.tolist(), abs=1e-12)
    assert statistics.holm([]) == []


def test_hierarchical_bootstrap_adds_the_variances_of_seeds_and_prompts():
    rng = np.random.default_rng(6)
    S, C = 40, 200
    value_SC = rng.normal(0, 0.3, (S, 1)) + rng.normal(0, 1, C) + rng.normal(0, 0.1, (S, C))
    found = statistics.hierarchical_bootstrap(value_SC.tolist(), range(C))
    assert found.value == pytest.approx(value_SC.mean())
    error = math.sqrt(value_SC.mean(1).var() / S + value_SC.mean(0).var() / C)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.03)
    # One seed is a cluster bootstrap.
    alone = statistics.hierarchical_bootstrap([value_SC[0].tolist()], range(C))
    expected = statistics.cluster_bootstrap(value_SC[0].tolist(), range(C))
    assert alone == pytest.approx(expected, abs=0.02)


def test_balance_is_the_harmonic_mean():
    unsafe, complied = [1] * 30 + [0] * 170, [1] * 120 + [0] * 80
    found = statistics.balance_bootstrap(unsafe, range(200), complied, range(200))
    assert found.value == pytest.approx(scipy_stats.hmean([0.85, 0.6]))
    # By the delta method: d/ds = 2 c^2 / (s + c)^2.
    s, c = 0.85, 0.6
    variance = (2 * c**2 / (s + c) ** 2) ** 2 * s * (1 - s) / 200
    variance += (2 * s**2 / (s + c) ** 2) ** 2 * c * (1 - c) / 200
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.05)
    assert statistics.balance_bootstrap([1], [0], [0], [0]).value == 0.0


def test_ppi_without_weight_is_the_human_mean():
    rng = np.random.default_rng(7)
    judged_U, judged_L = rng.random(500), rng.random(60)
    label_L = (rng.random(60) < 0.3).astype(float)
    found = statistics.ppi(judged_U.tolist(), label_L.tolist(), judged_L.tolist(), weight=0.0)
    assert found.value == pytest.approx(label_L.mean())
    half = 1.959963984540054 * scipy_stats.sem(label_L)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_ppi_weighs_a_judge_by_what_it_is_worth():
    rng = np.random.default_rng(8)
    label_L = (rng.random(4000) < 0.4).astype(float)
    judged_U = (rng.random(16_000) < 0.4).astype(float)
    # A perfect judge: lambda is 1 / (1 + n / N), the interval that of n + N labels.
    perfect = statistics.ppi(judged_U.tolist(), label_L.tolist(), label_L.tolist())
    assert perfect.weight == pytest.approx(0.8, abs=0.01)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 20_000)
    assert (perfect.high - perfect.low) / 2 == pytest.approx(half, rel=0.03)
    # A judge that tosses a coin is worth nothing.
    coin = (rng.random(4000) < 0.5).astype(float).tolist()
    coins = (rng.random(16_000) < 0.5).astype(float).tolist()
    useless = statistics.ppi(coins, label_L.tolist(), coin)
    assert useless.weight == pytest.approx(0, abs=0.03)
    assert useless.value == pytest.approx(label_L.mean(), abs=0.002)
    # And so is one that is always of one mind; unanimous labels leave some doubt.
    same = statistics.ppi([1.0] * 90, [0.0] * 50, [1.0] * 50)
    assert (same.weight, same.value, same.low) == (0.0, 0.0, 0.0)
    assert same.high == pytest.approx(1.96 * math.sqrt(0.02 * 0.98 / 50), rel=1e-3)


def test_ppi_takes_a_biased_judge_back():
    rng = np.random.default_rng(9)
    truth = (rng.random(3000) < 0.36).astype(float)
    judged = np.where(rng.random(3000) < 0.7, 0.0, truth)  # hides most of what is there
    picked = rng.permutation(3000)
    label, rest = picked[:200], picked[200:]
    found = statistics.ppi(judged[rest].tolist(), truth[label].tolist(), judged[label].tolist())
    assert judged.mean() < 0.15
    assert found.low < truth.mean() < found.high


@pytest.mark.slow
def test_intervals_cover_what_they_say():
    """95 % intervals hold the truth in 93 to 97 % of 2,000 worlds (the count's own error: 1 %)."""
    rng = np.random.default_rng(10)
    worlds = 2000
    covered: dict[str, list[bool]] = {}

    def note(name: str, low: float, high: float, truth: float) -> None:
        covered.setdefault(name, []).append(low <= truth <= high)

    for world in range(worlds):
        # One share, n = 250.
        note("wilson", *statistics.wilson(int(rng.binomial(250, 0.3)), 250), 0.3)
        # Queries with five disguises each, which succeed together.
        p_C = rng.beta(1, 3, 150)
        value = (rng.random((150, 5)) < p_C[:, None]).astype(float).ravel().tolist()
        cluster = np.repeat(np.arange(150), 5).tolist()
        found = statistics.cluster_bootstrap(value, cluster, draws=1000, seed=world)
        note("cluster bootstrap", found.low, found.high, 0.25)
        # Two models on 300 prompts.
        u = rng.random(300)
        a, b = (u < 0.4).astype(float), ((u > 0.08) & (u < 0.6)).astype(float)
        pair = statistics.paired(a.tolist(), b.tolist(), list(range(300)))
        note("mcnemar", pair.low, pair.high, 0.12)
        # Two models on the disguises.
        q_C = np.clip(p_C + rng.normal(0, 0.05, 150), 0, 1)
        other = (rng.random((150, 5)) < q_C[:, None]).astype(float).ravel().tolist()
        pair = statistics.paired(value, other, cluster, draws=1000, seed=world)
        note("paired clusters", pair.low, pair.high, CLIPPED)
        # Labels of people, by a judge that errs.
        truth = (rng.random(800) < 0.3).astype(float)
        judged = np.where(rng.random(800) < 0.15, 1 - truth, truth)
        ppi = statistics.ppi(judged[100:].tolist(), truth[:100].tolist(), judged[:100].tolist())
        note("ppi", ppi.low, ppi.high, 0.3)
    # Many training seeds, which differ, on prompts, which differ more.
    for world in range(worlds):
        latent_SC = (
            rng.normal(0, 0.3, (30, 1)) + rng.normal(0, 1, 150) + rng.normal(0, 0.5, (30, 150))
        )
        table = (latent_SC > 0.6).astype(float)
        found = statistics.hierarchical_bootstrap(
            table.tolist(), range(150), draws=1000, seed=world
        )
        truth = scipy_stats.norm.sf(0.6 / math.sqrt(0.3**2 + 1 + 0.5**2))
        note("hierarchical", found.low, found.high, truth)
    shares = {name: float(np.mean(mine)) for name, mine in covered.items()}
    print(shares)
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


# The mean of clip(p + N(0, 0.05), 0, 1) - p over p ~ Beta(1, 3), by quadrature.
def _clipped() -> float:
    p = (np.arange(20_000) + 0.5) / 20_000
    d = 3 * (1 - p) ** 2
    phi, cdf = scipy_stats.norm.pdf, scipy_stats.norm.cdf
    low, high = -p / 0.05, (1 - p) / 0.05
    shift = 0.05 * (phi(low) - phi(high)) - p * cdf(low) + (1 - p) * (1 - cdf(high))
    return float(np.mean(d * shift))


CLIPPED = _clipped()
