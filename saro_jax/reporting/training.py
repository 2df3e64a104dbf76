"""Owns what a report says of training runs: curves, and how each kind of pairs ended."""

from collections.abc import Sequence

from saro_jax.reporting import charts
from saro_jax.reporting.charts import Series
from saro_jax.reporting.material import Training
from saro_jax.reporting.svg import short
from saro_jax.reporting.tables import DASH, Cell, Figure, Section, Sheet, Table, cells

PER_KIND = (
    (
        "rewards/margins",
        "Reward margin",
        "by which the chosen answer's reward is above the other's",
    ),
    ("rewards/accuracies", "Reward accuracy", "share of pairs whose chosen answer has more reward"),
)


def section(runs: Sequence[Training]) -> Section:
    """Curves of every run: loss; of preference runs margins, accuracies and log-probs too."""
    figures: list[Figure] = []
    rows = []
    for run in runs:
        figures += run_figures(run)
        rows += _ends(run)
    columns = ["run", "pairs", "margin, first", "last", "accuracy, first", "last"]
    columns += ["log-prob of chosen, first", "last", "of rejected, first", "last"]
    table = Table(
        "pairs",
        "By kind of pair, first and last line of the metrics",
        columns,
        rows,
        heads=2,
        note="A margin can grow while both log-probs fall: the model then learns to avoid, not to "
        "say.",
    )
    return Section(
        "training",
        "Training",
        "Curves of the runs, as metrics.jsonl has them; longer ones are averaged over neighbours.",
        figures,
        [table] if rows else [],
        ""
        if runs
        else "No training run was given: name its folder (with metrics.jsonl) to see it.",
    )


def run_figures(run: Training) -> list[Figure]:
    """The charts of one run."""
    about = run.name if run.stage in run.name else f"{run.name} ({run.stage})"
    loss = [("train", 1, run.series("loss")), ("held out", 2, run.series("eval_loss"))]
    figures = [_figure(about, "Loss", "loss", loss)]
    for metric, title, meaning in PER_KIND:
        lines = [("all pairs", 0, run.series(metric))]
        lines += [(kind, i, run.series(f"{kind}/{metric}")) for i, kind in _kinds(run, metric)]
        lines.append(("held out", 7, run.series(f"eval_{metric}")))
        share = metric.endswith("accuracies")
        figures.append(_figure(about, title, meaning, lines, share))
    lines = []
    for i, name in enumerate(("chosen", "rejected")):
        lines.append((name, 1 + i, run.series(f"logps/{name}")))
        lines.append((f"{name}, held out", 3 + i, run.series(f"eval_logps/{name}")))
    figures.append(_figure(about, "Log-probs", "mean log-prob of a branch, nats", lines))
    for outcome in ("refused", "complied"):
        kinds = enumerate(run.kinds(outcome), 1)  # of prompts: train.answers
        lines = [
            (kind.removeprefix("answers/"), i, run.series(f"{kind}/{outcome}")) for i, kind in kinds
        ]
        title, meaning = f"Answers: {outcome}", f"share of a kind of prompt that was {outcome}"
        figures.append(_figure(about, title, meaning, lines, share=True))
    return [figure for figure in figures if figure is not None]


def _kinds(run: Training, metric: str) -> list[tuple[int, str]]:
    kinds = run.kinds(metric)
    return list(enumerate(kinds, 1)) if len(kinds) > 1 else []


def _figure(about: str, title: str, meaning: str, lines, share: bool = False) -> Figure | None:
    series = [Series(name, style, points) for name, style, points in lines if points]
    if not series:
        return None
    return Figure(
        charts.lines(
            f"{title}, {about}",
            "; ".join(
                f"{s.name} from {short(s.points[0][1])} to {short(s.points[-1][1])}" for s in series
            ),
            series,
            "step",
            meaning,
            y_range=(min(0.4, *(y for s in series for _, y in s.points)), 1.0) if share else None,
            shares=share,
        ),
        f"{title} \N{MIDDLE DOT} {about}",
        legend=charts.legend([(s.name, s.style) for s in series], dashes=False)
        if len(series) > 1
        else "",
    )


def _ends(run: Training) -> list[list[Cell]]:
    rows = []
    metrics = ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    for label, prefix in [("all", ""), *((kind, f"{kind}/") for kind in run.kinds(metrics[0]))]:
        ends = []
        for metric in metrics:
            points = run.series(prefix + metric)
            say = charts.percent if metric.endswith("accuracies") else short
            ends += [say(points[0][1]), say(points[-1][1])] if points else [DASH, DASH]
        if any(one != DASH for one in ends):
            rows.append(cells(run.name, label, *ends))
    return rows


def sheet(runs: Sequence[Training]) -> Sheet | None:
    """All metrics of all runs, one line a step."""
    if not runs:
        return None
    names = list(dict.fromkeys(name for run in runs for line in run.lines for name in line))
    names.remove("step") if "step" in names else None
    rows = [[run.name, line["step"], *map(line.get, names)] for run in runs for line in run.lines]
    return Sheet("training", ["run", "step", *names], rows)
