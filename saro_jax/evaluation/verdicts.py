"""Owns the judges of an evaluation: who is asked about what, once, and what they said."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from saro_jax.evaluation.answering import outcome
from saro_jax.evaluation.results import Agreement, Transcript, Verdict
from saro_jax.judging import guards, rubrics
from saro_jax.judging.agreement import accuracy, kappa
from saro_jax.records import Journal, sha256, to_json
from saro_jax.text import refusal_classifier

CHUNK = 64  # questions between two writes of the journal, always in the same company
SAFETY_RUBRICS = ("strongreject", "harmbench")
Target = Literal["answer", "reasoning"]
Say = Callable[[Sequence[tuple[str, str]]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Judge:
    """A judge: its targets, whether it is asked with the clean request too, and its voice."""

    name: str
    version: str
    targets: tuple[Target, ...]
    original: bool
    say: Say


def refusal_judge() -> Judge:
    """The ensemble of text/refusal_classifier.py, which every evaluation has."""

    def say(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        return [
            {"refusal": one.label, "score": round(one.p_refusal, 6)}
            for one in refusal_classifier.classify_all(pairs)
        ]

    weights = Path(refusal_classifier.WEIGHTS).read_text(encoding="utf-8")
    return Judge("refusal", sha256(weights)[:8], ("answer",), False, say)


def check(names: Sequence[str], option: str) -> None:
    """ValueError for a judge that is not NAME=MODEL of a guard or rubric."""
    allowed = [name for name in (*guards.GUARDS, *rubrics.RUBRICS) if name != "refusal"]
    for text in names:
        name, _, model = text.partition("=")
        if name == "refusal" and not model:
            continue
        if name not in (*guards.GUARDS, *rubrics.RUBRICS) or not model:
            raise ValueError(
                f"{option}={text}: expected refusal, or NAME=MODEL of {', '.join(allowed)}"
            )


def open_judge(text: str, batch: int) -> Judge:
    """The judge of an entry of evaluate.judges; a model is loaded."""
    name, _, model = text.partition("=")
    if not model:
        return refusal_judge()
    from saro_jax.judging import local

    checkpoint = local.load(model)
    if name in guards.GUARDS:
        guard = guards.named(name)

        def ask_guard(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
            return [
                {
                    "label": one.verdict.label,
                    "score": None if one.p_unsafe is None else round(one.p_unsafe, 6),
                    "refusal": one.verdict.refusal,
                }
                for one in local.judge(checkpoint, guard, pairs, batch)
            ]

        version = sha256(f"{checkpoint.version}:{checkpoint.dtype}:{batch}")[:8]
        return Judge(name, version, ("answer", "reasoning"), True, ask_guard)
    complete = local.complete(checkpoint)

    def ask_rubric(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        verdicts = [rubrics.judge(complete, name, *pair)[0] for pair in pairs]
        return [{"label": v.label, "score": v.score, "refusal": v.refusal} for v in verdicts]

    targets: tuple[Target, ...] = ("reasoning",) if name == "reasoning_safety" else ("answer",)
    named = "refusal_lm" if name == "refusal" else name
    return Judge(named, checkpoint.version[:8], targets, name in SAFETY_RUBRICS, ask_rubric)


def judged(
    transcripts: Sequence[Transcript],
    originals: dict[tuple[str, str], str],
    judge: Judge,
    folder: Path | None,
    progress: bool = False,
) -> list[Transcript]:
    """The transcripts with the judge's verdicts, and by the refusal judge with their outcome.

    Judges of safety are asked about harmful prompts and jailbreaks only, of an attack about the
    clean request too, where `originals` has it by (benchmark, id): as NAME:original. A text that is
    not there is no question. folder: where what was said is kept for the next time.
    """
    asked: list[tuple[int, str, Target, str, str]] = []
    for place, one in enumerate(transcripts):
        safety = not judge.name.startswith("refusal")
        if safety and one.kind not in ("harmful", "jailbreak"):
            continue
        for target in judge.targets:
            text = one.answer if target == "answer" else one.reasoning
            if text.strip():
                asked.append((place, judge.name, target, one.prompt, text))
                original = originals.get((one.benchmark, one.id.partition("#")[0]))
                if judge.original and original and original != one.prompt:
                    asked.append((place, f"{judge.name}:original", target, original, text))
    pairs = [(prompt, text) for *_, prompt, text in asked]
    said = _said(judge, pairs, folder, progress)
    mine: dict[int, list[Verdict]] = defaultdict(list)
    for (place, name, target, _, _), fields in zip(asked, said, strict=True):
        mine[place].append(Verdict(judge=name, target=target, **fields))
    found = []
    for place, one in enumerate(transcripts):
        change: dict[str, Any] = {"verdicts": (*one.verdicts, *mine[place])}
        if judge.name == "refusal":
            silent = Verdict(judge=judge.name, target="answer", refusal="invalid")
            change["outcome"] = outcome(one, (mine[place] or [silent])[0])
        found.append(one.model_copy(update=change))
    return found


def _said(
    judge: Judge, pairs: Sequence[tuple[str, str]], folder: Path | None, progress: bool
) -> list[dict[str, Any]]:
    if folder is None:
        return judge.say(pairs)
    key = {"judge": judge.name, "version": judge.version, "asked": sha256(to_json(list(pairs)))}
    # Other texts, as of one model more, are other work.
    file = folder / f"{judge.name}.{sha256(to_json(key))[:8]}.journal"
    with (
        Journal(file, key) as journal,
        tqdm(total=len(pairs), desc=judge.name, unit="verdict", disable=not progress) as bar,
    ):
        for start in range(0, len(pairs), CHUNK):
            chunk = pairs[start : start + CHUNK]
            if str(start) not in journal.values:
                journal.append(str(start), judge.say(chunk))
            bar.update(len(chunk))
        return [one for start in range(0, len(pairs), CHUNK) for one in journal.values[str(start)]]


def agreements(transcripts: Sequence[Transcript]) -> list[Agreement]:
    """How far each two judges of the same thing agree, over all texts that both judged."""
    by_judge: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for place, one in enumerate(transcripts):
        for verdict in one.verdicts:
            if verdict.judge.endswith(":original"):
                continue
            for kind, said in (("label", verdict.label), ("refusal", verdict.refusal)):
                if said not in (None, "invalid"):
                    by_judge[verdict.judge, f"{kind} of {verdict.target}"][place] = str(said)
    found = []
    for (a, what), (b, same) in combinations(sorted(by_judge), 2):
        both = sorted(by_judge[a, what].keys() & by_judge[b, same].keys())
        if what != same or not both:
            continue
        first, second = ([by_judge[name, what][i] for i in both] for name in (a, b))
        k = kappa(first, second)
        found.append(
            Agreement(
                judge_a=a,
                judge_b=b,
                about=what,
                n=len(both),
                equal=round(accuracy(first, second), 6),
                kappa=None if k != k else round(k, 6),
            )
        )
    return found
