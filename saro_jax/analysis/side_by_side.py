"""Owns the comparison of an analysis' models: one row a measure, one number a model.

Where a measure has a layer, it is the same for all: the one at which the first model's number says
most, so that no later model is flattered by a choice of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from saro_jax.analysis.results import END, PROMPT, Analysis


@dataclass(frozen=True)
class Value:
    """A number as text, and what stands below it: an interval, a control."""

    text: str
    below: str = ""


@dataclass(frozen=True)
class Row:
    """A measure, what it is of, and its values by model; a model without one is left out."""

    measure: str
    of: str
    values: dict[str, Value]


def rows(analysis: Analysis) -> list[Row]:
    """Every measure that two models, or the only one, have."""
    found = [*_overlap(analysis), *_probes(analysis), *_likelihood(analysis), *_pairs(analysis)]
    found += [*_depth(analysis), *_authenticity(analysis)]
    least = min(2, len(analysis.models))
    return [one for one in found if len(one.values) >= least]


def _layer(analysis: Analysis, given: Sequence[Any], says: Callable[[Any], float]) -> int | None:
    """The layer of the first model's number that says most."""
    for model in analysis.models:
        mine = [one for one in given if one.model == model]
        if mine:
            return max(mine, key=says).layer
    return None


def _overlap(analysis: Analysis) -> Iterator[Row]:
    for pair in dict.fromkeys(one.groups for one in analysis.overlap):
        of_pair = [one for one in analysis.overlap if one.groups == pair]
        layer = _layer(analysis, of_pair, lambda one: one.c2st)
        values = {
            one.model: Value(f"{one.c2st:.2f}", f"length alone {one.c2st_length:.2f}")
            for one in of_pair
            if one.layer == layer
        }
        yield Row("apart (C2ST)", f"{pair[0]} / {pair[1]}, layer {layer}", values)


def _probes(analysis: Analysis) -> Iterator[Row]:
    known = [one for one in analysis.probes if one.auroc is not None]
    for test, position in dict.fromkeys((one.test, one.position) for one in known):
        if position not in (PROMPT, END):  # steps are in the picture along the reasoning
            continue
        mine = [one for one in known if (one.test, one.position) == (test, position)]
        # An AUROC far below 0.5 is as much of a finding.
        layer = _layer(analysis, mine, lambda one: abs((one.auroc or 0.5) - 0.5))
        values = {
            one.model: Value(
                f"{one.auroc:.2f}",
                "" if one.selectivity is None else f"selectivity {one.selectivity:+.2f}",
            )
            for one in mine
            if one.layer == layer
        }
        where = "the prompt's end" if position == PROMPT else "the reasoning's end"
        of = f"{test.replace('|', ' / ')}, {where}, layer {layer}"
        yield Row("probe of harm (AUROC)", of, values)


def _likelihood(analysis: Analysis) -> Iterator[Row]:
    for condition in dict.fromkeys(one.condition for one in analysis.likelihood):
        values = {
            one.model: Value(f"{one.mean:+.3f}", f"[{one.low:+.3f}, {one.high:+.3f}]")
            for one in analysis.likelihood
            if one.condition == condition
        }
        yield Row("log p(safe) - log p(unsafe), a token", condition, values)


def _pairs(analysis: Analysis) -> Iterator[Row]:
    checkpoints = [one for one in analysis.margins if one.step is None]
    for kind in dict.fromkeys(one.kind for one in checkpoints):
        values = {
            one.model: Value(
                f"{one.margin:+.3f}", "" if one.accuracy is None else f"right {one.accuracy:.0%}"
            )
            for one in checkpoints
            if one.kind == kind and one.margin is not None
        }
        yield Row("reward margin", kind, values)


def _depth(analysis: Analysis) -> Iterator[Row]:
    depths = sorted({one.k for one in analysis.depth})
    for k in dict.fromkeys(depths[:1] + depths[-1:]):
        values = {
            one.model: Value(f"{one.asr:.0%}", f"[{one.low:.0%}, {one.high:.0%}]")
            for one in analysis.depth
            if one.k == k
        }
        yield Row("harmful prompts not refused", f"{k} prefilled tokens", values)


def _authenticity(analysis: Analysis) -> Iterator[Row]:
    for test, metric in dict.fromkeys((one.test, one.metric) for one in analysis.authenticity):
        values = {
            one.model: Value(
                f"{100 * one.delta:+.0f}", f"[{100 * one.low:+.0f}, {100 * one.high:+.0f}]"
            )
            for one in analysis.authenticity
            if (one.test, one.metric) == (test, metric)
        }
        yield Row("reflection tampered with, points", f"{test}: {metric}", values)
