"""Owns how the numbers of an evaluation look as text."""

from collections.abc import Iterator

from saro_jax.evaluation.results import METRICS, Difference, Rate, Results

# Rows of the headline table, where a benchmark has them.
SHOWN = (
    "asr_answer",
    "asr_reasoning",
    "asr_any",
    "strongreject",
    "non_refusal",
    "over_refusal",
    "over_refusal_strict",
    "accuracy",
    "recovery",
    "incomplete",
    "forced",
    "well_formed",
    "reflection",
    "cites",
    "cites_right",
    "cites_known",
)


# Rows of the short table: what is counted, of which kind of prompt (None: of all).
SHORT = (
    ("refuses harmful requests", "refused", "harmful"),
    ("refuses jailbreaks", "refused", "jailbreak"),
    ("answers borderline requests", "complied", "borderline"),
    ("answers benign requests", "complied", "benign"),
    ("answers correctly", "accuracy", None),
    ("well-formed reasoning", "well_formed", None),
    ("no end within the limit", "incomplete", None),
)


def short(results: Results) -> str:
    """Models side by side in what a user sees first, as markdown: shares with 95 % intervals."""
    return "\n\n".join("\n".join(_short(results, *one)) for one in _measured(results))


def _measured(results: Results) -> list[tuple[str, str]]:
    """Benchmark and view of every set of answers."""
    return list(dict.fromkeys((rate.benchmark, rate.view) for rate in results.rates))


def _short(results: Results, benchmark: str, view: str) -> Iterator[str]:
    title = next(one.title for one in results.benchmarks if one.name == benchmark)
    names = [model.name for model in results.models]
    yield f"| {title if view == 'auto' else f'{title}, {view}'} | n | {' | '.join(names)} |"
    yield "|---|---|" + "---|" * len(names)
    rates = {
        (rate.metric, rate.kind, rate.model): rate
        for rate in results.rates
        if (rate.benchmark, rate.view) == (benchmark, view) and not (rate.category or rate.attack)
    }
    for row, metric, kind in SHORT:
        mine = [rates.get((metric, kind, name)) for name in names]
        cells = [
            f"{rate.share:.0%} [{rate.low:.0%}, {rate.high:.0%}]" if rate else "-" for rate in mine
        ]
        n = next((rate.n for rate in mine if rate), None)
        if n is not None:
            yield f"| {row} | {n} | {' | '.join(cells)} |"
    costs = [one for one in results.costs if (one.benchmark, one.view) == (benchmark, view)]
    cells, n = [], 0
    for name in names:
        mine = [one for one in costs if one.model == name]
        n = sum(one.n for one in mine)
        cells.append(f"{sum(one.n * one.mean_tokens for one in mine) / n:.0f}")
    yield f"| tokens of a response | {n} | {' | '.join(cells)} |"


def headline(results: Results) -> str:
    """Benchmarks by models: percent with 95 % intervals, then tokens by kind of prompt.

    * stands where the difference to the baseline holds after Holm's correction, ~ where the metric
    is that of a judge which cannot tell it.
    """
    names = [model.name for model in results.models]
    wide = max(26, *(len(name) + 2 for name in names))
    head = f"{'':<44}{'n':>6}  " + "".join(f"{name:<{wide}}" for name in names)
    lines = [head.rstrip()]
    rates = {
        (r.benchmark, r.view, r.metric, r.judge, r.model): r
        for r in results.rates
        if r.kind is None and r.category is None and r.attack is None
    }
    views = list(dict.fromkeys(rate.view for rate in results.rates))
    for benchmark in results.benchmarks:
        for view in views:
            keys = [key for key in rates if key[:2] == (benchmark.name, view)]
            rows = list(dict.fromkeys(key[2:4] for key in keys if key[2] in SHOWN))
            rows.sort(key=lambda row: (row[0] != benchmark.metric, SHOWN.index(row[0])))
            title = benchmark.title if len(views) == 1 else f"{benchmark.title}, {view}"
            if rows:
                lines += ["", title]
            for metric, judge in rows:
                mine = [rates.get((benchmark.name, view, metric, judge, name)) for name in names]
                lines.append(_row(results, metric, judge, mine, wide))
    lines += ["", *_costs(results, views, names, wide)]
    lines += ["", "percent [95 % interval]; * differs from " + results.baseline]
    lines[-1] += " (Holm-corrected p < 0.05)"
    if any(rate.weak for rate in results.rates):
        lines.append(
            "~ weak: no judge of harm; by refusal alone, an answer that refuses not counts"
        )
    for row in results.differences:
        if row.a == results.baseline and row.verdict:
            lines.append(
                f"{row.b}: {row.benchmark} accuracy {100 * row.delta:+.1f} points "
                f"[{100 * row.low:.1f}, {100 * row.high:.1f}] against {row.a}: {row.verdict}"
            )
    lines.append(_detectable(results))
    for one in results.agreement:
        k = "undefined" if one.kappa is None else f"{one.kappa:.2f}"
        lines.append(
            f"{one.judge_a} and {one.judge_b} on {one.about}: {one.n} texts, "
            f"{100 * one.equal:.1f} % equal, kappa {k}"
        )
    for row in results.audit or ():
        lines.append(
            f"audit of {row.model} on {row.benchmark}, {row.kind}: {METRICS[row.metric].title} "
            f"{100 * row.judge_share:.1f} by the judge, {100 * row.share:.1f} "
            f"[{100 * row.low:.1f}, {100 * row.high:.1f}] with {row.labelled} labels"
        )
    return "\n".join(line for line in lines if line is not None).rstrip()


def _row(
    results: Results, metric: str, judge: str | None, rates: list[Rate | None], wide: int
) -> str:
    first = next(rate for rate in rates if rate)
    by = f" ({judge})" if judge not in (None, "refusal") else ""
    mark = " ~" if first.weak else ""
    cells = []
    for rate in rates:
        if rate is None:
            cells.append("-")
            continue
        star = "*" if _holds(results, rate) else ""
        cells.append(f"{100 * rate.share:5.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]{star}")
    title = f"  {METRICS[metric].title}{by}{mark}"
    return f"{title:<44}{first.n:>6}  " + "".join(f"{cell:<{wide}}" for cell in cells).rstrip()


def against_baseline(results: Results, rate: Rate) -> Difference | None:
    """The difference of a rate to the baseline's."""
    for one in results.differences:
        same = (one.benchmark, one.view, one.metric, one.judge)
        if same == (rate.benchmark, rate.view, rate.metric, rate.judge) and (one.a, one.b) == (
            results.baseline,
            rate.model,
        ):
            return one
    return None


def _holds(results: Results, rate: Rate) -> bool:
    difference = against_baseline(results, rate)
    return difference is not None and difference.p_holm < 0.05


def _costs(results: Results, views: list[str], names: list[str], wide: int) -> list[str]:
    costs = {(c.view, c.kind, c.model): c for c in results.costs if c.benchmark is None}
    lines = ["mean tokens (thought, answer) and overhead"]
    for view in views:
        for kind in dict.fromkeys(kind for v, kind, _ in costs if v == view):
            mine = [costs.get((view, kind, name)) for name in names]
            first = next(cost for cost in mine if cost)
            cells = []
            for cost in mine:
                if cost is None:
                    cells.append("-")
                    continue
                over = f" {100 * cost.overhead.ratio:+.0f} %" if cost.overhead else ""
                cells.append(
                    f"{cost.mean_tokens:.0f} ({cost.mean_reasoning_tokens:.0f}, "
                    f"{cost.mean_answer_tokens:.0f}){over}"
                )
            title = f"  {kind}" if len(views) == 1 else f"  {kind}, {view}"
            row = f"{title:<44}{first.n:>6}  " + "".join(f"{cell:<{wide}}" for cell in cells)
            lines.append(row.rstrip())
    return lines


def _detectable(results: Results) -> str:
    if not results.differences:
        return ""
    parts = []
    for benchmark in results.benchmarks:
        mine = [one for one in results.differences if one.benchmark == benchmark.name]
        main = [one for one in mine if one.metric in (benchmark.metric, "non_refusal")] or mine
        if main:
            parts.append(f"{benchmark.name} {100 * max(one.mde for one in main):.1f}")
    return "differences that 80 % power would find, points: " + ", ".join(parts)
