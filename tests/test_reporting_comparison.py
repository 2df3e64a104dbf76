"""A comparison shows the rates it was given, marks what is significant, and names weak judges."""

import pytest
import report_folders

from saro_jax.reporting import breakdown, comparison
from saro_jax.reporting.tables import between, share


@pytest.fixture(scope="module")
def made():
    return report_folders.transcripts(report_folders.MODELS, 200)


@pytest.fixture(scope="module")
def results(made):
    return report_folders.results(made)


def test_every_cell_of_the_headline_is_its_rate(results):
    table = comparison.headline(results)
    assert table.columns == ["benchmark", "base\n(baseline)", "rw", "srpo"]
    rates = comparison.whole(results)
    rate = rates["xstest", "auto", ("non_refusal", "refusal"), "srpo"]
    row = table.rows[0]
    assert (
        row[0].text == "XSTest" and row[0].below[0] == "non-refusal on harmful prompts, by refusal"
    )
    assert row[3].text == share(rate.share)
    assert row[3].below[0] == between(rate.low, rate.high)
    assert row[0].badge == comparison.WEAK and comparison.WEAK_NOTE in table.note
    assert len(row[1].below) == 1  # no difference of the baseline from itself


def test_without_weak_judges_no_label_is_there(made):
    strong = report_folders.results(made, weak=False)
    table = comparison.headline(strong)
    assert not any(row[0].badge for row in table.rows)
    assert comparison.WEAK_NOTE not in table.note


def test_weak_judges_are_labelled_wherever_their_metric_stands(results):
    metrics = breakdown.all_metrics(results)
    for row in metrics.rows:
        assert (row[2].badge == comparison.WEAK) == row[2].text.startswith("non-refusal")
    heats = breakdown.categories(results).tables
    assert all((comparison.WEAK in h.caption) == ("non-refusal" in h.caption) for h in heats)
    planes = comparison.planes(results)
    assert len(planes) == 2 and all("Weak judge" in one.caption for one in planes)


def test_attack_success_by_every_judge_stands_in_the_headline(results):
    more = [
        rate.model_copy(update={"metric": "asr_answer", "judge": judge, "weak": False})
        for judge in ("guard_a", "guard_b")
        for rate in results.rates
        if rate.metric == "non_refusal"
    ]
    judged = results.model_copy(update={"rates": (*results.rates, *more)})
    rows = comparison.headline_rows(judged, judged.benchmarks[0], "auto")
    assert rows[:2] == [("asr_answer", "guard_a"), ("asr_answer", "guard_b")]
    assert ("non_refusal", "refusal") not in rows and ("over_refusal", "refusal") in rows
    table = comparison.headline(judged)
    assert [row[0].below[0] for row in table.rows[:2]] == [
        f"attack success, answer, by {judge}" for judge in ("guard_a", "guard_b")
    ]
    assert len(comparison.planes(judged)) == 2  # by the first judge


def test_a_benchmark_s_own_metric_comes_first(results):
    bench = results.benchmarks[0]
    other = bench.model_copy(update={"metric": "over_refusal"})
    assert comparison.headline_rows(results, bench, "auto")[0][0] == "non_refusal"
    assert comparison.headline_rows(results, other, "auto")[0][0] == "over_refusal"


def test_seeds_have_a_table_where_there_are_several(results):
    assert breakdown.seeds(results) == []
    rate = results.rates[0].model_copy(update={"method": "hierarchical bootstrap"})
    (table,) = breakdown.seeds(results.model_copy(update={"seeds": (rate,)}))
    assert table.rows[0][5].text == share(rate.share)


@pytest.mark.parametrize(
    ("metric", "delta", "p", "expected"),
    [
        ("non_refusal", -0.1, 0.01, "better"),
        ("non_refusal", 0.1, 0.01, "worse"),
        ("accuracy", 0.1, 0.01, "better"),
        ("accuracy", 0.1, 0.05, "even"),
        ("refused", 0.1, 0.01, "changed"),
        ("refused", 0.0, 0.01, "even"),
    ],
)
def test_tone_of_a_difference(results, metric, delta, p, expected):
    one = results.differences[0].model_copy(update={"metric": metric, "delta": delta, "p_holm": p})
    assert comparison.tone(one) == expected


def test_a_difference_the_other_way_round_is_turned(results):
    d = next(d for d in results.differences if d.metric == "accuracy" and d.b == "rw")
    turned = d.model_copy(
        update={"a": "rw", "b": "base", "delta": -d.delta, "low": -d.high, "high": -d.low}
    )
    found = comparison.against_baseline(results.model_copy(update={"differences": (turned,)}))
    (one,) = found.values()
    assert list(found) == [("sums", "auto", ("accuracy", None), "rw")]
    assert (one.a, one.b, one.delta, one.low, one.high) == ("base", "rw", d.delta, d.low, d.high)
    assert one.verdict is None  # it was said of the other direction


def test_a_model_without_a_benchmark_has_a_dash(results):
    fewer = [r for r in results.rates if (r.model, r.benchmark) != ("rw", "sums")]
    table = comparison.headline(results.model_copy(update={"rates": tuple(fewer)}))
    row = next(row for row in table.rows if row[0].below[0] == "accuracy")
    assert [cell.text == "–" for cell in row] == [False, False, True, False]


def test_costs_are_by_kind_only(results):
    waits = {
        ("srpo", "auto", "jailbreak"): {"median_s": 2.04, "p95_s": 3, "tokens_per_second": 9.96}
    }
    waits = {key: said | {"slots": 16} for key, said in waits.items()}
    section = breakdown.costs(results, waits)
    table, times = section.tables
    assert "(at most 16)" in times.note and list(times.columns[1:]) == ["base", "rw", "srpo"]
    ((head, *cells),) = times.rows
    assert (head.text, [one.text for one in cells]) == ("jailbreak", ["–", "–", "2.0"])
    assert cells[-1].below == ("p95 3.0", "10.0 tokens/s")
    assert {row[0].text for row in table.rows} == {"harmful", "jailbreak", "benign", "borderline"}
    cost = next(c for c in results.costs if (c.model, c.kind) == ("srpo", "jailbreak"))
    row = next(r for r in table.rows if (r[1].text, r[0].text) == ("srpo", "jailbreak"))
    assert row[3].text == f"{cost.mean_tokens:.0f}"
    assert len(breakdown.costs(results, {}).tables) == 1


def test_heat_is_by_tenths(results):
    for table in breakdown.categories(results).tables:
        for row in table.rows:
            for cell in row[2:]:
                assert cell.tone == f"h{min(9, int(cell.text) // 10)}" or cell.text.endswith("0")
