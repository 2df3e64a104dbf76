"""Owns what a teacher does beside answering: labels (T5), scores (T6), repair (T3), edits (T8).

Each is a request that is journalled like an answer. What does not come back in the asked form
counts as not said: a prompt without label, a score that is invalid, no repair, nothing shorter.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from saro_jax.data.filters import Judged, Verdicts
from saro_jax.generation.requests import Request
from saro_jax.generation.teaching import Asking, Reply
from saro_jax.records import KINDS, Journal, Prompt, Sampler, content_id
from saro_jax.text import policy as policies
from saro_jax.text import reasoning, template
from saro_jax.text.policy import NO_CATEGORY, Policy

LABELS = 2  # draws of a label, which have to agree
DOUBT = 0.5  # label_conf where they do not
SHORTER = 0.6  # share of its words that reasoning is to be shortened to
FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)


def labelled(
    asking: Asking, prompts: Sequence[Prompt], journal: Journal
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts, those without category with what T5 says of them; and counts of what it said.

    A disguised prompt gets the categories of the request inside. Where two draws disagree, or say
    another kind than the prompt has, `label_conf` is 0.5 and `meta` holds what they said.
    """
    policy = asking.policy
    todo = [
        one for one in prompts if not one.categories and one.attack is None and one.kind != "benign"
    ]
    sampler = asking.sampler.model_copy(update={"seed": asking.seed})
    slots = {"definitions": policies.definitions(policy), "none": NO_CATEGORY}
    requests = [
        _request("label", template.render("t5_classify", slots | {"prompt": one.text}), sampler)
        for one in todo
    ]
    made = asking.answers(requests, journal, "labels")
    labels: dict[str, dict[str, Any]] = {}
    report = {"asked": len(todo), "agreed": 0, "doubtful": 0, "invalid": 0}
    for prompt, request in zip(todo, requests, strict=True):
        said = [label(one["text"], policy) for one in made.get(request.id, [])]
        found = [one for one in said if one is not None]
        if not found:
            report["invalid"] += 1
            continue
        shared = set.intersection(*(set(categories) for categories, _ in found))
        categories = [one for one in found[0][0] if one in shared] or found[0][0]
        agreed = len(found) == LABELS and all(set(c) == set(found[0][0]) for c, _ in found)
        agreed &= all(kind == prompt.kind for _, kind in found)
        report["agreed" if agreed else "doubtful"] += 1
        confidence = 1.0 if agreed else DOUBT
        labels[prompt.id] = {"categories": tuple(categories), "label_conf": confidence}
        if not agreed:
            heard = [{"categories": list(c), "kind": kind} for c, kind in found]
            labels[prompt.id]["meta"] = prompt.meta | {"labels": heard}
    found_prompts = []
    for prompt in prompts:
        own = labels.get(prompt.id)
        inside = labels.get(prompt.base_id or "") if prompt.attack and not prompt.categories else {}
        inside = {k: v for k, v in (inside or {}).items() if k != "meta"}
        found_prompts.append(prompt.model_copy(update=own or inside))
    return found_prompts, report


def label(text: str, policy: Policy) -> tuple[list[str], str] | None:
    """(categories, kind) of a T5 reply, or None where it is not of the asked form."""
    said = _json(text)
    if not isinstance(said, dict) or said.get("kind") not in KINDS:
        return None
    categories = said.get("categories")
    if not isinstance(categories, list) or not categories:
        return None
    if not all(isinstance(one, str) and one in policy.categories for one in categories):
        return None
    return list(dict.fromkeys(categories)), said["kind"]


def scorer(asking: Asking, prompts: Sequence[Prompt], journal: Journal) -> Verdicts:
    """T6 as the judge of quality that the filters take: three scores each, or None if invalid."""
    by_text = {prompt.text: prompt for prompt in prompts}
    greedy = asking.sampler.model_copy(update={"temperature": 0.0, "seed": 0})

    def scores(pairs: Sequence[tuple[str, str]]) -> list[list[float] | None]:
        requests = [
            _request("score", score_messages(by_text[text], raw, asking.policy), greedy)
            for text, raw in pairs
        ]
        made = asking.answers(requests, journal, "scores")
        return [_scores(made.get(one.id, [])) for one in requests]

    return scores


def score_messages(prompt: Prompt, raw: str, policy: Policy) -> list[dict[str, str]]:
    """T6 on a raw answer, with the scales of the prompt's kind."""
    parsed = reasoning.parse(raw)
    scales = _words()["harmless" if prompt.kind in ("benign", "borderline") else "risky"]
    slots = dict(zip(("first_scale", "second_scale", "third_scale"), scales, strict=True))
    slots |= {"policy": _rules(prompt, policy), "prompt": prompt.text}
    slots |= {"reasoning": parsed.reasoning, "answer": parsed.answer}
    return template.render("t6_score", slots)


def _scores(replies: Sequence[Reply]) -> list[float] | None:
    said = _json(replies[0]["text"]) if replies else None
    found = said.get("scores") if isinstance(said, dict) else None
    if not isinstance(found, list) or len(found) != 3:
        return None
    if not all(type(one) in (int, float) and 0 <= one <= 10 for one in found):
        return None
    return [float(one) for one in found]


def repaired(
    asking: Asking, items: Sequence[Judged], journal: Journal, risk: Verdicts, limit: float
) -> list[tuple[Judged, Reply]]:
    """T3 on answers with unsafe reasoning: each with a reply that goes on from its first such step.

    The first unsafe step is the one up to which `risk` first says `limit` or more, or says nothing
    valid; where no part is unsafe alone, the last.
    """
    places = [(item, i) for item in items for i in range(len(item.trace.steps))]
    pairs = [
        (item.prompt.text, item.trace.parsed.reasoning[: item.trace.steps[i].end_char])
        for item, i in places
    ]
    verdicts = risk(pairs) if pairs else []
    first: dict[str, int] = {}
    for (item, i), verdict in zip(places, verdicts, strict=True):
        if verdict is None or verdict >= limit:
            first.setdefault(item.trace.id, i)
    requests, starts = [], []
    for item in items:
        steps = item.trace.steps
        at = first.get(item.trace.id, len(steps) - 1)
        slots = {
            "policy": _rules(item.prompt, asking.policy),
            "prompt": item.prompt.text,
            "steps": "\n".join(f"{i}. {one.text.strip()}" for i, one in enumerate(steps, 1)),
            "risky_step": str(at + 1),
            "style": _words()["repair_style"],
            "modes": ", ".join(asking.policy.modes),
        }
        asked = template.render("t3_reflect_rewrite", slots)
        requests.append(_edit("repair", item, asking, asked))
        starts.append(item.trace.parsed.reasoning[: steps[at].end_char].rstrip())
    made = asking.answers(requests, journal, "repairs")
    found = []
    for item, request, start in zip(items, requests, starts, strict=True):
        for reply in made.get(request.id, []):
            text = reply["text"].strip().removeprefix(reasoning.OPEN).strip()
            whole = f"{reasoning.OPEN}\n{start}\n\n{text}"
            found.append((item, reply | {"text": whole, "seed": request.sampler.seed}))
    return found


def shortened(
    asking: Asking, items: Sequence[Judged], journal: Journal
) -> list[tuple[Judged, Reply]]:
    """T8 on answers: each with a reply of shorter reasoning and the same answer, where there is."""
    requests = []
    for item in items:
        parsed = item.trace.parsed
        slots = {
            "max_words": str(max(1, round(SHORTER * len(parsed.reasoning.split())))),
            "mode": item.trace.decision,
            "prompt": item.prompt.text,
            "reasoning": parsed.reasoning,
            "answer": parsed.answer,
        }
        asked = template.render("t8_compress", slots)
        requests.append(_edit("compress", item, asking, asked))
    made = asking.answers(requests, journal, "shortening")
    found = []
    for item, request in zip(items, requests, strict=True):
        for reply in made.get(request.id, []):
            parsed = reasoning.parse(reply["text"])
            text = parsed.reasoning if parsed.status == "empty_answer" else parsed.answer
            if 0 < len(text) < len(item.trace.parsed.reasoning):
                whole = reasoning.render(text, item.trace.parsed.answer)
                found.append((item, reply | {"text": whole, "seed": request.sampler.seed}))
    return found


def _request(doing: str, asked: Sequence[Mapping[str, str]], sampler: Sampler) -> Request:
    """A request whose id follows from what is asked, so that it is journalled by that."""
    name = f"{doing}:{content_id(*(one['content'] for one in asked), sampler.seed)}"
    return Request(name, tuple(asked), sampler, LABELS if doing == "label" else 1)


def _edit(doing: str, item: Judged, asking: Asking, asked: Sequence[Mapping[str, str]]) -> Request:
    seed = int(item.trace.id[:8], 16)
    return _request(doing, asked, asking.sampler.model_copy(update={"seed": seed}))


def _rules(prompt: Prompt, policy: Policy) -> str:
    known = [one for one in prompt.categories if one in policy.categories]
    return policies.render(policy, known or None)


def _json(text: str) -> Any:
    """The JSON that a reply is, thoughts before it and a fence around it taken off; else None."""
    text = text.rpartition(reasoning.CLOSE)[2].strip()
    if fenced := FENCE.match(text):
        text = fenced[1]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _words() -> dict[str, Any]:
    return yaml.safe_load((template.FOLDER / "t6_scales.yaml").read_text(encoding="utf-8"))
