"""Balance: quotas among pairs, and lengths that do not give the preferred answer away."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saro_jax.data.shares import FINE, allotted
from saro_jax.records import Pref, Reject

# Kinds that are there to prefer the shorter branch.
SHORTER = ("PPB", "PPF", "NOOP", "MODE")


def quotas(
    pairs: Sequence[Pref], share: Callable[[Pref], str], shares: Mapping[str, float], size: int
) -> tuple[list[Pref], list[Reject]]:
    """At most `size` pairs, in their order, each group by its share; the rest as rejects ("quota").

    What a group lacks goes to the groups that have more, in their shares. A group without a share
    gets nothing.
    """
    counts = {name: 0 for name in shares}
    for pair in pairs:
        if share(pair) in counts:
            counts[share(pair)] += 1
    room = allotted(counts, shares, size)
    kept: list[Pref] = []
    rejects: list[Reject] = []
    for pair in pairs:
        if room.get(share(pair), 0) > 0:
            room[share(pair)] -= 1
            kept.append(pair)
        else:
            rejects.append(Reject(pair.id, f"quota: enough of {share(pair)}"))
    return kept, rejects


def capped(
    pairs: Sequence[Pref], belongs: Callable[[Pref], bool], share: float, reason: str
) -> tuple[list[Pref], list[Reject]]:
    """The pairs, of those that `belongs` names at most `share` of all that stay; the first ones."""
    others = sum(not belongs(pair) for pair in pairs)
    if share >= 1:
        return list(pairs), []
    room = math.floor(others * share / (1 - share) + FINE)
    kept: list[Pref] = []
    rejects: list[Reject] = []
    for pair in pairs:
        if belongs(pair) and room == 0:
            rejects.append(Reject(pair.id, reason))
            continue
        room -= belongs(pair)
        kept.append(pair)
    return kept, rejects


def decided(
    pairs: Sequence[Pref], side: Callable[[Pref], str | None], shares: Mapping[str, float]
) -> list[Pref]:
    """Pairs whose weights by side have the proportions of `shares`: the heavier side loses some.

    A pair without a side stays as it is, and all do where a side has no pair.
    """
    weights = {name: 0.0 for name in shares}
    for pair in pairs:
        name = side(pair)
        if name is not None:
            weights[name] += pair.weight
    if not all(weights.values()):
        return list(pairs)
    unit = min(weights[name] / share for name, share in shares.items())
    factors = {name: share * unit / weights[name] for name, share in shares.items()}
    return [
        pair.model_copy(update={"weight": pair.weight * factors[name]})
        if (name := side(pair)) is not None
        else pair
        for pair in pairs
    ]


def imbalance(pairs: Sequence[Pref]) -> float:
    """Weighted mean of len_w - len_l over the mean length of a branch; 0 without a counted pair."""
    counted = [pair for pair in pairs if pair.len_tok is not None]
    total = sum(pair.weight * _length(pair) for pair in counted)
    return sum(pair.weight * _difference(pair) for pair in counted) / total if total else 0.0


def balanced(
    pairs: Sequence[Pref], bound: float, floor: float, counts: Mapping[str, int] | None = None
) -> tuple[list[Pref], list[Reject], dict[str, dict[str, Any]]]:
    """Pairs with each kind's `imbalance` within +- bound, by dropping and down-weighting.

    In a kind that is out of bounds, pairs that lean the wrong way lose weight, down to half; where
    that is not enough the most lopsided of them go, while `floor` of the kind's pairs stay, or of
    as many as `counts` says that there were. What is out of bounds then is reported. Kinds that are
    there to prefer the shorter branch are left alone. Also returns, by kind, {pairs, before, after,
    within}.
    """
    kept: dict[str, Pref] = {pair.id: pair for pair in pairs}
    rejects: list[Reject] = []
    report: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        mine = [pair for pair in pairs if pair.kind == kind]
        before = imbalance(mine)
        if kind not in SHORTER and abs(before) > bound:
            sign = math.copysign(1.0, before)
            least = math.ceil(floor * (counts or {kind: len(mine)})[kind])
            mine, dropped = _dropped(mine, sign, bound, least)
            mine = _weighted(mine, sign, bound)
            for pair in dropped:
                del kept[pair.id]
                rejects.append(Reject(pair.id, f"length: {kind} would teach length"))
            kept |= {pair.id: pair for pair in mine}
        after = imbalance(mine)
        report[kind] = {
            "pairs": len(mine),
            "before": round(before, 4),
            "after": round(after, 4),
            "within": kind in SHORTER or abs(after) <= bound + 1e-3,
        }
    return list(kept.values()), rejects, report


def _dropped(
    pairs: Sequence[Pref], sign: float, bound: float, least: int
) -> tuple[list[Pref], list[Pref]]:
    """Without the most lopsided pairs, as few as it takes for weights of half to do the rest."""
    order = sorted(pairs, key=lambda pair: (-sign * _lopsided(pair), pair.id))
    gone: list[Pref] = []
    while len(pairs) - len(gone) > max(1, least):
        left = order[len(gone) :]
        if sign * imbalance(_scaled(left, sign, 0.5)) <= bound or sign * _lopsided(left[0]) <= 0:
            break
        gone.append(left[0])
    out = {pair.id for pair in gone}
    return [pair for pair in pairs if pair.id not in out], gone


def _weighted(pairs: Sequence[Pref], sign: float, bound: float) -> list[Pref]:
    """The largest weight in [0.5, 1] for pairs that lean the wrong way that meets the bound."""
    low, high = 0.5, 1.0
    if sign * imbalance(pairs) <= bound:
        return list(pairs)
    for _ in range(30):
        middle = (low + high) / 2
        if sign * imbalance(_scaled(pairs, sign, middle)) <= bound:
            low = middle
        else:
            high = middle
    return _scaled(pairs, sign, low)


def _scaled(pairs: Sequence[Pref], sign: float, factor: float) -> list[Pref]:
    return [
        pair.model_copy(update={"weight": math.floor(pair.weight * factor * 1e4) / 1e4})
        if sign * _difference(pair) > 0
        else pair
        for pair in pairs
    ]


def _difference(pair: Pref) -> float:
    return pair.len_tok.w - pair.len_tok.l if pair.len_tok else 0.0


def _length(pair: Pref) -> float:
    return (pair.len_tok.w + pair.len_tok.l) / 2 if pair.len_tok else 0.0


def _lopsided(pair: Pref) -> float:
    return _difference(pair) / max(_length(pair), 1.0)
