"""Outcome pairs OP1 to OP6 (OP-COT): whole responses to one prompt, a good one and a bad one."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saro_jax.pairing.noise import pair_noise
from saro_jax.pairing.outcomes import RISKY_KINDS, Limits, Outcome, labels
from saro_jax.records import (
    RITD,
    BranchLabels,
    Pref,
    PrefKind,
    Prompt,
    Reject,
    content_id,
)
from saro_jax.text import reasoning

OFF_POLICY_WEIGHT = 0.5  # of OP3, whose rejected answer the policy would not give


@dataclass(frozen=True)
class Choice:
    """How pairs are chosen: `hard` = share of rejected answers that are the most unsafe ones."""

    hard: float = 0.5
    per_prompt: int = 2
    floor: int = 40  # reasoning tokens at least of a chosen answer to a harmful prompt
    seed: int = 0


def outcome_pairs(
    outcomes: Sequence[Outcome],
    teacher: Mapping[str, RITD],
    negatives: Sequence[Outcome],
    limits: Limits,
    choice: Choice,
) -> tuple[list[Pref], list[Reject]]:
    """All outcome pairs, prompt by prompt, and the prompts that gave none, with the reason.

    `teacher` has the warmup's row of a prompt, by the prompt's text, for prompts without a good
    answer (OP2). `negatives` are answers of another model in the same format, for prompts without
    a bad one (OP3).
    """
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.prompt.id, []).append(one)
    others: dict[str, list[Outcome]] = {}
    for one in negatives:
        others.setdefault(one.prompt.id, []).append(one)
    pairs: list[Pref] = []
    rejects: list[Reject] = []
    for name, mine in groups.items():
        found = of_prompt(
            mine, teacher.get(mine[0].prompt.text), others.get(name, ()), limits, choice
        )
        if not found:
            rejects.append(Reject(name, f"no outcome pair: {_why(mine, limits)}"))
        pairs += found
    return pairs, rejects


def of_prompt(
    mine: Sequence[Outcome],
    taught: RITD | None,
    others: Sequence[Outcome],
    limits: Limits,
    choice: Choice,
) -> list[Pref]:
    """The outcome pairs of one prompt, at most `choice.per_prompt`, the policy's own first."""
    prompt = mine[0].prompt
    rng = random.Random(f"{choice.seed}:{prompt.id}")
    good = ranked([one for one in mine if one.good(limits)], choice.floor)
    rate = len(good) / len(mine)
    found: list[Pref] = []
    if prompt.kind in RISKY_KINDS:
        bad = [one for one in mine if one.unsafe(limits)]
        if good and bad:
            found += _matched("OP1", good, _rejected(bad, rng, choice), rate)
        elif bad and taught is not None:
            worst = _rejected(bad, rng, choice)[0]
            found.append(_taught("OP2", taught, worst, rate))
        elif good and not bad:
            foreign = [one for one in others if one.unsafe(limits)]
            if foreign:
                worst = _rejected(foreign, rng, choice)[0]
                one = pair("OP3", prompt, good[0], worst, rate=rate)
                found.append(one.model_copy(update={"weight": OFF_POLICY_WEIGHT}))
        clear = [
            one for one in good if (p := one.reasoning.p_unsafe) is not None and p < limits.safe
        ]
        thought = [
            one
            for one in mine
            if one.complete
            and one.safe(limits)
            and (p := one.reasoning.p_unsafe) is not None
            and p > limits.unsafe
        ]
        if clear and thought:
            worst = _rejected(thought, rng, choice)[0]
            # Second, so that two OP1 do not take its place.
            found.insert(1, pair("OP5", prompt, clear[0], worst, rate=rate))
    else:
        wrong = [one for one in mine if one.complete and one.correct is False and not one.refuses()]
        if good and wrong:
            found.append(pair("OP6", prompt, good[0], rng.choice(wrong), rate=rate))
        refused = [one for one in mine if one.refuses()]
        if good and refused:
            found += _matched("OP4", good, rng.sample(refused, len(refused)), rate)
    return found[: choice.per_prompt]


def ranked(good: Sequence[Outcome], floor: int) -> list[Outcome]:
    """Good answers, the shortest reasoning first (shortest_q): those of full help, then others.

    On harmful prompts those that reason in fewer than `floor` tokens come last, longest first.
    """

    def key(one: Outcome) -> tuple[bool, int, int, str]:
        tokens = one.trace.n_tok.reason or 0
        short = one.prompt.kind in RISKY_KINDS and tokens < floor
        return short, -(one.answer.helpful or 5), -tokens if short else tokens, one.trace.id

    return sorted(good, key=key)


def pair(
    kind: PrefKind,
    prompt: Prompt,
    chosen: Outcome,
    rejected: Outcome,
    *,
    rate: float | None = None,
) -> Pref:
    """A pair of two whole traces; `rate` is the prompt's pass rate, for its difficulty."""
    by_answer = kind != "OP5"
    p = [one.answer.p_unsafe if by_answer else one.reasoning.p_unsafe for one in (chosen, rejected)]
    return Pref(
        id=content_id(kind, chosen.trace.id, rejected.trace.id),
        parent_ids=(chosen.trace.id, rejected.trace.id, prompt.id),
        meta=_meta(prompt, rate) | {"ids": _ids(chosen, rejected)},
        kind=kind,
        prompt=prompt.text,
        chosen=chosen.trace.raw,
        rejected=rejected.trace.raw,
        labels=BranchLabels(w=dict(labels(chosen)), l=dict(labels(rejected))),
        noise=pair_noise(*p),
    )


def _matched(
    kind: PrefKind, good: Sequence[Outcome], bad: Sequence[Outcome], rate: float
) -> list[Pref]:
    """Pairs of the best good answers with the first bad ones, each answer once."""
    return [
        pair(kind, one.prompt, one, other, rate=rate) for one, other in zip(good, bad, strict=False)
    ]


def _rejected(bad: Sequence[Outcome], rng: random.Random, choice: Choice) -> list[Outcome]:
    """Bad answers in the order they are taken: the most unsafe one, or, by chance, any."""
    left = sorted(bad, key=lambda one: (-(one.answer.p_unsafe or 0), one.trace.id))
    order: list[Outcome] = []
    while left:
        order.append(left.pop(0 if rng.random() < choice.hard else rng.randrange(len(left))))
    return order


def _taught(kind: PrefKind, row: RITD, rejected: Outcome, rate: float) -> Pref:
    prompt = rejected.prompt
    return Pref(
        id=content_id(kind, row.id, rejected.trace.id),
        parent_ids=(row.id, rejected.trace.id, prompt.id),
        meta=_meta(prompt, rate) | {"ids": _ids(None, rejected)},
        kind=kind,
        prompt=prompt.text,
        chosen=reasoning.render(row.reasoning, row.answer),
        rejected=rejected.trace.raw,
        labels=BranchLabels(w={"taught": row.decision}, l=dict(labels(rejected))),
        # The warmup's row passed its filters; what is left is the doubt about the other.
        noise=pair_noise(0.0, rejected.answer.p_unsafe),
    )


def _meta(prompt: Prompt, rate: float | None) -> dict[str, object]:
    found: dict[str, object] = {"prompt_kind": prompt.kind}
    if rate is not None:
        found["difficulty"] = round(1 - rate, 4)
    return found


def _ids(chosen: Outcome | None, rejected: Outcome | None) -> dict[str, object]:
    """The sampled token ids of both branches, where the generator told them."""
    return {
        side: one.trace.meta.get("ids") if one is not None else None
        for side, one in (("w", chosen), ("l", rejected))
    }


def _why(mine: Sequence[Outcome], limits: Limits) -> str:
    good = sum(one.good(limits) for one in mine)
    if all(one.answer.invalid for one in mine):
        return "no valid verdict"
    if good == len(mine):
        return "all rollouts are good"
    return "no rollout is good" if not good else "nothing that is surely bad"
