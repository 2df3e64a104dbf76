"""Owns the parts of a comparison: all metrics, tokens, categories, judges, what was run."""

from collections.abc import Mapping, Sequence
from typing import Any

from saro_jax.evaluation.results import Cost, Rate, Results
from saro_jax.records import KINDS
from saro_jax.reporting import charts
from saro_jax.reporting.comparison import (
    SCORES,
    WEAK,
    Row,
    headline_rows,
    rate_cell,
    styles,
    titled,
    views,
)
from saro_jax.reporting.tables import (
    DASH,
    Cell,
    Figure,
    Section,
    Table,
    between,
    cells,
    share,
    signed,
)


def all_metrics(results: Results) -> Table:
    """Every rate over whole benchmarks and over kinds of prompts."""
    names = list(styles(results))
    found: dict[tuple[str, str, Row, str], dict[str, Rate]] = {}
    for rate in results.rates:
        if rate.category is None and rate.attack is None:
            row = (rate.metric, rate.judge)
            key = (rate.benchmark, rate.view, row, rate.kind or "all")
            found.setdefault(key, {})[rate.model] = rate
    titles = {bench.name: bench.title for bench in results.benchmarks}
    rows = []
    for (benchmark, view, (metric, judge), kind), by_model in found.items():
        weak = any(rate.weak for rate in by_model.values())
        title = titled(metric)
        said = Cell(title, (f"by {judge}",) if judge else (), badge=WEAK if weak else "")
        head = cells(titles.get(benchmark, benchmark), view, said, kind)
        some = [by_model.get(name) for name in names]
        n = max(rate.n for rate in by_model.values())
        rows.append([*head, Cell(f"{n:,}"), *(rate_cell(rate) for rate in some)])
    columns = ["benchmark", "view", "metric", "prompts", "n", *names]
    return Table(
        "metrics",
        "All metrics, by benchmark and kind of prompt",
        columns,
        rows,
        heads=4,
        note="95 % intervals in brackets. rates.csv has categories and attacks too.",
        fold=True,
    )


def seeds(results: Results) -> list[Table]:
    """Rates over the training seeds of one recipe; no table where there was one seed."""
    titles = {bench.name: bench.title for bench in results.benchmarks}
    rows = [
        [
            *cells(r.model, titles.get(r.benchmark, r.benchmark), r.view),
            Cell(
                titled(r.metric),
                (f"by {r.judge}",) if r.judge else (),
                badge=WEAK if r.weak else "",
            ),
            *(Cell(f"{r.n:,}"), rate_cell(r)),
        ]
        for r in results.seeds
        if r.kind is None and r.category is None and r.attack is None
    ]
    columns = ["recipe", "benchmark", "view", "metric", "n", "over all seeds"]
    note = "Intervals are of both, seeds and prompts: what another training run would give."
    table = Table("seeds", "Over training seeds", columns, rows, heads=4, note=note, fold=True)
    return [table] if rows else []


def costs(results: Results, latencies: Mapping[tuple[str, str, str], Any]) -> Section:
    """Tokens by kind of prompt, over all benchmarks, and the time of an answer where it is known.

    latencies: by model, view and kind, as the manifest of an evaluation has them.
    """
    mine = [cost for cost in results.costs if cost.benchmark is None]
    seen = list(dict.fromkeys(cost.view for cost in mine))
    order = {name: i for i, name in enumerate(styles(results))}
    mine.sort(key=lambda c: (seen.index(c.view), KINDS.index(c.kind), order[c.model]))
    figures = [_token_bars(results, [c for c in mine if c.view == v], len(seen) > 1) for v in seen]
    rows = [
        [
            *cells(cost.kind, cost.model, *([cost.view] if len(seen) > 1 else [])),
            *cells(f"{cost.n:,}", f"{cost.mean_tokens:.0f}", f"{cost.mean_reasoning_tokens:.0f}"),
            *cells(f"{cost.mean_answer_tokens:.0f}", f"{cost.p95_tokens:.0f}"),
            _overhead(cost, results.baseline),
        ]
        for cost in mine
    ]
    heads = ["prompts", "model", *(["view"] if len(seen) > 1 else [])]
    table = Table(
        "tokens",
        "Tokens by kind of prompt",
        [*heads, "n", "mean", "reasoning", "answer", "p95", "overhead"],
        rows,
        heads=len(heads),
        fold=len(rows) > 24,
        note="Generated tokens; p95: 95th percentile; overhead: mean over the baseline's mean, "
        "less 1, with its 95 % interval. A mean over all kinds would hide their mix.",
    )
    return Section(
        "cost",
        "Token cost",
        "What the reasoning costs, by kind of prompt.",
        figures,
        [table, *_latency_table(list(order), latencies)] if rows else [],
        "" if rows else "No token counts in the evaluation.",
    )


def _overhead(cost: Cost, baseline: str) -> Cell:
    if cost.overhead is None:
        return Cell("baseline" if cost.model == baseline else DASH)
    said = f"{signed(100 * cost.overhead.ratio, 0)}\N{NARROW NO-BREAK SPACE}%"
    return Cell(said, (between(cost.overhead.low, cost.overhead.high),))


def _latency_table(
    names: Sequence[str], latencies: Mapping[tuple[str, str, str], Any]
) -> list[Table]:
    """Seconds of an answer, models side by side; no table where nothing was timed."""
    if not latencies:
        return []
    views = list(dict.fromkeys(view for _, view, _ in latencies))
    rows = []
    for view in views:
        for kind in KINDS:
            said = [latencies.get((name, view, kind)) for name in names]
            if any(said):
                head = kind if len(views) == 1 else f"{kind}, {view}"
                rows.append([Cell(head), *(_latency(one) for one in said)])
    slots = ", ".join(str(n) for n in sorted({one["slots"] for one in latencies.values()}))
    note = "The median answer's, from its place among those that are decoded together (at most "
    note += f"{slots}) to its last token; p95: 95th percentile. Alone it would take less."
    return [Table("latency", "Seconds of an answer", ["prompts", *names], rows, note=note)]


def _latency(said: Any) -> Cell:
    if said is None:
        return Cell(DASH)
    below = (f"p95 {said['p95_s']:.1f}", f"{said['tokens_per_second']:.1f} tokens/s")
    return Cell(f"{said['median_s']:.1f}", below)


def _token_bars(results: Results, costs: Sequence[Cost], several: bool) -> Figure:
    """Bars of one view's tokens in groups of kinds."""
    names = styles(results)
    groups: dict[str, list[charts.Bar]] = {}
    for cost in costs:
        over = _overhead(cost, results.baseline).text
        groups.setdefault(cost.kind, []).append(
            charts.Bar(
                cost.model,
                names[cost.model],
                (cost.mean_reasoning_tokens, cost.mean_answer_tokens),
                f"{cost.mean_tokens:.0f}" + (f" ({over})" if cost.overhead is not None else ""),
                f"{cost.model}, {cost.kind}: {cost.mean_tokens:.1f} tokens on average, of these "
                f"{cost.mean_reasoning_tokens:.1f} reasoning; 95th percentile "
                f"{cost.p95_tokens:.0f}; n = {cost.n}",
            )
        )
    title = "Tokens of a response" + (f" ({costs[0].view})" if several else "")
    return Figure(
        charts.bars(title, "Mean tokens by kind of prompt.", list(groups.items()), "mean tokens"),
        title,
        "Full colour: reasoning; pale: answer. In brackets: more than "
        f"{results.baseline} on the same kind of prompt.",
    )


def categories(results: Results) -> Section:
    """Heat maps of the headline metrics by category and by attack."""
    names = list(styles(results))
    tables = []
    for bench in results.benchmarks:
        for view in views(results, bench.name):
            for metric, judge in headline_rows(results, bench, view):
                for what in ("category", "attack") if metric != "incomplete" else ():
                    found: dict[str, dict[str, Rate]] = {}
                    for r in results.rates:
                        label, mine = getattr(r, what), (r.benchmark, r.view, r.metric, r.judge)
                        if label and mine == (bench.name, view, metric, judge):
                            found.setdefault(label, {})[r.model] = r
                    if not found:
                        continue
                    weak = any(r.weak for by in found.values() for r in by.values())
                    rows = [
                        [Cell(label), Cell(f"{max(r.n for r in by.values()):,}")]
                        + [_heat(by.get(name)) for name in names]
                        for label, by in found.items()
                    ]
                    title = f"{bench.title}: {titled(metric)}"
                    title += f" by {judge}" if judge else ""
                    title += f", by {what}"
                    title += f" ({view})" if len(views(results, bench.name)) > 1 else ""
                    tables.append(
                        Table(
                            f"heat-{len(tables)}",
                            title + (f" ({WEAK})" if weak else ""),
                            [what, "n", *names],
                            rows,
                            heat=True,
                        )
                    )
    return Section(
        "categories",
        "By category",
        "A stronger colour means more of the metric; each cell has its value and, when pointed "
        "at, its interval. Few prompts stand behind most cells: read the intervals first.",
        tables=tables,
        empty="" if tables else "The benchmarks of this evaluation have no categories.",
    )


def _heat(rate: Rate | None) -> Cell:
    if rate is None:
        return Cell(DASH, title="not measured")
    score = rate.metric in SCORES
    said = f"{rate.share:.2f}" if score else f"{100 * rate.share:.0f}"
    title = f"{share(rate.share, score)} {between(rate.low, rate.high, score)}, n = {rate.n}"
    return Cell(said, (), f"h{min(9, max(0, int(rate.share * 10)))}", title=title)


def judges(results: Results) -> Section:
    """Agreement of the judges, and the audit against people's labels."""
    tables = []
    if results.agreement:
        rows = [
            cells(
                *(a.judge_a, a.judge_b, a.about, f"{a.n:,}", share(a.equal)),
                DASH if a.kappa is None else f"{a.kappa:.2f}".replace("-", "\N{MINUS SIGN}"),
            )
            for a in results.agreement
        ]
        tables.append(
            Table(
                "agreement",
                "Agreement of judges on the same texts",
                ["judge", "judge", "about", "n", "equal", "Cohen's \N{GREEK SMALL LETTER KAPPA}"],
                rows,
                heads=3,
            )
        )
    if results.audit:
        rows = [
            [
                *cells(a.model, f"{a.benchmark}, {a.view}", a.kind),
                Cell(
                    titled(a.metric),
                    (f"by {a.judge}",) if a.judge else (),
                ),
                *cells(f"{a.labelled:,}", share(a.agree), a.missed, a.false_alarms),
                *cells(share(a.judge_share), Cell(share(a.share), (between(a.low, a.high),))),
                *cells(f"{a.weight:.2f}"),
            ]
            for a in results.audit
        ]
        columns = ["model", "benchmark", "prompts", "metric", "labelled", "agree", "missed"]
        columns += ["false alarms", "judge alone", "corrected", "\N{GREEK SMALL LETTER LAMDA}"]
        tables.append(
            Table(
                "audit",
                "Judges held against people's labels",
                columns,
                rows,
                heads=4,
                note="Corrected: PPI++, which joins the judge's verdicts on all and people's "
                "labels on some; \N{GREEK SMALL LETTER LAMDA} = 0 is people alone.",
            )
        )
    empty = ""
    if not tables:
        empty = (
            "One judge, and no labels of people: how far its verdicts can be trusted is not "
            "measured here."
        )
    return Section("judges", "Judges", "How far to trust the verdicts.", tables=tables, empty=empty)


def benchmarks(results: Results) -> Table:
    """What was run: sets of prompts, with their protocol, source and licence."""
    rows = [
        cells(
            Cell(b.title, (b.name,)),
            b.kind.replace("_", " "),
            f"{b.n:,}",
            b.protocol,
            b.source,
            b.license or DASH,
        )
        for b in results.benchmarks
    ]
    return Table(
        "benchmarks",
        "Benchmarks",
        ["benchmark", "measures", "prompts", "protocol", "source", "licence"],
        rows,
        left=frozenset({1, 3, 4, 5}),
    )


def models(results: Results) -> Table:
    """The models that were compared, with their weights' hash."""
    rows = [
        cells(m.name + (" (baseline)" if m.name == results.baseline else ""), m.path, m.sha)
        for m in results.models
    ]
    return Table("models", "Models", ["model", "path", "sha"], rows, left=frozenset({1, 2}))
