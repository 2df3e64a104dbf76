"""What a teacher is told beside the prompt: rules, worked examples, a steering line."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from saro_jax.config import SynthesizeConfig
from saro_jax.data.sources import raw_records
from saro_jax.records import Prompt, sha256
from saro_jax.text import policy as policies
from saro_jax.text import reasoning, template
from saro_jax.text.policy import Policy

TRIED_SHOTS = 2  # examples that the search tries where none are set
RISKY = ("harmful", "jailbreak")
# Whose example comes first, second, ... before a prompt: answered ones stand beside refused ones,
# so that the examples do not say how to decide. Before a benign prompt none speak of harm.
TURNS = {True: ("harmful", "benign", "jailbreak", "borderline"), False: ("benign",)}


@dataclass(frozen=True)
class Context:
    """Which rules (of the prompt's categories or all), how many examples, and the line, if any."""

    render: Literal["relevant", "whole"] = "relevant"
    shots: int = 0
    steer: str | None = None


@dataclass(frozen=True)
class Example:
    """A request with its reasoned answer."""

    kind: str
    prompt: str
    response: str


def given(settings: SynthesizeConfig) -> Context:
    """The context as the settings have it."""
    return Context(settings.render, settings.shots, settings.steer)


def tried(settings: SynthesizeConfig) -> list[Context]:
    """What `synthesize.search` chooses among; shorter contexts come first."""
    shots = (0, settings.shots or TRIED_SHOTS)
    steers = (None, settings.steer) if settings.steer else (None,)
    return [
        Context(render, count, steer)
        for count, render, steer in itertools.product(shots, ("relevant", "whole"), steers)
    ]


def read_examples(source: str, option: str) -> list[Example]:
    """Rows {kind, prompt, reasoning, answer} of a source; one-line ValueError for any other."""
    found = []
    for where, record in raw_records(source, "train"):
        if isinstance(record, str):
            raise ValueError(f"{where}: {record}")
        values = {name: record.get(name) for name in ("kind", "prompt", "reasoning", "answer")}
        for name, value in values.items():
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{where}: {option}: {name}: {value!r}; expected text")
        response = reasoning.render(str(values["reasoning"]), str(values["answer"]))
        found.append(Example(str(values["kind"]), str(values["prompt"]), response))
    return found


def digest(examples: Sequence[Example]) -> str:
    """What stands for the examples in the key of a journal."""
    return sha256(repr(list(examples)))


def messages(
    prompt: Prompt, policy: Policy, context: Context, examples: Sequence[Example] = ()
) -> list[dict[str, str]]:
    """What a teacher is asked: T2 for benign prompts, T1 for all others; the prompt comes last.

    Examples are turns between the instructions and the prompt. The steering line stands before
    harmful prompts and jailbreaks alone; it tips a weak model to caution.
    """
    categories = [one for one in prompt.categories if one in policy.categories]
    rules = None if context.render == "whole" or not categories else categories
    if prompt.kind == "benign":
        slots = {
            "policy": policies.render(policy, None if context.render == "whole" else []),
            "prompt": prompt.text,
        }
        asked = template.render("t2_reason_general", slots)
    else:
        cited = [
            rule.id
            for one in categories or policy.categories
            for rule in policy.categories[one].rules
        ]
        steer = context.steer if prompt.kind in RISKY else None
        slots = {
            "policy": policies.render(policy, rules),
            "prompt": f"{steer}\n\n{prompt.text}" if steer else prompt.text,
            "modes": ", ".join(policy.modes),
            "example_rule": cited[0] if cited else next(iter(policy.global_rules), "R1"),
        }
        asked = template.render("t1_reason_safe", slots)
    shown = [
        {"role": role, "content": text}
        for one in _shown(prompt, context.shots, examples)
        for role, text in (("user", one.prompt), ("assistant", one.response))
    ]
    return [*asked[:-1], *shown, asked[-1]]


def _shown(prompt: Prompt, shots: int, examples: Sequence[Example]) -> list[Example]:
    """The examples before a prompt, each kind's from an offset that the prompt's id gives."""
    turns = TURNS[prompt.kind != "benign"]
    found: list[Example] = []
    for i in range(shots):
        kind = turns[i % len(turns)]
        own = [one for one in examples if one.kind == kind and one.prompt != prompt.text]
        if own:
            start = int(sha256(prompt.id)[:8], 16)
            found.append(own[(start + i) % len(own)])
    return found
