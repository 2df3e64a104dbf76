"""Judges of continuations: the form of an answer, and a guard model where one is configured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saro_jax.judging import guards
from saro_jax.pairing.outcomes import RISKY_KINDS
from saro_jax.records import Judgment, Prompt, Trace, content_id, sha256
from saro_jax.text import refusal, refusal_classifier

# (prompt, text) pairs to (P(unsafe) or None, label) each.
Say = Callable[[Sequence[tuple[str, str]]], Sequence[tuple[float | None, Any]]]


@dataclass(frozen=True)
class Guard:
    """A judge of safety: asked of answers and of reasoning, with both forms of a prompt."""

    name: str
    version: str
    say: Say


def form_version() -> str:
    """The hash of what the judge of form depends on."""
    files = (refusal_classifier.WEIGHTS, refusal_classifier.__file__, refusal.__file__)
    return sha256("\0".join(Path(file).read_text(encoding="utf-8") for file in files))[:8]


def by_form(traces: Sequence[Trace], prompts: Sequence[Prompt]) -> list[Judgment]:
    """One judgment a trace: does the answer refuse, by the ensemble of rules and classifier."""
    rows = [(p.text, t.parsed.answer) for t, p in zip(traces, prompts, strict=True)]
    unique = list(dict.fromkeys(rows))  # what a small model says, it says often
    said = dict(zip(unique, refusal_classifier.classify_all(unique), strict=True))
    version = form_version()
    return [
        Judgment(
            id=content_id("refusal", version, trace.id),
            parent_ids=(trace.id,),
            trace_id=trace.id,
            judge="refusal",
            judge_version=version,
            target="answer",
            score=said[row].p_refusal,
            refusal=said[row].label,
        )
        for trace, row in zip(traces, rows, strict=True)
    ]


def by_guard(
    guard: Guard, traces: Sequence[Trace], prompts: Sequence[Prompt], bases: Sequence[str]
) -> list[Judgment]:
    """Judgments on answers and reasonings to harmful prompts, also with the bare request.

    An answer that is not there is invalid; reasoning that is not there is not judged.
    """
    asked: list[tuple[Trace, str, str, str]] = []
    for trace, prompt, base in zip(traces, prompts, bases, strict=True):
        if prompt.kind not in RISKY_KINDS:
            continue
        for text in dict.fromkeys((prompt.text, base)):
            asked.append((trace, "answer", text, trace.parsed.answer))
            if trace.parsed.reasoning:
                asked.append((trace, "reasoning", text, trace.parsed.reasoning))
    said = iter(guard.say([(text, said) for _, _, text, said in asked if said]))
    found = []
    for trace, target, text, judged in asked:
        score, label = next(said) if judged else (None, "invalid")
        found.append(
            Judgment(
                id=content_id(guard.name, guard.version, trace.id, target, text),
                parent_ids=(trace.id,),
                trace_id=trace.id,
                judge=guard.name,
                judge_version=guard.version,
                target=target,
                label=label,
                score=score,
            )
        )
    return found


def local_guard(spec: str, batch_size: int, dtype: str | None = None) -> Guard:
    """The guard of NAME=MODEL, run here; one-line ValueError where there is no such guard."""
    name, _, model = (part.strip() for part in spec.partition("="))
    if name not in guards.GUARDS or not model:
        names = ", ".join(f"{one}=MODEL" for one in guards.GUARDS)
        raise ValueError(f"pairs.guard: {spec!r}; allowed: {names}")
    from saro_jax.judging import local

    guard, checkpoint = guards.named(name), local.load(model, dtype)

    def say(rows: Sequence[tuple[str, str]]) -> list[tuple[float | None, Any]]:
        answers = local.judge(checkpoint, guard, rows, batch_size)
        return [
            (None if a.p_unsafe is None else round(a.p_unsafe, 6), a.verdict.label) for a in answers
        ]

    return Guard(name, checkpoint.version, say)
