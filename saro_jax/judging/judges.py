"""Judges: what stands behind a name in --judges, and what of a Judgment each of them fills in.

A judge is a model run here, a model behind a server, or the refusal ensemble, which needs none.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saro_jax.config import ServerConfig
from saro_jax.judging import guards, rubrics
from saro_jax.text import refusal, refusal_classifier

TARGETS = ("answer", "reasoning", "prefix")

Judgment = dict[str, Any]


@dataclass(frozen=True)
class Judge:
    """A judge: its name, version and targets, and what it says of (prompt, text) pairs.

    `say` returns for each pair the fields of a Judgment that are its own. With `original` it is
    asked a second time, with the clean request. `batched`: a pair's neighbours can show in the
    last digits of its score, so that pairs are always asked in the same company. `close` lets go of
    what it holds.
    """

    name: str
    version: str
    targets: tuple[str, ...]
    original: bool
    say: Callable[[Sequence[tuple[str, str]]], list[Judgment]]
    batched: bool = False
    close: Callable[[], None] = lambda: None


def open_judges(
    listed: str,
    batch_size: int = 8,
    dtype: str | None = None,
    server: ServerConfig = ServerConfig(),  # noqa: B008 - frozen
    option: str = "--judges",
) -> list[Judge]:
    """The judges of a list with commas, each of another name; `option` is named in errors."""
    specs = listed.split(",")
    names = [spec.partition("=")[0].strip() + "=" * ("=" in spec) for spec in specs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{option}: {twice[0].rstrip('=')} is given twice")
    return [open_judge(spec, batch_size, dtype, server, option) for spec in specs]


def open_judge(
    spec: str,
    batch_size: int = 8,
    dtype: str | None = None,
    server: ServerConfig = ServerConfig(),  # noqa: B008 - frozen
    option: str = "--judges",
) -> Judge:
    """The judge of one entry: refusal, NAME=MODEL, or NAME=MODEL@URL behind a server."""
    name, has_model, model = (part.strip() for part in spec.strip().partition("="))
    if name == "refusal" and not has_model:
        return refusal_judge()
    if name not in (*guards.GUARDS, *rubrics.RUBRICS) or not model:
        names = ", ".join(f"{n}=MODEL" for n in (*guards.GUARDS, *rubrics.RUBRICS))
        raise ValueError(f"{option}: {spec!r}; allowed: refusal, {names}, or =MODEL@URL")
    if at := re.fullmatch(r"(.+?)@(https?://.*)", model):
        from saro_jax.generation.api import Api

        return served_judge(name, Api(at[2], at[1], server))
    from saro_jax.judging import local  # JAX, which the refusal judge does without

    try:
        checkpoint = local.load(model, dtype)
    except ValueError as error:
        raise ValueError(f"{option}: {spec}: {error}") from error
    if name in guards.GUARDS:
        return guard_judge(guards.named(name), checkpoint, batch_size)
    return rubric_judge(name, local.complete(checkpoint), checkpoint.version)


def refusal_judge() -> Judge:
    """The ensemble of text/refusal_classifier.py. It says nothing of safety: label is null."""

    def say(pairs: Sequence[tuple[str, str]]) -> list[Judgment]:
        return [
            {
                "label": None,
                "refusal": verdict.label,
                "score": verdict.p_refusal,
                "meta": {
                    "p_partial": verdict.p_partial,
                    "prefix": verdict.prefix,
                    "pattern": verdict.pattern,
                    "agree": verdict.agree,
                },
            }
            for verdict in refusal_classifier.classify_all(pairs)
        ]

    files = (refusal_classifier.WEIGHTS, refusal_classifier.__file__, refusal.__file__)
    version = _hash(*(Path(file).read_text(encoding="utf-8") for file in files))
    return Judge("refusal", version, ("answer",), False, say)


def guard_judge(guard: guards.Guard, checkpoint: Any, batch_size: int) -> Judge:
    """A guard model run in JAX, `checkpoint` a judging.local.Checkpoint."""
    from saro_jax.judging import local

    def say(pairs: Sequence[tuple[str, str]]) -> list[Judgment]:
        answers = local.judge(checkpoint, guard, pairs, batch_size)
        return [guard_fields(a.verdict, a.p_unsafe, a.raw) for a in answers]

    asks = checkpoint.tokenizer.chat_template if guard.template else guards.template(guard.name)
    version = _hash(checkpoint.version, str(asks), str(batch_size), str(checkpoint.dtype))
    return Judge(guard.name, version, TARGETS, True, say, batched=True)


def served_judge(name: str, api: Any) -> Judge:
    """A guard or a rubric asked of a model behind a server, `api` a generation.api.Api.

    The server applies its chat template. P(unsafe) needs its log-probs; without them a guard's
    score is None. Long answers are judged in windows as judging.served has them.
    """
    from saro_jax.judging import served

    guard = guards.GUARDS.get(name)
    if guard is None:
        asks = guards.template(name)
    else:
        asks = "" if guard.template else guards.template(name)

    def say(pairs: Sequence[tuple[str, str]]) -> list[Judgment]:
        if guard is None:
            return [
                {"label": v.label, "score": v.score, "refusal": v.refusal, "raw": raw}
                for v, raw in served.ask_rubric(api, name, pairs)
            ]
        answers = served.ask_guard(api, guard, pairs)
        return [guard_fields(a.verdict, a.p_unsafe, a.raw) for a in answers]

    if guard is not None:
        version = _hash(api.sha, asks, str(served.WINDOW))
        return Judge(name, version, TARGETS, True, say, close=api.close)
    about = rubric_judge(name, lambda _: "", api.sha)
    return dataclasses.replace(about, say=say, close=api.close)


def guard_fields(verdict: guards.Verdict, score: float | None, raw: str) -> Judgment:
    """A guard's verdict as fields of a Judgment; WildGuard's other two answers go to meta."""
    other = {"refusal": verdict.refusal, "harmful_request": verdict.harmful_request}
    return {
        "label": verdict.label,
        "score": None if score is None else round(score, 6),
        "cats": verdict.cats,
        "raw": raw,
        "meta": {name: value for name, value in other.items() if value is not None},
    }


def rubric_judge(rubric: str, complete: rubrics.Complete, version: str) -> Judge:
    """A rubric asked of any `complete(messages) -> text`; the LM judge of refusals: refusal_lm."""

    def ask(prompt: str, text: str) -> Judgment:
        verdict, raw = rubrics.judge(complete, rubric, prompt, text)
        fields = {"label": verdict.label, "score": verdict.score, "raw": raw}
        return fields | {"refusal": verdict.refusal}

    targets = ("reasoning", "prefix") if rubric == "reasoning_safety" else ("answer",)
    name = "refusal_lm" if rubric == "refusal" else rubric
    original = rubric in ("strongreject", "harmbench")
    version = _hash(version, guards.template(rubric))
    return Judge(name, version, targets, original, lambda pairs: [ask(*pair) for pair in pairs])


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
