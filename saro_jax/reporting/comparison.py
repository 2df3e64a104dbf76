"""Owns how a report compares models: headline, differences, safety and over-refusal."""

from collections.abc import Sequence

from saro_jax.evaluation.results import METRICS, Benchmark, Difference, Rate, Results
from saro_jax.reporting import charts, plane
from saro_jax.reporting.svg import clipped
from saro_jax.reporting.tables import (
    DASH,
    Cell,
    Figure,
    Table,
    between,
    p_value,
    share,
    signed,
)

SCORES = {"strongreject", "balance"}  # means of scores between 0 and 1, no shares
UNSAFE = ("asr_answer", "non_refusal")  # the first that a benchmark has is its headline
ALPHA = 0.05
NOTABLE = 0.02  # share of missing answers from which a benchmark's headline tells of them
MOST_PLANES = 6
MOST_DIFFERENCES = 36  # in a chart: the table has all
WEAK = "weak judge"
# A metric and its judge; and a benchmark, a view, these two, and a model.
Row = tuple[str, str | None]
Key = tuple[str, str, Row, str]
WEAK_NOTE = (
    "Weak judge: the verdicts come from a judge that cannot tell what the metric's name says, or "
    "that no labels of people have audited. Non-refusal on harmful prompts is no attack success: "
    "an answer that does not refuse need not be harmful."
)


def titled(metric: str) -> str:
    """A metric's title; its name where it has none."""
    return METRICS[metric].title if metric in METRICS else metric


def styles(results: Results) -> dict[str, int]:
    """Each model's colour and mark: 0 is the baseline's."""
    others = [model.name for model in results.models if model.name != results.baseline]
    return {name: i for i, name in enumerate([results.baseline, *others])}


def whole(results: Results) -> dict[Key, Rate]:
    """The rates over all of a benchmark's prompts that each metric is about."""
    return {
        (rate.benchmark, rate.view, (rate.metric, rate.judge), rate.model): rate
        for rate in results.rates
        if rate.kind is None and rate.category is None and rate.attack is None
    }


def views(results: Results, benchmark: str) -> list[str]:
    """The views in which a benchmark was run, in the order of the rates."""
    return list(dict.fromkeys(r.view for r in results.rates if r.benchmark == benchmark))


def _named(results: Results, bench: Benchmark, view: str) -> str:
    """A benchmark's title, with the view where it was run in several."""
    several = len(views(results, bench.name)) > 1
    return bench.title + (f" \N{MIDDLE DOT} {view}" if several else "")


def measured(results: Results, benchmark: str, view: str) -> list[Row]:
    """What was measured over a whole benchmark, in the order of the rates."""
    keys = whole(results)
    return list(dict.fromkeys(key[2] for key in keys if key[:2] == (benchmark, view)))


def unsafe_rows(rows: Sequence[Row]) -> list[Row]:
    """Attack success by every judge of safety, else non-refusal."""
    metric = next((one for one in UNSAFE if one in {name for name, _ in rows}), None)
    return [row for row in rows if row[0] == metric]


def headline_rows(results: Results, bench: Benchmark, view: str) -> list[Row]:
    """What of a benchmark the headline shows, its own metric first."""
    here = measured(results, bench.name, view)
    unsafe = [metric for metric, _ in unsafe_rows(here)[:1]]
    safety = [*unsafe, "strongreject", "recovery"]
    wanted = {
        "safety": safety,
        "over_refusal": ["over_refusal"],
        "mixed": [*safety, "over_refusal"],
        "capability": ["accuracy"],
    }[bench.kind]
    missing = [
        rate.share
        for (name, seen, (metric, _), _), rate in whole(results).items()
        if (name, seen, metric) == (bench.name, view, "incomplete")
    ]
    if max(missing, default=0.0) > NOTABLE:
        wanted = [*wanted, "incomplete"]
    # A benchmark may name attack success where no judge of safety was asked.
    if bench.metric in {metric for metric, _ in here} and bench.metric not in UNSAFE:
        wanted = [bench.metric, *wanted]
    return [row for metric in dict.fromkeys(wanted) for row in here if row[0] == metric]


def headline(results: Results) -> Table:
    """Rates with intervals, and differences from the baseline with their corrected p."""
    names = list(styles(results))
    rates, against = whole(results), against_baseline(results)
    rows, weak = [], False
    for bench in results.benchmarks:
        for view in views(results, bench.name):
            for key in headline_rows(results, bench, view):
                found = [rates.get((bench.name, view, key, name)) for name in names]
                is_weak = any(rate is not None and rate.weak for rate in found)
                weak |= is_weak
                title, better = METRICS.get(key[0], (key[0], None))
                by = f"{title}, by {key[1]}" if key[1] else title
                n = max(rate.n for rate in found if rate is not None)
                direction = f"{better} is better" if better else "neither way is better"
                head = Cell(
                    _named(results, bench, view),
                    (by, f"n = {n:,} \N{MIDDLE DOT} {direction}"),
                    badge=WEAK if is_weak else "",
                )
                row = [head]
                for name, rate in zip(names, found, strict=True):
                    row.append(rate_cell(rate, against.get((bench.name, view, key, name))))
                rows.append(row)
    columns = ["benchmark", *(n + ("\n(baseline)" if n == results.baseline else "") for n in names)]
    note = (
        f"95 % intervals in brackets; differences from {results.baseline} in percentage points (of "
        "scores: in hundredths) on the same prompts, their p corrected for all differences in the "
        f"metric (Holm). Coloured and marked where p < {ALPHA}. Share of answers that are missing "
        f"(incomplete) where it is above {100 * NOTABLE:.0f} % for a model."
    )
    return Table("headline", "Headline", columns, rows, note=f"{note} {WEAK_NOTE if weak else ''}")


def against_baseline(results: Results) -> dict[Key, Difference]:
    """Each model's differences from the baseline."""
    found = {}
    for d in results.differences:
        if d.a == results.baseline:
            found[d.benchmark, d.view, (d.metric, d.judge), d.b] = d
        elif d.b == results.baseline:
            turned = {"a": d.b, "b": d.a, "delta": -d.delta, "low": -d.high, "high": -d.low}
            # Whether b is not inferior to a says nothing of a against b.
            found[d.benchmark, d.view, (d.metric, d.judge), d.a] = d.model_copy(
                update=turned | {"verdict": None}
            )
    return found


def tone(difference: Difference) -> str:
    """better, worse, changed (where neither way is better) or even (not significant)."""
    if difference.p_holm >= ALPHA or difference.delta == 0:
        return "even"
    better = METRICS[difference.metric].better if difference.metric in METRICS else None
    if better is None:
        return "changed"
    return "better" if (difference.delta > 0) == (better == "higher") else "worse"


def rate_cell(rate: Rate | None, difference: Difference | None = None) -> Cell:
    """A rate with its interval and, below, its difference from the baseline."""
    if rate is None:
        return Cell(DASH, title="not measured")
    score = rate.metric in SCORES
    below = [between(rate.low, rate.high, score)]
    shade, title = "", f"{rate.method}, n = {rate.n}"
    if difference is not None:
        shade = tone(difference)
        sign = {"better": "better ", "worse": "worse ", "changed": "", "even": ""}[shade]
        arrow = {"better": "\N{CHECK MARK} ", "worse": "\N{MULTIPLICATION X} "}.get(shade, "")
        below += [f"{arrow}{sign}{signed(100 * difference.delta)}", p_value(difference.p_holm)]
        if difference.verdict:
            below.append(difference.verdict)
        title = (
            f"{title}; difference {signed(100 * difference.delta)} "
            f"{between(difference.low, difference.high)}, {difference.method}, uncorrected "
            f"{p_value(difference.p)}, found with 80 % power from {100 * difference.mde:.1f}"
        )
    return Cell(share(rate.share, score), tuple(below), shade, title=title)


def differences_chart(results: Results) -> Figure | None:
    """Differences from the baseline of the headline's metrics, with intervals."""
    against, names = against_baseline(results), styles(results)
    rows = []
    for bench in results.benchmarks:
        for view in views(results, bench.name):
            for key in headline_rows(results, bench, view):
                metric = key[0]
                if metric == "incomplete" or len(rows) > MOST_DIFFERENCES:
                    continue
                first = True
                for name, style in names.items():
                    d = against.get((bench.name, view, key, name))
                    if d is None:
                        continue
                    label = f"{_named(results, bench, view)}: {_brief(metric)}" if first else ""
                    first = False
                    rows.append(
                        charts.Interval(
                            label,
                            style,
                            d.delta,
                            d.low,
                            d.high,
                            f"{name} on {bench.title} ({view}), {titled(metric)}: "
                            f"{signed(100 * d.delta)} {between(d.low, d.high)}, "
                            f"{p_value(d.p_holm)} after Holm",
                            d.p_holm < ALPHA,
                        )
                    )
    if not rows:
        return None
    title = f"Differences from {results.baseline}"
    others = [(name, style) for name, style in names.items() if name != results.baseline]
    return Figure(
        charts.intervals(
            title,
            f"{len(rows)} differences with 95 % intervals; the table has the numbers.",
            rows,
            "difference, percentage points",
            points=True,
        ),
        title,
        f"On the same prompts, 95 % intervals; filled where p < {ALPHA} after Holm. Left of the "
        "line is better for all but accuracy and recovery.",
        charts.legend(others),
    )


BRIEF = {
    "asr_answer": "attack success",
    "non_refusal": "non-refusal",
    "over_refusal": "over-refusal",
    "strongreject": "StrongREJECT",
    "incomplete": "incomplete",
}


def _brief(metric: str) -> str:
    return BRIEF.get(metric, metric)


def planes(results: Results) -> list[Figure]:
    """Safety against over-refusal, for each set of harmful prompts and each view."""
    polite = [
        bench
        for bench in results.benchmarks
        if any(
            rate.metric == "over_refusal" for rate in results.rates if rate.benchmark == bench.name
        )
    ]
    # A benchmark that has both kinds of prompts, then that with the most, stands on the x axis.
    polite.sort(key=lambda b: (b.kind != "mixed", -b.n))
    figures = []
    for bench in results.benchmarks if polite else ():
        other = bench if bench in polite else polite[0]
        for view in views(results, bench.name):
            y_rows = unsafe_rows(measured(results, bench.name, view))
            x_rows = [r for r in measured(results, other.name, view) if r[0] == "over_refusal"]
            if x_rows and y_rows:  # of several judges the first
                found = _plane(results, bench, y_rows[0], other, x_rows[0], view)
                figures += [found] if found is not None else []
    return figures


def _plane(
    results: Results, bench: Benchmark, y_row: Row, other: Benchmark, x_row: Row, view: str
) -> Figure | None:
    rates, points, weak = whole(results), [], False
    for name, style in styles(results).items():
        x = rates.get((other.name, view, x_row, name))
        y = rates.get((bench.name, view, y_row, name))
        if x is None or y is None:
            continue
        weak |= x.weak or y.weak
        points.append(plane.Point(name, style, (x.share, x.low, x.high), (y.share, y.low, y.high)))
    if not points:
        return None
    title = _named(results, bench, view) + ("" if other == bench else f" and {other.title}")
    return Figure(
        plane.draw(
            f"Safety and over-refusal: {title}",
            f"{len(points)} models; lower is better on both axes.",
            points,
            f"over-refusal, {clipped(other.title, 32)}",
            titled(y_row[0]) + (f", by {y_row[1]}" if y_row[1] else ""),
        ),
        f"Safety and over-refusal: {title}",
        "Filled: on the Pareto front, no other model is better in one and as good in the other. "
        "Bars: 95 % intervals." + (f" {WEAK.capitalize()}." if weak else ""),
        "" if plane.all_named(points) else charts.legend([(p.name, p.style) for p in points]),
    )
