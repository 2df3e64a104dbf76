"""Owns the transcripts inside a report: each prompt once, compressed, and which of them go in."""

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

from saro_jax.evaluation.results import Results, Transcript
from saro_jax.reporting.tables import Sheet


def chosen(transcripts: Sequence[Transcript], most: int | None) -> list[Transcript]:
    """At most `most` prompts of each benchmark, evenly spread over it, with all their answers."""
    if most is None:
        return list(transcripts)
    order: dict[str, dict[str, None]] = {}
    for one in transcripts:
        order.setdefault(one.benchmark, {})[one.id] = None
    kept = set()
    for benchmark, ids in order.items():
        names = list(ids)
        count = min(most, len(names))
        kept |= {(benchmark, names[i * len(names) // count]) for i in range(count)}
    return [one for one in transcripts if (one.benchmark, one.id) in kept]


def packed(transcripts: Sequence[Transcript], results: Results | None) -> str:
    """What the page's script reads: gzip of JSON in base64; the same transcripts, the same text."""
    text = json.dumps(columns(transcripts, results), ensure_ascii=False, separators=(",", ":"))
    raw = text.encode("utf-8", "backslashreplace")
    return base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode()


def columns(transcripts: Sequence[Transcript], results: Results | None) -> dict[str, Any]:
    """Names once and rows of numbers and texts, models' answers to the same prompt side by side.

    prompts: [id, benchmark, kind, category, attack, text]; rows: [prompt, model, view, outcome,
    status, finish, forced, tokens, reasoning tokens, decision, correct, steps, answer, verdicts],
    steps [kind, text], verdicts [judge, target, label, score, refusal]. What is a name is its
    place in the list of its kind.
    """
    names: dict[str, dict[str, int]] = {
        key: {} for key in ("models", "benchmarks", "kinds", "views", "outcomes", "steps", "words")
    }
    for model in results.models if results is not None else ():
        names["models"][model.name] = len(names["models"])

    def place(key: str, name: str) -> int:
        return names[key].setdefault(name, len(names[key]))

    order = [bench.name for bench in results.benchmarks] if results is not None else []
    transcripts = sorted(
        transcripts,
        key=lambda one: order.index(one.benchmark) if one.benchmark in order else len(order),
    )
    prompts: dict[tuple[str, str, str], int] = {}
    rows: list[list[Any]] = []
    for one in transcripts:
        prompt = prompts.setdefault((one.benchmark, one.id, one.prompt), len(prompts))
        steps = [[place("steps", s.kind), s.text] for s in one.steps]
        if not steps and one.reasoning:
            steps = [[place("steps", ""), one.reasoning]]
        row: list[Any] = [prompt, place("models", one.model), place("views", one.view)]
        row += [place("outcomes", one.outcome), place("words", one.status)]
        row += [place("words", one.finish), int(one.forced), one.tokens, one.reasoning_tokens]
        row += [one.decision, one.correct, steps, one.answer]
        row.append([[v.judge, v.target, v.label, v.score, v.refusal] for v in one.verdicts])
        rows.append(row)
    rows.sort(key=lambda row: row[:3])
    about: dict[int, list[Any]] = {}
    for one in transcripts:
        about.setdefault(
            prompts[one.benchmark, one.id, one.prompt],
            [
                *(one.id, place("benchmarks", one.benchmark), place("kinds", one.kind)),
                *(one.category, one.attack, one.prompt),
            ],
        )
    titles = {b.name: b.title for b in results.benchmarks} if results is not None else {}
    listed: dict[str, Any] = {key: list(found) for key, found in names.items()}
    listed["benchmarks"] = [titles.get(name, name) for name in listed["benchmarks"]]
    return listed | {"prompts": [about[i] for i in range(len(about))], "rows": rows}


def sheet(transcripts: Sequence[Transcript]) -> Sheet | None:
    """One line a transcript, without its texts."""
    if not transcripts:
        return None
    fields = [
        "model",
        "benchmark",
        "view",
        "id",
        "base_id",
        "kind",
        "category",
        "attack",
        "outcome",
    ]
    fields += ["status", "finish", "forced", "decision", "correct", "tokens", "reasoning_tokens"]
    fields += ["answer_tokens"]
    judges = list(dict.fromkeys((v.judge, v.target) for one in transcripts for v in one.verdicts))
    rows = []
    for one in transcripts:
        said = {(v.judge, v.target): v for v in one.verdicts}
        verdicts = []
        for key in judges:
            verdict = said.get(key)
            verdicts += [
                verdict and verdict.label,
                verdict and verdict.score,
                verdict and verdict.refusal,
            ]
        rows.append([*(getattr(one, name) for name in fields), *verdicts])
    heads = [f"{j} {t} {what}" for j, t in judges for what in ("label", "score", "refusal")]
    return Sheet("transcripts", [*fields, *heads], rows)
