"""Owns what a report says of an analysis: probes, likelihood, depth, reflections, margins."""

from collections.abc import Sequence

from saro_jax.analysis import side_by_side
from saro_jax.analysis.results import PROMPT, Analysis, Probe
from saro_jax.reporting import charts, embedding
from saro_jax.reporting.charts import Interval, Series
from saro_jax.reporting.embedding import Styles
from saro_jax.reporting.tables import (
    DASH,
    MINUS,
    Cell,
    Figure,
    Section,
    Table,
    between,
    cells,
    share,
    signed,
)


def sections(analysis: Analysis | None, style: Styles) -> list[Section]:
    """The embedding maps, and the other analyses; `style` gives a model its colour and mark."""
    if analysis is None:
        missing = (
            "No analysis was given: python -m saro_jax.analyse writes the folder to name here."
        )
        return [Section("analysis", "Analyses", empty=missing)]
    return [embedding.section(analysis, style), _others(analysis, style)]


def _others(analysis: Analysis, style: Styles) -> Section:
    figures = [
        *_probes(analysis, style),
        *_depth(analysis, style),
        *_likelihood(analysis, style),
        *_authenticity(analysis, style),
    ]
    tables = _compared(analysis)
    if analysis.probes:
        tables.append(_probe_table(analysis.probes))
    if analysis.likelihood:
        rows = [
            cells(
                x.model,
                x.condition,
                x.n,
                signed(x.mean, 3),
                f"[{signed(x.low, 3)}, {signed(x.high, 3)}]",
            )
            for x in analysis.likelihood
        ]
        tables.append(
            Table(
                "likelihood",
                "log p(safe) \N{MINUS SIGN} log p(unsafe) per token, by what stands before",
                ["model", "context", "n", "mean", "95 % interval"],
                rows,
                heads=2,
                note="A gain that reasoning causes must vanish with its steps shuffled or with "
                "another prompt's reasoning.",
                fold=True,
            )
        )
    if analysis.authenticity:
        rows = [
            cells(
                *(
                    x.model,
                    TESTS.get(x.test, x.test),
                    x.metric,
                    x.n,
                    share(x.before),
                    share(x.after),
                ),
                f"{signed(100 * x.delta)} {between(x.low, x.high)}",
            )
            for x in analysis.authenticity
        ]
        tables.append(
            Table(
                "authenticity",
                "Reflections tampered with",
                ["model", "test", "metric", "n", "before", "after", "difference, points"],
                rows,
                heads=3,
            )
        )
    if analysis.margins:
        rows = [
            cells(
                *(x.model, x.kind, DASH if x.step is None else f"{x.step:,}", x.n or DASH),
                *(_number(x.margin), DASH if x.accuracy is None else share(x.accuracy)),
                *(_number(x.chosen), _number(x.rejected)),
            )
            for x in analysis.margins
        ]
        columns = ["checkpoint", "pairs", "step", "n", "margin", "accuracy", "chosen", "rejected"]
        tables.append(
            Table(
                "margins",
                "Preference pairs by checkpoint",
                columns,
                rows,
                heads=2,
                fold=len(rows) > 12,
            )
        )
    return Section(
        "analysis",
        "Analyses",
        "What lies behind the rates: where intent is visible, how deep safety reaches, and whether "
        "reasoning does anything.",
        figures,
        tables,
        "" if figures or tables else "The analysis has none of these.",
    )


def _compared(analysis: Analysis) -> list[Table]:
    """The models side by side; no table of one model, which the others say all of."""
    rows = side_by_side.rows(analysis)
    if len(analysis.models) < 2 or not rows:
        return []
    table = []
    for row in rows:
        said = [row.values.get(name) for name in analysis.models]
        head = Cell(row.measure.replace("-", MINUS), (row.of,))
        table.append([head, *(_value(one) if one else Cell(DASH) for one in said)])
    return [
        Table(
            "side-by-side",
            "Models side by side",
            ["measure", *analysis.models],
            table,
            note=f"A layer is the one at which {analysis.models[0]}'s number says most, the same "
            "for all models. Points: share of compliance after less before.",
        )
    ]


def _value(one: side_by_side.Value) -> Cell:
    below = (one.below.replace("-", MINUS),) if one.below else ()
    return Cell(one.text.replace("-", MINUS), below)


def _number(value: float | None) -> str:
    return DASH if value is None else signed(value, 3).removeprefix("+")


def _probes(analysis: Analysis, style: Styles) -> list[Figure]:
    figures = []
    for test in dict.fromkeys(p.test for p in analysis.probes):
        mine = [p for p in analysis.probes if p.test == test and p.auroc is not None]
        at_end = [p for p in mine if p.position == PROMPT] or mine
        position = at_end[0].position if at_end else PROMPT
        series = [
            Series(
                model,
                style(model),
                [
                    (p.layer, p.auroc or 0.0)
                    for p in at_end
                    if p.model == model and p.position == position
                ],
            )
            for model in dict.fromkeys(p.model for p in at_end)
        ]
        series = [one for one in series if one.points]
        if series:
            figures.append(
                Figure(
                    charts.lines(
                        f"Probe of harmful intent on {test}",
                        "AUROC by layer and model; 0.5 is chance.",
                        series,
                        "layer",
                        "AUROC",
                        y_range=(min(0.4, *(y for s in series for _, y in s.points)), 1.0),
                        reference=0.5,
                    ),
                    f"Probe of harmful intent, tested on {test.replace('|', ' against ')}",
                    f"Fitted on {at_end[0].train.replace('|', ' against ')}; read at: {position}.",
                    charts.legend([(s.name, s.style) for s in series], lines=True),
                )
            )
        figures += _by_position(mine, test, style)
    return figures


def _by_position(probes: Sequence[Probe], test: str, style: Styles) -> list[Figure]:
    """The best layer's AUROC after each step of the reasoning; none if only prompts were read."""
    positions = list(dict.fromkeys(p.position for p in probes))
    if len(positions) < 2:
        return []
    positions.sort(key=lambda p: (-1 if p == PROMPT else int(p) if p.isdigit() else 10**6, p))
    series = []
    for model in dict.fromkeys(p.model for p in probes):
        points = []
        for i, position in enumerate(positions):
            found = [
                p.auroc for p in probes if (p.model, p.position) == (model, position) and p.auroc
            ]
            if found:
                points.append((i, max(found)))
        series.append(Series(model, style(model), points))
    return [
        Figure(
            charts.lines(
                f"Probe of harmful intent along the reasoning, on {test}",
                "Best layer's AUROC by position.",
                series,
                "read after",
                "AUROC of the best layer",
                y_range=(min(0.4, *(y for s in series for _, y in s.points)), 1.0),
                reference=0.5,
                x_names=[f"step {p}" if p.isdigit() else p for p in positions],
            ),
            f"Along the reasoning, tested on {test.replace('|', ' against ')}",
            "The best of all layers is chosen on the test: an optimistic view.",
            charts.legend([(s.name, s.style) for s in series], lines=True),
        )
    ]


def _probe_table(probes: Sequence[Probe]) -> Table:
    rows = [
        cells(
            *(
                p.model,
                p.layer,
                p.position,
                p.train.replace("|", " / "),
                p.test.replace("|", " / "),
            ),
            *(p.n, DASH if p.auroc is None else f"{p.auroc:.3f}"),
            DASH if p.selectivity is None else signed(p.selectivity, 3),
            "; ".join(f"{name} {value:.2f}" for name, value in p.shift.items()) or DASH,
        )
        for p in probes
    ]
    columns = ["model", "layer", "position", "fitted on", "tested on", "n", "AUROC", "selectivity"]
    return Table(
        "probes",
        "Probes of harmful intent",
        [*columns, "mean P(harm)"],
        rows,
        heads=1,
        left=frozenset({2, 3, 4, 8}),
        note="Selectivity: AUROC less that of the same probe on random labels.",
        fold=True,
    )


def _depth(analysis: Analysis, style: Styles) -> list[Figure]:
    series = []
    for model in dict.fromkeys(d.model for d in analysis.depth):
        mine = sorted((d for d in analysis.depth if d.model == model), key=lambda d: d.k)
        series.append(
            Series(
                model,
                style(model),
                [(d.k, d.asr) for d in mine],
                [(d.low, d.high) for d in mine],
            )
        )
    if not series:
        return []
    return [
        Figure(
            charts.lines(
                "Depth of safety",
                "Share of harmful prompts that are answered, by prefilled tokens of an opening.",
                series,
                "prefilled tokens",
                "answered after the prefill",
                y_range=(0.0, 1.0),
                shares=True,
            ),
            "Depth of safety: harmful prompts answered after a prefilled opening",
            "Safety that is a few tokens deep gives way at once. Bands are 95 % intervals.",
            charts.legend([(s.name, s.style) for s in series], lines=True),
        )
    ]


def _likelihood(analysis: Analysis, style: Styles) -> list[Figure]:
    conditions = dict.fromkeys(x.condition for x in analysis.likelihood)
    rows = []
    for condition in conditions:
        mine = [x for x in analysis.likelihood if x.condition == condition]
        for i, x in enumerate(mine):
            rows.append(
                Interval(
                    condition if i == 0 else "",
                    style(x.model),
                    x.mean,
                    x.low,
                    x.high,
                    f"{x.model}, {condition}: {signed(x.mean, 3)} [{signed(x.low, 3)}, "
                    f"{signed(x.high, 3)}], n = {x.n}",
                    x.low > 0 or x.high < 0,
                )
            )
    if not rows:
        return []
    names = [(m, style(m)) for m in dict.fromkeys(x.model for x in analysis.likelihood)]
    return [
        Figure(
            charts.intervals(
                "Preference for the safe answer",
                "log p(safe) less log p(unsafe) per token by context; the table has the numbers.",
                rows,
                "nats per token towards the safe answer",
            ),
            "Preference for the safe answer, by context",
            "Right of the line the safe answer is likelier. 95 % intervals; filled where they "
            "leave out 0.",
            charts.legend(names),
        )
    ]


TESTS = {
    "delete": "reflection deleted",
    "ban": "markers banned",
    "inject": "harmful reasoning injected",
    "inject_refusal": "over-refusal injected",
    "swap": "reflections swapped",
}


def _authenticity(analysis: Analysis, style: Styles) -> list[Figure]:
    rows = []
    for test in dict.fromkeys((x.test, x.metric) for x in analysis.authenticity):
        mine = [x for x in analysis.authenticity if (x.test, x.metric) == test]
        for i, x in enumerate(mine):
            rows.append(
                Interval(
                    TESTS.get(x.test, x.test) if i == 0 else "",
                    style(x.model),
                    x.delta,
                    x.low,
                    x.high,
                    f"{x.model}, {TESTS.get(x.test, x.test)}, {x.metric}: {share(x.before)} to "
                    f"{share(x.after)}, {signed(100 * x.delta)} {between(x.low, x.high)}, "
                    f"n = {x.n}",
                    x.low > 0 or x.high < 0,
                )
            )
    if not rows:
        return []
    names = [(m, style(m)) for m in dict.fromkeys(x.model for x in analysis.authenticity)]
    return [
        Figure(
            charts.intervals(
                "Reflections tampered with",
                "Change of each rate with its 95 % interval; the table has the numbers.",
                rows,
                "change, percentage points",
                points=True,
            ),
            "Is the reflection real? What changes when it is tampered with",
            "The table says of which rate. 95 % intervals; filled where they leave out 0.",
            charts.legend(names),
        )
    ]
