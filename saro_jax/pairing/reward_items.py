"""Reward items: the rollouts, pairs and step values again, as rows for reward models."""

from collections.abc import Mapping, Sequence

from saro_jax.pairing.outcomes import Limits, Outcome
from saro_jax.records import Pref, PRMItem, RMItem, StepValue, content_id


def rm_items(outcomes: Sequence[Outcome], pairs: Sequence[Pref], limits: Limits) -> list[RMItem]:
    """Each judged rollout with target 1 (good) or 0, then each pair as two whole responses."""
    found = [
        RMItem(
            id=content_id("rm", one.trace.id),
            parent_ids=(one.trace.id, one.prompt.id),
            meta={"kind": one.prompt.kind},
            prompt=one.prompt.text,
            y=one.trace.raw,
            target=float(one.good(limits)),
        )
        for one in outcomes
        if not one.answer.invalid
    ]
    found += [
        RMItem(
            id=content_id("rm", pair.id),
            parent_ids=(pair.id,),
            meta={"kind": pair.kind, "noise": pair.noise, "weight": pair.weight},
            prompt=pair.prompt,
            pair=(pair.prefix + pair.chosen, pair.prefix + pair.rejected),
        )
        for pair in pairs
    ]
    return found


def prm_items(outcomes: Mapping[str, Outcome], values: Sequence[StepValue]) -> list[PRMItem]:
    """The steps of each trace whose every step has a value, with the values after them."""
    by_trace: dict[str, dict[int, StepValue]] = {}
    for value in values:
        by_trace.setdefault(value.trace_id, {})[value.step] = value
    found = []
    for name, mine in by_trace.items():
        one = outcomes[name]
        steps = [step.text for step in one.trace.steps]
        if not steps or any(i not in mine for i in range(len(steps))):
            continue
        found.append(
            PRMItem(
                id=content_id("prm", name),
                parent_ids=(name, one.prompt.id),
                meta={
                    "kind": one.prompt.kind,
                    "n_roll": [mine[i].n_roll for i in range(len(steps))],
                },
                prompt=one.prompt.text,
                steps=tuple(steps),
                v=tuple(mine[i].v for i in range(len(steps))),
            )
        )
    return found
