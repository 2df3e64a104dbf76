"""The template teacher: reasoned answers from stems, a category, its rules and the disguise.

It knows no more than it is told: harmful prompts need a category of the policy, harmless ones an
answer in the prompt's `meta`. Deterministic, for tests, small students and runs without a model.
"""

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from saro_jax.records import Prompt, Sampler, sha256
from saro_jax.text import reasoning, wrappers
from saro_jax.text.policy import Policy, Rule

FILE = Path(__file__).parent / "stems.yaml"
EXCERPT_WORDS = 16
# How often a step that can be left out is there.
RISK, REFLECT, CHECK = 0.3, 0.25, 0.4


@cache
def stems() -> dict[str, Any]:
    """The packaged stems by slot, and per category."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


class TemplateTeacher:
    """Answers the prompts that it was made with; the last message says which one is asked."""

    name = "template"
    origin = "template"

    def __init__(self, policy: Policy, prompts: Sequence[Prompt]):
        self.policy = policy
        self.prompts = {prompt.text: prompt for prompt in prompts}
        self.base = {prompt.id: prompt.text for prompt in prompts}
        files = (FILE, wrappers.FILE, Path(__file__))
        self.sha = sha256("".join(file.read_text(encoding="utf-8") for file in files))

    def generate(
        self, messages: Sequence[Mapping[str, str]], n: int, sampler: Sampler
    ) -> list[dict[str, Any]]:
        """n replies {text, finish}, or none where it lacks a category or an answer."""
        prompt = self.prompts.get(messages[-1]["content"])
        if prompt is None:
            return []
        found = []
        for i in range(n):
            rng = random.Random(f"{sampler.seed}:{prompt.id}:{i}")
            text = respond(prompt, self.policy, rng, self.base.get(prompt.base_id or ""))
            if text is None:
                return []
            found.append({"text": text, "finish": "eos"})
        return found


def respond(
    prompt: Prompt, policy: Policy, rng: random.Random, base_text: str | None = None
) -> str | None:
    """One reasoned answer in the project's format; `base_text` is the request without disguise.

    How it opens follows from the prompt alone: among answers that opened differently the shortest
    would be chosen, and with it the openings that are short for a kind.
    """
    wrapper = wrappers.by_id(prompt.attack.template_id) if prompt.attack else None
    slots = {
        "excerpt": excerpt(base_text or prompt.text),
        "frame": wrapper.frame if wrapper else "a disguise",
    }
    slots["frame_upper"] = slots["frame"][0].upper() + slots["frame"][1:]
    wrapped = prompt.attack is not None
    if prompt.kind in ("harmful", "jailbreak"):
        return _declines(prompt, policy, rng, slots, wrapped or prompt.kind == "jailbreak")
    return _answers(prompt, policy, rng, slots, wrapped)


def _declines(
    prompt: Prompt, policy: Policy, rng: random.Random, slots: dict[str, str], wrapped: bool
) -> str | None:
    known = [policy.categories[one] for one in prompt.categories if one in policy.categories]
    known = [one for one in known if any(rule.type == "hard" for rule in one.rules)]
    if not known:
        return None
    category = known[0]
    rule = next(one for one in category.rules if one.type == "hard")
    own = stems()["categories"].get(category.id) or stems()["categories"]["other"]
    slots |= {"rule": rule.id, "topic": rng.choice(own["topic"]), "harm": rng.choice(own["harm"])}
    offer = rng.choice(own["offer"])
    slots |= {"offer": offer["plan"], "offer_sentence": offer["answer"]}
    mode = rule.mode
    is_attack = prompt.attack is not None
    steps = [_say(random.Random(prompt.id), "request_wrapped" if is_attack else "request", slots)]
    if is_attack and rng.random() < REFLECT:
        steps.append(_say(rng, "naive", slots))
        steps.append(_say(rng, rng.choice(("reflect_marked", "reflect_unmarked")), slots))
    steps.append(_aim(rng, "harmful", slots))
    if rng.random() < RISK:
        steps.append(_say(rng, "risk", slots))
    frame_rule = _wrapper_rule(category.rules, policy) if wrapped else None
    if frame_rule is None:
        steps.append(_say(rng, "forbid", slots))
    else:
        slots["wrapper_rule"] = frame_rule.id if isinstance(frame_rule, Rule) else frame_rule
        mode = frame_rule.mode if isinstance(frame_rule, Rule) else mode
        steps.append(_say(rng, "forbid_wrapped", slots))
    caring = mode == "safe_complete"
    steps.append(_say(rng, "plan_care" if caring else "plan_refuse", slots))
    steps.append(f"Decision: {mode}")
    return reasoning.render("\n\n".join(steps), _say(rng, "care" if caring else "refuse", slots))


def _answers(
    prompt: Prompt, policy: Policy, rng: random.Random, slots: dict[str, str], wrapped: bool
) -> str | None:
    answer = prompt.meta.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        return None
    solution = prompt.meta.get("solution")
    slots["point"] = _first_sentence(answer)
    steps = [_say(random.Random(prompt.id), "request_wrapped" if wrapped else "request", slots)]
    steps.append(_aim(rng, "borderline" if prompt.kind == "borderline" else "benign", slots))
    mode = "comply"
    soft = [
        rule
        for one in prompt.categories
        if one in policy.categories
        for rule in policy.categories[one].rules
        if rule.type == "soft" and rule.mode in ("comply", "comply_care")
    ]
    if prompt.kind == "borderline" and soft:
        slots["rule"], mode = soft[0].id, soft[0].mode
        steps.append(_say(rng, "permit", slots))
    elif prompt.kind == "borderline":
        steps.append(_say(rng, "lookalike", slots))
    else:
        steps.append(_say(rng, "plain", slots))
    if isinstance(solution, str) and solution.strip():
        steps.append(solution.strip())
    else:
        steps.append(_say(rng, "solve", slots))
    if rng.random() < CHECK:
        steps.append(_say(rng, "check", slots))
    steps.append(f"Decision: {mode}")
    return reasoning.render("\n\n".join(steps), answer)


def _wrapper_rule(rules: Sequence[Rule], policy: Policy) -> Rule | str | None:
    """The rule that says what a disguise is worth: a category's last hard one, else G1."""
    hard = [rule for rule in rules if rule.type == "hard"]
    if len(hard) > 1:
        return hard[-1]
    return "G1" if "G1" in policy.global_rules else None


def _aim(rng: random.Random, kind: str, slots: Mapping[str, str]) -> str:
    """What the request is for: a question that is the same for every kind, and its answer."""
    return f"{stems()['aim']} {_say(rng, f'aim_{kind}', slots)}"


def _say(rng: random.Random, slot: str, slots: Mapping[str, str]) -> str:
    return _filled(rng.choice(stems()[slot]), slots)


def _filled(text: str, slots: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: slots[match[1]], text)


def excerpt(text: str) -> str:
    """The first words of a request, on one line, ending like a sentence."""
    words = text.replace('"', "'").split()
    if len(words) > EXCERPT_WORDS:
        return " ".join(words[:EXCERPT_WORDS]) + " ..."
    line = " ".join(words)
    return line if re.search(r"[.!?…']$", line) else f"{line}."


def _first_sentence(text: str) -> str:
    """The start of an answer, at most a sentence of 30 words, without list marks."""
    line = re.sub(r"^\s*(?:[-*#]+|\d+[.)])\s+", "", text.strip().splitlines()[0])
    sentence = re.split(r"(?<=[.!?])\s", line)[0].rstrip(" :,;")
    words = sentence.split()
    sentence = " ".join(words[:30]) + (" ..." if len(words) > 30 else "")
    return sentence if re.search(r"[.!?…]$", sentence) else f"{sentence}."
