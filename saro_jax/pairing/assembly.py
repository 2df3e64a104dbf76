"""Assembly: out of all pairs the sets that train, checked by tokens, in their shares, balanced."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saro_jax.data.rows import PreferenceRow
from saro_jax.data.tokenise import RowError, tokenise_row
from saro_jax.pairing import balance, reflections
from saro_jax.records import KINDS, BranchLengths, Pref, Reject
from saro_jax.text.chat import Message

NO_LIMIT = 1 << 30  # tokens: what is too long is training's to cut
ENOUGH = {
    "OP3": "off-policy: enough of OP3",
    "MODE": "quota: enough of MODE",
    "NOOP": "no-op: enough of them",
}
Rule = Callable[[Sequence[Pref]], tuple[list[Pref], list[Reject]]]
# Kinds whose branches differ in the decision, by what the chosen one decides.
SIDES = dict.fromkeys(("OP1", "OP2", "OP3", "OP5", "PPA", "PPC"), "refuse")
SIDES |= dict.fromkeys(("OP4", "PPD"), "answer")
PROCESS: tuple[str, ...] = ("PPA", "PPB", "PPC", "PPD", "PPE", "PPF", "PPG")


@dataclass(frozen=True)
class Shares:
    """How the sets are put together, as config.PairsConfig has it."""

    size: int | None = None
    quotas: str = "25:30:20:25"
    mix: str = "30:20:10:25:5:5:5"
    off_policy: float = 0.2
    balance: float = 0.1
    balance_floor: float = 0.5
    stem: float = 0.08
    no_op: float = 0.1
    refuse: float | None = None


def checked(
    pairs: Sequence[Pref], tokenizer: Any
) -> tuple[list[Pref], list[Reject], dict[str, Any]]:
    """Pairs as training will tokenise them: with lengths, without those that are none.

    Both branches share the tokens of the prefix, backed off to the last common one where a token
    crosses the cut (`meta.prefix_tokens`; data/tokenise.py). The report counts how many branches
    kept the ids that the policy sampled: text that was sampled may tokenise otherwise.
    """
    kept: list[Pref] = []
    rejects: list[Reject] = []
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for pair in pairs:
        if pair.id in seen:
            rejects.append(Reject(pair.id, "duplicate: the same pair twice"))
            continue
        seen.add(pair.id)
        if not pair.chosen.strip() or not pair.rejected.strip():
            rejects.append(Reject(pair.id, "tokens: a branch is empty"))
            continue
        chosen, rejected = ((Message("assistant", text),) for text in (pair.chosen, pair.rejected))
        prompt = (Message("user", pair.prompt),)
        row = PreferenceRow(pair.id, pair.id, pair.kind, 1.0, prompt, pair.prefix, chosen, rejected)
        try:
            item = tokenise_row(row, tokenizer, NO_LIMIT)
        except RowError as error:
            rejects.append(Reject(pair.id, f"tokens: {error}"))
            continue
        sampled = pair.meta.get("ids") or {}
        for branch, ids in zip(item.branches, (sampled.get("w"), sampled.get("l")), strict=True):
            if ids:
                # The end of turn is training's; a continuation's ids are the end of its branch.
                whole = [*item.prefix.tolist(), *branch.ids.tolist()]
                ends = _ends_with(whole, ids) or _ends_with(whole[:-1], ids)
                counts["same" if ends else "other"] += 1
        w, l = (len(branch.ids) for branch in item.branches)  # noqa: E741
        if pair.kind == "PPB" and w >= l:
            rejects.append(Reject(pair.id, "PPB: the early reflection has no fewer tokens"))
            continue
        kept.append(
            pair.model_copy(
                update={
                    "len_tok": BranchLengths(w=w, l=l),
                    "meta": pair.meta | {"prefix_tokens": len(item.prefix)},
                }
            )
        )
    return kept, rejects, {"sampled_ids_kept": counts["same"], "retokenised": counts["other"]}


def _ends_with(whole: Sequence[int], ids: Sequence[int]) -> bool:
    return len(ids) <= len(whole) and list(whole[len(whole) - len(ids) :]) == list(ids)


def assembled(
    outcome: Sequence[Pref], process: Sequence[Pref], shares: Shares
) -> tuple[list[Pref], list[Reject], dict[str, Any]]:
    """The pairs that train, outcome pairs first; what is left out; and what the shares are.

    Outcome pairs: the off-policy share, quotas by kind of prompt. Process pairs: the mix of
    variants, stems, chosen branches without a marker, no-op pairs. Both: lengths, and by weight how
    much asks for a refusal.
    """
    kept, rejects = _settled([*outcome, *process], shares, None)
    if shares.size is not None:
        op, pp = _split(kept)
        quotas: dict[str, float] = dict(zip(KINDS, _numbers(shares.quotas), strict=True))
        op, dropped = balance.quotas(op, _prompt_kind, quotas, shares.size)
        mix = dict(zip(PROCESS, _numbers(shares.mix), strict=True))
        variants = [pair for pair in pp if pair.kind in PROCESS]
        variants, more = balance.quotas(variants, _kind, mix, shares.size)
        others = [pair for pair in pp if pair.kind not in PROCESS]
        # Of pairs about the amount of reasoning no more than of those about brevity.
        brevity = mix["PPF"] / sum(mix.values())
        kept, last = _settled([*op, *variants, *others], shares, brevity)
        rejects += [*dropped, *more, *last]
    kept, _, _ = balance.balanced(kept, shares.balance, 1.0)  # weights alone
    if shares.refuse is not None:
        sides = {"refuse": shares.refuse, "answer": 1 - shares.refuse}
        kept = balance.decided(kept, lambda pair: SIDES.get(pair.kind), sides)
    op, pp = _split(kept)
    return [*op, *pp], rejects, report(op, pp)


def _settled(
    pairs: Sequence[Pref], shares: Shares, brevity: float | None
) -> tuple[list[Pref], list[Reject]]:
    """Pairs that obey all shares at once, with the weights they came with; brevity: of MODE.

    What one rule drops changes the shares of the rest, so that all are asked again until nothing
    goes.
    """
    kept, rejects = list(pairs), []
    counts = Counter(pair.kind for pair in pairs)
    rules = [
        _rule(True, lambda op: balance.capped(op, _is("OP3"), shares.off_policy, ENOUGH["OP3"])),
        _rule(False, lambda pp: reflections.capped_stems(pp, shares.stem)),
        _rule(False, _guarded),
        _rule(False, lambda pp: balance.capped(pp, _is("NOOP"), shares.no_op, ENOUGH["NOOP"])),
        lambda all_: balance.balanced(all_, shares.balance, shares.balance_floor, counts)[:2],
    ]
    if brevity is not None:
        rules.insert(
            1, _rule(False, lambda pp: balance.capped(pp, _is("MODE"), brevity, ENOUGH["MODE"]))
        )
    while True:
        before = len(kept)
        for rule in rules:
            stay, dropped = rule(kept)
            ids = {pair.id for pair in stay}
            kept = [pair for pair in kept if pair.id in ids]
            rejects += dropped
        if len(kept) == before:
            return kept, rejects


def _rule(outcome: bool, of_set: Rule) -> Rule:
    """A rule of one of the two sets as one of both."""

    def rule(pairs: Sequence[Pref]) -> tuple[list[Pref], list[Reject]]:
        op, pp = _split(pairs)
        mine, dropped = of_set(op if outcome else pp)
        return [*mine, *(pp if outcome else op)], dropped

    return rule


def _guarded(pp: Sequence[Pref]) -> tuple[list[Pref], list[Reject]]:
    reflecting, dropped = reflections.guarded([pair for pair in pp if _reflects(pair)])
    return [*(pair for pair in pp if not _reflects(pair)), *reflecting], dropped


def _split(pairs: Sequence[Pref]) -> tuple[list[Pref], list[Pref]]:
    """Outcome pairs and process pairs."""
    op = [pair for pair in pairs if pair.kind.startswith("OP")]
    return op, [pair for pair in pairs if not pair.kind.startswith("OP")]


def report(op: Sequence[Pref], pp: Sequence[Pref]) -> dict[str, Any]:
    """Counts, kinds of prompts, lengths, noise and styles of the sets, as the manifest has them."""
    kinds: dict[str, Any] = {}
    pairs = [*op, *pp]
    for kind in sorted({pair.kind for pair in pairs}, key=_order):
        mine = [pair for pair in pairs if pair.kind == kind]
        lean = balance.imbalance(mine)
        kinds[kind] = {
            "pairs": len(mine),
            "weight": round(sum(pair.weight for pair in mine), 4),
            "prompts": dict(sorted(Counter(map(_prompt_kind, mine)).items())),
            "mean_tokens": {
                side: round(sum(getattr(p.len_tok, side) for p in mine if p.len_tok) / len(mine), 1)
                for side in ("w", "l")
            },
            "length_lean": round(lean, 4),
            "noise": round(sum(pair.noise for pair in mine) / len(mine), 4),
        }
    reflecting = [pair for pair in pp if _reflects(pair)]
    stems = Counter(pair.meta["stem"] for pair in reflecting if pair.meta.get("stem"))
    sides = {
        name: [pair.weight for pair in pairs if SIDES.get(pair.kind) == name]
        for name in ("refuse", "answer")
    }
    return {
        "kinds": kinds,
        "decisions": {
            name: {"pairs": len(weights), "weight": round(sum(weights), 4)}
            for name, weights in sides.items()
        },
        "outcome_pairs": len(op),
        "process_pairs": len(pp),
        "prompt_kinds": dict(sorted(Counter(map(_prompt_kind, op)).items())),
        "reflections": {
            "pairs": len(reflecting),
            "unmarked_share": round(reflections.unmarked_share(reflecting), 4),
            "sources": dict(sorted(Counter(p.meta["source"] for p in reflecting).items())),
            "stems": len(stems),
            "most_of_one_stem": max(stems.values(), default=0),
        },
    }


def _order(kind: str) -> tuple[int, str]:
    return (0 if kind.startswith("OP") else 1 if kind.startswith("PP") else 2, kind)


def _is(kind: str) -> Callable[[Pref], bool]:
    return lambda pair: pair.kind == kind


def _kind(pair: Pref) -> str:
    return pair.kind


def _prompt_kind(pair: Pref) -> str:
    return pair.meta["prompt_kind"]


def _reflects(pair: Pref) -> bool:
    return "source" in pair.meta


def _numbers(shares: str) -> list[float]:
    return [float(one) for one in shares.split(":")]
