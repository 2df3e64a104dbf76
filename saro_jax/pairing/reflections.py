"""Reflections: cues and stems of steps that take a thought back, and what an authentic one is."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from saro_jax.pairing.outcomes import RISKY_KINDS
from saro_jax.records import Pref, Prompt, Reject
from saro_jax.text import reasoning, template_teacher
from saro_jax.text.policy import NO_CATEGORY, Policy

FILE = Path(__file__).with_name("reflections.yaml")
Style = Literal["marked", "unmarked"]
UNMARKED_SHARE = 0.4  # of the process pairs, whose chosen branch shows no strict marker


@cache
def stems() -> dict[str, Any]:
    """The packaged stems: by slot, by style where a slot has both."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def side(prompt: Prompt) -> str:
    """Which stems a prompt takes: harmful or benign."""
    return "harmful" if prompt.kind in RISKY_KINDS else "benign"


def cue(style: Style, number: int) -> str:
    """A neutral cue, the number-th in turn."""
    return _turn(stems()["cue"][style], number)


def specific(prompt: Prompt, style: Style, number: int) -> str:
    """A stem that names a mistake, the number-th in turn."""
    return _turn(stems()[side(prompt)][style], number)


def generic(number: int) -> str:
    """An alarm that names nothing."""
    return _turn(stems()["generic"], number)


def needless(number: int) -> str:
    """A safety check that a plain request does not need."""
    return _turn(stems()["needless"], number)


def injected(prompt: Prompt, number: int) -> str:
    """How a thought begins that leads astray on this kind of prompt."""
    return _turn(stems()["injected"][side(prompt)], number)


def _turn(texts: Sequence[str], number: int) -> str:
    return texts[number % len(texts)]


def slots(prompt: Prompt, base_text: str, policy: Policy, step: int, number: int) -> dict[str, str]:
    """What fills a stem: step is counted from 0, `base_text` the request without disguise."""
    known = [policy.categories[one] for one in prompt.categories if one in policy.categories]
    hard = [(one, rule) for one in known for rule in one.rules if rule.type == "hard"]
    categories = template_teacher.stems()["categories"]
    own = categories.get(hard[0][0].id if hard else "", categories["other"])
    rule = hard[0][1].id if hard else next(iter(policy.global_rules), "G1")
    return {
        "step": str(step + 1),
        "topic": _turn(own["topic"], number),
        "rule": rule,
        "excerpt": template_teacher.excerpt(base_text),
    }


def fill(stem: str, values: Mapping[str, str]) -> str:
    """The stem with its slots filled."""
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], stem)


def wrong_rule(rule: str, policy: Policy) -> str:
    """A rule of another category than `rule`'s, the next in the policy."""
    others = [
        one.rules[0].id
        for one in policy.categories.values()
        if one.rules and one.id != rule.split(".")[0]
    ]
    later = [one for one in others if one > rule]
    return (later or others or [rule])[0]


def unauthentic(reflection: str, prompt: Prompt, policy: Policy) -> str | None:
    """What keeps a reflection from being specific; None where it is.

    It says what was wrong with a thought before it and, on a harmful prompt, cites a rule of the
    prompt's category; every rule it cites is the policy's.
    """
    cited = reasoning.cited_rules(reflection)
    unknown = [rule for rule in cited if rule not in policy.rule_ids()]
    if unknown:
        return f"no such rule: {unknown[0]}"
    if reasoning.REASSESSMENT.search(reflection) is None:
        return "names no mistake"
    if prompt.kind not in RISKY_KINDS:
        return f"cites {cited[0]} for a {prompt.kind} prompt" if cited else None
    labelled = [one for one in prompt.categories if one != NO_CATEGORY]
    if not cited:
        return "cites no rule"
    if labelled and not any(rule.split(".")[0] in labelled for rule in cited):
        return f"cites no rule of {', '.join(labelled)}"
    return None


def style_of(text: str) -> Style:
    """Whether a branch begins with a strict marker."""
    return "marked" if reasoning.has_marker(text) else "unmarked"


# ---- over all process pairs ----------------------------------------------------------------------


def capped_stems(pairs: Sequence[Pref], cap: float) -> tuple[list[Pref], list[Reject]]:
    """Pairs of which no stem opens more than `cap` of the chosen branches (at least one may)."""
    most = max(1, math.floor(cap * len(pairs)))
    seen: Counter[str] = Counter()
    kept: list[Pref] = []
    rejects: list[Reject] = []
    for pair in pairs:
        stem = pair.meta.get("stem")
        if stem is not None and seen[stem] >= most:
            rejects.append(Reject(pair.id, f"stem: opens {most} pairs already"))
            continue
        if stem is not None:
            seen[stem] += 1
        kept.append(pair)
    return kept, rejects


def unmarked_share(pairs: Sequence[Pref]) -> float:
    """The share of chosen branches without a strict marker; 1 where there are no pairs."""
    free = sum(style_of(pair.chosen) == "unmarked" for pair in pairs)
    return free / len(pairs) if pairs else 1.0


def guarded(
    pairs: Sequence[Pref], least: float = UNMARKED_SHARE
) -> tuple[list[Pref], list[Reject]]:
    """Pairs of which `least` have a chosen branch without a marker; the last marked ones go."""
    kept = list(pairs)
    rejects: list[Reject] = []
    for pair in reversed(pairs):
        if unmarked_share(kept) >= least:
            break
        if style_of(pair.chosen) == "marked":
            kept.remove(pair)
            rejects.append(Reject(pair.id, "marker: too many chosen branches with one"))
    return kept, rejects
