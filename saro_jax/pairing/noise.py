"""Noise: how probable it is that a pair is the wrong way round, for conservative losses."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOST = 0.49  # a pair that is as good as a coin teaches nothing, but trains
PRIOR = 10.0  # audited verdicts that a category without any borrows from all of them
JUDGED = ("safe", "unsafe")


@dataclass(frozen=True)
class Flips:
    """P(unsafe | judged safe) and P(safe | judged unsafe), by category and over all ("")."""

    safe: Mapping[str, float]
    unsafe: Mapping[str, float]


def audited(rows: Iterable[tuple[str, str, str]]) -> Flips:
    """Rates of wrong verdicts out of (category, judged, human) rows, safe or unsafe each.

    A category's rate is drawn towards that over all, by PRIOR rows; that towards 0.5, by one each
    way, so that no finite audit calls a judge perfect.
    """
    rows = list(rows)
    found: dict[str, dict[str, float]] = {}
    for said in JUDGED:
        mine = [(category, human != said) for category, judged, human in rows if judged == said]
        overall = (sum(wrong for _, wrong in mine) + 1) / (len(mine) + 2)
        rates = {"": overall}
        for category in sorted({one for one, _ in mine}):
            own = [wrong for one, wrong in mine if one == category]
            rates[category] = (sum(own) + PRIOR * overall) / (len(own) + PRIOR)
        found[said] = rates
    return Flips(found["safe"], found["unsafe"])


def pair_noise(p_chosen: float | None, p_rejected: float | None) -> float:
    """P(a pair is the wrong way round), out of P(unsafe) of both; 0 where one was not judged.

    With errors a = P(chosen is unsafe) and b = P(rejected is safe), independent, it is reversed
    with a b, and of two equals the order says nothing: a b + (a (1 - b) + b (1 - a)) / 2 =
    (a + b) / 2.
    """
    if p_chosen is None or p_rejected is None:
        return 0.0
    return round(min(MOST, max(0.0, (p_chosen + 1 - p_rejected) / 2)), 4)


def audited_noise(flips: Flips, category: str) -> float:
    """The same, out of an audit's error rates for the prompt's category."""
    a = flips.safe.get(category, flips.safe[""])
    b = flips.unsafe.get(category, flips.unsafe[""])
    return round(min(MOST, (a + b) / 2), 4)


def audit_row(where: str, record: Mapping[str, Any]) -> tuple[str, str, str]:
    """(category, judged, human) of a row {judged, human, category?}; ValueError in one line."""
    for key in ("judged", "human"):
        if record.get(key) not in JUDGED:
            raise ValueError(f"{where}: {key}: {record.get(key)!r}; allowed: safe, unsafe")
    return str(record.get("category", "")), record["judged"], record["human"]
