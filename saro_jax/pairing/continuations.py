"""Continuations: a response that goes on from a prefix, as a trace of its own."""

from collections.abc import Callable
from typing import Any

from saro_jax.generation.requests import Sample
from saro_jax.records import (
    Parsed,
    Prompt,
    Sampler,
    TokenCounts,
    Trace,
    content_id,
)
from saro_jax.text import reasoning
from saro_jax.text.traces import decided, trace_steps

CountTokens = Callable[[str], int]
OPENING = f"{reasoning.OPEN}\n"


def words(text: str) -> int:
    """A count for where no tokenizer is."""
    return len(text.split())


def head(trace: Trace, step: int) -> str:
    """The response up to the beginning of a step; of one past the last, to the reasoning's end."""
    start = trace.raw.find(trace.parsed.reasoning)
    if start < 0 or not trace.steps:
        raise ValueError(f"trace {trace.id}: its reasoning does not stand in its text")
    if step == len(trace.steps):
        return trace.raw[: start + trace.steps[-1].end_char]
    return trace.raw[: start + trace.steps[step].start_char]


def opening_step(text: str) -> str:
    """The first step of a continuation, with the blank line after it."""
    return next(iter(reasoning.steps(text)), text)


def whole(
    prompt: Prompt,
    raw: str,
    *,
    finish: Any = "eos",
    model: str,
    origin: Any,
    sampler: Sampler | None = None,
    parents: tuple[str, ...] = (),
    count: CountTokens = words,
    meta: dict[str, Any] | None = None,
) -> Trace:
    """The trace of a whole response, its prefix included."""
    sampler = sampler or Sampler()
    parsed = reasoning.parse(raw, finished=finish != "length")
    drawn = [sampler.seed, (meta or {}).get("i"), finish, list(parents)]
    return Trace(
        id=content_id("continued", prompt.id, model, raw, *drawn),
        parent_ids=tuple(dict.fromkeys((*parents, prompt.id))),
        meta=meta or {},
        prompt_id=prompt.id,
        model=model,
        sampler=sampler,
        raw=raw,
        parsed=Parsed(**vars(parsed)),
        steps=trace_steps(parsed.reasoning),
        decision=decided(parsed.reasoning),
        n_tok=TokenCounts(
            prompt=count(prompt.text), reason=count(parsed.reasoning), answer=count(parsed.answer)
        ),
        finish=finish,
        origin=origin,
    )


def of_sample(
    prompt: Prompt,
    prefix: str,
    sample: Sample,
    sampler: Sampler,
    i: int,
    *,
    model: str,
    origin: Any,
    parents: tuple[str, ...] = (),
    count: CountTokens = words,
) -> Trace:
    """The trace of the i-th continuation of a prefix that was drawn with the sampler.

    `meta` keeps its token ids, without the prefix's, and how long the prefix is.
    """
    meta: dict[str, Any] = {"i": i, "prefix_chars": len(prefix)}
    if sample.ids is not None:
        meta["ids"] = list(sample.ids)
    if sample.forced:
        meta["forced"] = True
    return whole(
        prompt,
        prefix + sample.text,
        finish=sample.finish,
        model=model,
        origin=origin,
        sampler=sampler,
        parents=parents,
        count=count,
        meta=meta,
    )
