"""What becomes of a teacher's answers: filters, shortest rejection sampling (SRS), yields."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from saro_jax.data.decontamination import jaccard, shingles, words
from saro_jax.records import KINDS, Prompt, Refusal, Reject, Trace
from saro_jax.text import reasoning
from saro_jax.text.policy import NO_CATEGORY, Policy
from saro_jax.text.refusal import refuses

FILTERS = (
    *("parse", "format", "leak", "citation", "consistency", "answer_safety", "reasoning_safety"),
    *("over_refusal", "quality", "dedup"),
)
# (prompt, text) each to a verdict each; None is an invalid verdict, which never passes.
Verdicts = Callable[[Sequence[tuple[str, str]]], Sequence[Any]]
CountTokens = Callable[[str], int]

LEAKS = re.compile(
    r"\b(?:polic(?:y|ies)|rules?|guidelines?|instructions?|document|system prompt)\b[^.\n]{0,20}\b"
    r"(?:provided|given|above|supplied|listed|attached|i was (?:told|given))\b"
    r"|\b(?:provided|given|above|supplied|attached) (?:safety )?(?:polic|guidelin|instruction)\w*"
    r"|\bas (?:instructed|i was (?:told|instructed))\b|\bi was (?:told|instructed) to\b"
    r"|\bmy instructions (?:say|are|tell)\b|\buser prompt:|\bsystem prompt\b|\{\{|\}\}"
    r"|\bT[1-8]_|\bdecision: mode\b",
    re.IGNORECASE,
)


def verdict_by_rules(pairs: Sequence[tuple[str, str]]) -> list[Refusal]:
    """FR or FC by the wording of the answers (text/refusal.py)."""
    return ["FR" if refuses(answer) else "FC" for _, answer in pairs]


@dataclass(frozen=True)
class Judges:
    """What judges the texts; a judge that is None is not asked, and its filter lets all pass.

    refusal: FC, FR or PR of an answer. answer_risk, reasoning_risk: probability that the text is
    unsafe. quality: three scores 0 to 10. Each takes (prompt, text) pairs, quality the raw text.
    """

    refusal: Verdicts = verdict_by_rules
    answer_risk: Verdicts | None = None
    reasoning_risk: Verdicts | None = None
    quality: Verdicts | None = None


@dataclass(frozen=True)
class Limits:
    """Thresholds of the filters."""

    min_steps: int = 2
    max_steps: int = 24
    max_reasoning_tokens: int = 768
    answer_risk: float = 0.2
    reasoning_risk: float = 0.3
    quality: float = 8.0


@dataclass
class Judged:
    """An answer that passed so far, with the verdicts on it."""

    trace: Trace
    prompt: Prompt
    verdicts: dict[str, Any] = field(default_factory=dict)


def passed(
    items: Sequence[Judged], policy: Policy, judges: Judges, limits: Limits
) -> tuple[list[Judged], list[Reject]]:
    """What passes all filters, in order, and the rest with the first reason against each.

    The reason's category is the filter's name. Cheap filters come first, and a judge only sees what
    is left; verdicts are added to the items.
    """
    rejects: list[Reject] = []

    def drop(kept: Sequence[Judged], complaints: Sequence[str | None], name: str) -> list[Judged]:
        left = []
        for item, complaint in zip(kept, complaints, strict=True):
            if complaint is None:
                left.append(item)
                continue
            record = item.trace.model_dump(mode="json")
            if item.verdicts:
                record["meta"] = record["meta"] | {"verdicts": item.verdicts}
            rejects.append(Reject(item.trace.id, f"{name}: {complaint}", record=record))
        return left

    kept = list(items)
    kept = drop(kept, [_parse(item.trace) for item in kept], "parse")
    kept = drop(kept, [_format(item.trace, policy, limits) for item in kept], "format")
    kept = drop(kept, [_leak(item.trace) for item in kept], "leak")
    kept = drop(kept, [_citation(item, policy) for item in kept], "citation")
    answers = [(item.prompt.text, item.trace.parsed.answer) for item in kept]
    _keep("refusal", kept, judges.refusal(answers) if kept else [])
    kept = drop(kept, [_consistency(item) for item in kept], "consistency")
    if judges.answer_risk is not None:
        risky = [item for item in kept if item.prompt.kind in ("harmful", "jailbreak")]
        pairs = [(item.prompt.text, item.trace.parsed.answer) for item in risky]
        _keep("answer_risk", risky, judges.answer_risk(pairs) if risky else [])
        kept = drop(kept, [_risk(i, "answer_risk", limits) for i in kept], "answer_safety")
    if judges.reasoning_risk is not None and kept:
        pairs = [(item.prompt.text, item.trace.parsed.reasoning) for item in kept]
        _keep("reasoning_risk", kept, judges.reasoning_risk(pairs))
        kept = drop(kept, [_risk(i, "reasoning_risk", limits) for i in kept], "reasoning_safety")
    kept = drop(kept, [_over_refusal(item) for item in kept], "over_refusal")
    if judges.quality is not None and kept:
        _keep("quality", kept, judges.quality([(i.prompt.text, i.trace.raw) for i in kept]))
    kept = drop(kept, [_quality(item, limits) for item in kept], "quality")
    return kept, rejects


def _keep(name: str, items: Sequence[Judged], verdicts: Sequence[Any]) -> None:
    for item, verdict in zip(items, verdicts, strict=True):
        item.verdicts[name] = verdict


def _parse(trace: Trace) -> str | None:
    if trace.parsed.status != "ok":
        return trace.parsed.status
    return None if trace.finish != "length" else "cut off"


def _format(trace: Trace, policy: Policy, limits: Limits) -> str | None:
    count, tokens = len(trace.steps), trace.n_tok.reason or 0
    if not limits.min_steps <= count <= limits.max_steps:
        return f"{count} steps, allowed {limits.min_steps} to {limits.max_steps}"
    if tokens > limits.max_reasoning_tokens:
        return f"{tokens} reasoning tokens, allowed {limits.max_reasoning_tokens}"
    if len(re.findall(r"^\W*decision:", trace.parsed.reasoning, re.I | re.M)) > 1:
        return "more than one decision line"
    if trace.decision == "none":
        return "no decision line at the end of the reasoning"
    if trace.decision not in policy.modes:
        return f"decision {trace.decision} is no mode of the policy"
    return None


def _leak(trace: Trace) -> str | None:
    match = LEAKS.search(trace.parsed.reasoning) or LEAKS.search(trace.parsed.answer)
    return f"{match.group()!r}" if match else None


def _citation(item: Judged, policy: Policy) -> str | None:
    cited = reasoning.cited_rules(item.trace.parsed.reasoning)
    unknown = [rule for rule in cited if rule not in policy.rule_ids()]
    if unknown:
        return f"no such rule: {unknown[0]}"
    kind = item.prompt.kind
    labelled = [one for one in item.prompt.categories if one != NO_CATEGORY]
    if kind in ("harmful", "jailbreak"):
        if not any(rule.split(".")[0] in labelled or not labelled for rule in cited):
            return f"cites no rule of {', '.join(labelled) or 'any category'}"
    elif kind == "benign" and cited:
        return f"cites {cited[0]} for a benign prompt"
    return None


def _consistency(item: Judged) -> str | None:
    verdict, mode = item.verdicts["refusal"], item.trace.decision
    if verdict not in ("FC", "FR", "PR"):
        return "invalid verdict on refusal"
    expected = {"refuse": ("FR",), "safe_complete": ("FC", "FR", "PR")}.get(mode, ("FC",))
    return None if verdict in expected else f"decision {mode}, answer {verdict}"


def _risk(item: Judged, name: str, limits: Limits) -> str | None:
    if name not in item.verdicts:
        return None
    risk, limit = item.verdicts[name], getattr(limits, name)
    if risk is None:
        return "invalid verdict"
    return None if risk < limit else f"{risk:.3f}, allowed below {limit}"


def _over_refusal(item: Judged) -> str | None:
    if item.prompt.kind in ("harmful", "jailbreak") or item.verdicts["refusal"] == "FC":
        return None
    return f"answer {item.verdicts['refusal']} to a {item.prompt.kind} prompt"


def _quality(item: Judged, limits: Limits) -> str | None:
    final = item.prompt.meta.get("final")
    if final is not None:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", item.trace.parsed.answer)
        if not numbers or _number(numbers[-1]) != _number(final):
            return f"answer is not {final}"
    if "quality" not in item.verdicts:
        return None
    scores = item.verdicts["quality"]
    if scores is None:
        return "invalid scores"
    if min(scores) < limits.quality:
        return f"scores {', '.join(f'{one:g}' for one in scores)}, allowed from {limits.quality:g}"
    return None


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


# ---- shortest rejection sampling -----------------------------------------------------------------

SRSMode = Literal["shortest", "shortest_q", "pctl", "pareto"]


def ranked(accepted: Sequence[Judged], mode: SRSMode, floor: int) -> list[Judged]:
    """The accepted answers of one prompt, the one to keep first.

    shortest: by reasoning tokens. shortest_q: those of full score (within 1 of the best possible,
    where scores are there) that reach the floor of tokens first, by tokens. pctl: by distance from
    the 25th percentile of tokens. pareto: the shortest, then the best scored. `floor` counts for
    harmful prompts and jailbreaks only.
    """

    def length(item: Judged) -> int:
        return item.trace.n_tok.reason or 0

    by_length = sorted(accepted, key=lambda item: (length(item), item.trace.id))
    if mode == "shortest" or not accepted:
        return by_length
    if mode == "pctl":
        target = length(by_length[(len(by_length) - 1) // 4])
        return sorted(by_length, key=lambda item: (abs(length(item) - target), length(item)))
    if mode == "pareto":
        best = sorted(by_length, key=lambda item: -_score(item))
        first = by_length[0]
        return [first, *(item for item in best if item is not first)]

    def lacks(item: Judged) -> tuple[bool, bool]:
        needs = floor if item.prompt.kind in ("harmful", "jailbreak") else 0
        return (_score(item) < 9, length(item) < needs)

    # Below the floor the longest is the least degenerate.
    return sorted(
        by_length, key=lambda item: (lacks(item), -length(item) if lacks(item)[1] else length(item))
    )


def _score(item: Judged) -> float:
    scores = item.verdicts.get("quality")
    return min(scores) if scores else 10.0


def chosen(
    groups: Sequence[Sequence[Judged]], mode: SRSMode, floor: int, max_overlap: float
) -> tuple[list[Judged], list[Reject]]:
    """What is kept of each prompt's accepted answers: one, two with `pareto`; and duplicates.

    An answer whose reasoning shares more than `max_overlap` of its runs of 8 words (Jaccard) with a
    kept one of the same kind and first category gives way to the prompt's next ("dedup").
    """
    kept: list[Judged] = []
    rejects: list[Reject] = []
    index: dict[tuple[Any, ...], list[set]] = {}
    for accepted in groups:
        order = ranked(accepted, mode, floor)
        wanted = 2 if mode == "pareto" else 1
        for item in order:
            if not wanted:
                break
            grams = set(shingles(words(item.trace.parsed.reasoning), 8))
            key = (item.prompt.kind, *item.prompt.categories[:1])
            near = [(key, gram) for gram in grams]
            rivals = {id(one): one for place in near for one in index.get(place, ())}
            if any(jaccard(grams, one) > max_overlap for one in rivals.values()):
                rejects.append(Reject(item.trace.id, "dedup: reasoning of another prompt"))
                continue
            for place in near:
                index.setdefault(place, []).append(grams)
            kept.append(item)
            wanted -= 1
    return kept, rejects


# ---- reports -------------------------------------------------------------------------------------


def length_report(
    prompts: Sequence[Prompt],
    accepted: Mapping[str, Sequence[Judged]],
    n: int,
    mode: SRSMode,
    floor: int,
) -> list[dict[str, Any]]:
    """Had only the first k samples been drawn: prompts with an accepted one, tokens of the kept.

    One entry for each k of 1, 2, 4, 8, 16 up to n; tokens are means over those prompts, null
    where there are none.
    """
    report = []
    for k in sorted({*(size for size in (1, 2, 4, 8, 16) if size <= n), n}):
        lengths = []
        for prompt in prompts:
            first = [item for item in accepted.get(prompt.id, ()) if item.trace.meta["i"] < k]
            if first:
                lengths.append(ranked(first, mode, floor)[0].trace.n_tok.reason or 0)
        mean = round(sum(lengths) / len(lengths), 2) if lengths else None
        share = round(len(lengths) / len(prompts), 4) if prompts else None
        report.append({"n": k, "accepted": share, "reasoning_tokens": mean})
    return report


def yields(
    prompts: Sequence[Prompt],
    traces: Sequence[Trace],
    accepted: Sequence[Judged],
    kept: Sequence[Judged],
    rejects: Sequence[Reject],
) -> dict[str, dict[str, Any]]:
    """Per kind: prompts, samples, accepted ones, rows, share of prompts with a row, reasons."""
    kind_of = {prompt.id: prompt.kind for prompt in prompts}
    kind_of_trace = {trace.id: kind_of[trace.prompt_id] for trace in traces}
    report: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        mine = [prompt for prompt in prompts if prompt.kind == kind]
        if not mine:
            continue
        with_row = {item.prompt.id for item in kept if item.prompt.kind == kind}
        reasons = Counter(
            reject.reason.split(":")[0]
            for reject in rejects
            if (kind_of_trace.get(reject.id) or kind_of.get(reject.id)) == kind
        )
        report[kind] = {
            "prompts": len(mine),
            "samples": sum(1 for name in kind_of_trace.values() if name == kind),
            "accepted": sum(1 for item in accepted if item.prompt.kind == kind),
            "rows": sum(1 for item in kept if item.prompt.kind == kind),
            "yield": round(len(with_row) / len(mine), 4),
            "drop_reasons": dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
        }
    return report


def decisions(accepted: Sequence[Judged], kept: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Per kind the shares of each decision among accepted answers and among kept ones.

    They should agree within a few points: else the choice of the shortest prefers a decision.
    """
    report: dict[str, dict[str, Any]] = {}
    for name, items in (("accepted", accepted), ("kept", kept)):
        for kind in KINDS:
            mine = Counter(item.trace.decision for item in items if item.prompt.kind == kind)
            if mine:
                shares = {one: round(mine[one] / mine.total(), 4) for one in sorted(mine)}
                report.setdefault(kind, {})[name] = shares
    return report
