"""Owns what a report says of embeddings: maps of the prompts, and how far groups lie apart."""

from collections.abc import Callable, Sequence

from saro_jax.analysis.results import Analysis, Map
from saro_jax.reporting import charts
from saro_jax.reporting.charts import Series
from saro_jax.reporting.tables import Figure, Section, Table, cells, share, signed

GROUPS = ("benign", "borderline", "wrapped", "harmful", "jailbreak")
GROUP_STYLES = {"benign": 1, "borderline": 3, "wrapped": 6, "harmful": 2, "jailbreak": 4}
MOST_MAPS, MOST_PAIRS = 12, 6  # pictures; the tables and the folder have all

Styles = Callable[[str], int]


def group_style(name: str) -> int:
    """A group's colour and mark, the same in every map."""
    return GROUP_STYLES.get(name, 5)


def chosen(maps: Sequence[Map]) -> list[Map]:
    """As many maps as are shown, in their order: of every model and layer before a second seed."""
    first = sorted(range(len(maps)), key=lambda i: (maps[i].seed, i))[:MOST_MAPS]
    return [maps[i] for i in sorted(first)]


def _interest(pair: tuple[str, str]) -> tuple[bool, bool]:
    """Pairs of a harmful group and a harmless one first, then those with harmful prompts."""
    bad = [name in ("harmful", "jailbreak") for name in pair]
    return (bad[0] == bad[1], not any(bad))


def section(analysis: Analysis, style: Styles) -> Section:
    """The maps, and the overlap of groups by layer; `style` gives a model its colour and mark."""
    figures = []
    for one in chosen(analysis.maps):
        names = sorted({p.kind for p in one.points}, key=lambda k: (k not in GROUPS, k))
        names.sort(key=lambda k: GROUPS.index(k) if k in GROUPS else len(GROUPS))
        groups = [
            (name, group_style(name), [(p.x, p.y) for p in one.points if p.kind == name])
            for name in names
        ]
        method = "PCA" if one.method == "pca" else f"t-SNE, seed {one.seed}"
        title = f"{one.model}, layer {one.layer} ({method})"
        figures.append(
            Figure(
                charts.scatter(f"Map of prompts: {title}", f"{len(one.points)} prompts.", groups),
                title,
                legend=charts.legend([(name, group_style(name)) for name in names]),
            )
        )
    pairs = sorted(dict.fromkeys(one.groups for one in analysis.overlap), key=_interest)
    models = list(dict.fromkeys(one.model for one in analysis.overlap))
    for pair in pairs[:MOST_PAIRS]:
        series = [
            Series(
                model,
                style(model),
                [
                    (o.layer, o.c2st)
                    for o in analysis.overlap
                    if (o.model, o.groups) == (model, pair)
                ],
            )
            for model in models
        ]
        series = [one for one in series if one.points]
        figures.append(
            Figure(
                charts.lines(
                    f"How far {pair[0]} and {pair[1]} lie apart",
                    "C2ST by layer and model; 50 % is full overlap.",
                    series,
                    "layer",
                    "C2ST balanced accuracy",
                    y_range=(0.4, 1.0),
                    shares=True,
                    reference=0.5,
                ),
                f"{pair[0]} and {pair[1]}: apart by layer",
                legend=charts.legend([(s.name, s.style) for s in series], lines=True),
            )
        )
    rows = [
        cells(
            *(o.model, o.layer, f"{o.groups[0]} / {o.groups[1]}", f"{o.n[0]} / {o.n[1]}"),
            *(share(o.c2st), share(o.c2st_length), share(o.knn_purity)),
            *(f"{o.centroid_cosine:.2f}".replace("-", "\N{MINUS SIGN}"), signed(o.mmd2, 4)),
            "< 0.001" if o.p < 0.001 else f"{o.p:.3f}",
        )
        for o in analysis.overlap
    ]
    columns = ["model", "layer", "groups", "n", "C2ST", "by length alone", "kNN purity"]
    columns += ["centroid cosine", "MMD\N{SUPERSCRIPT TWO}", "p"]
    table = Table(
        "overlap",
        "Overlap of groups by layer",
        columns,
        rows,
        heads=3,
        note="C2ST: balanced accuracy of a linear classifier on held-out prompts, 50 % where the "
        "groups overlap; beside it the same classifier that sees only the number of tokens. p: "
        "permutation test of MMD\N{SUPERSCRIPT TWO}, not corrected for the number of layers.",
        fold=len(rows) > 12,
    )
    more = len(analysis.maps) - MOST_MAPS
    intro = (
        "Where prompts lie in the hidden state of their last token. Axes of t-SNE and distances "
        "between its clusters mean nothing; the overlap below is measured in the full space."
    )
    return Section(
        "embedding",
        "Embeddings",
        intro + (f" {more} more maps are in the analysis' folder." if more > 0 else ""),
        figures,
        [table] if rows else [],
        "" if figures or rows else "The analysis has no maps and no overlap.",
    )
