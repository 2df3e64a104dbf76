"""Judgments of continuations: by the form of the answer, and by a guard where one is configured."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from saro_jax.judging.judges import Judge, refusal_judge
from saro_jax.pairing.outcomes import RISKY_KINDS
from saro_jax.records import Journal, Judgment, Prompt, Trace, content_id

INVALID = {"label": "invalid", "score": None}
CHUNK = 64  # pairs that a guard is asked between two writes of its journal


def by_form(traces: Sequence[Trace], prompts: Sequence[Prompt]) -> list[Judgment]:
    """One judgment a trace: does the answer refuse, by the ensemble of rules and classifier."""
    judge = refusal_judge()
    rows = [(p.text, t.parsed.answer) for t, p in zip(traces, prompts, strict=True)]
    unique = list(dict.fromkeys(rows))  # what a small model says, it says often
    said = dict(zip(unique, judge.say(unique), strict=True))
    return [
        Judgment(
            id=content_id(judge.name, judge.version, trace.id),
            parent_ids=(trace.id,),
            trace_id=trace.id,
            judge=judge.name,
            judge_version=judge.version,
            target="answer",
            score=said[row]["score"],
            refusal=said[row]["refusal"],
        )
        for trace, row in zip(traces, rows, strict=True)
    ]


def kept(guard: Judge, journal: Journal) -> Judge:
    """The guard, its verdicts in the journal as soon as CHUNK pairs are judged, and asked once.

    A chunk is judged as a whole, so that a pair always has the same neighbours (Judge.batched).
    """

    def say(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for start in range(0, len(pairs), CHUNK):
            chunk = [list(pair) for pair in pairs[start : start + CHUNK]]
            key = content_id("verdicts", chunk)
            if key not in journal.values:
                said = guard.say([(told, text) for told, text in chunk])
                journal.append(key, [[one["label"], one.get("score")] for one in said])
            found += [{"label": label, "score": score} for label, score in journal.values[key]]
        return found

    return dataclasses.replace(guard, say=say)


def by_guard(
    guard: Judge, traces: Sequence[Trace], prompts: Sequence[Prompt], bases: Sequence[str]
) -> list[Judgment]:
    """Judgments on answers and reasonings to harmful prompts, also with the bare request.

    An answer that is not there is invalid; reasoning that is not there is not judged.
    """
    asked: list[tuple[Trace, str, str, str]] = []
    for trace, prompt, base in zip(traces, prompts, bases, strict=True):
        if prompt.kind not in RISKY_KINDS:
            continue
        texts = {"answer": trace.parsed.answer, "reasoning": trace.parsed.reasoning}
        for told in dict.fromkeys((prompt.text, base) if guard.original else (prompt.text,)):
            for target, text in texts.items():
                if target in guard.targets and (text or target == "answer"):
                    asked.append((trace, target, told, text))
    said = iter(guard.say([(told, text) for _, _, told, text in asked if text]))
    found = []
    for trace, target, told, text in asked:
        fields = next(said) if text else INVALID
        found.append(
            Judgment(
                id=content_id(guard.name, guard.version, trace.id, target, told),
                parent_ids=(trace.id,),
                trace_id=trace.id,
                judge=guard.name,
                judge_version=guard.version,
                target=target,
                label=fields["label"],
                score=fields.get("score"),
            )
        )
    return found
