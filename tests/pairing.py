"""Owns the small prompts, traces and outcomes that the tests of pairs are made of."""

from saro_jax.pairing.outcomes import Outcome, Verdict
from saro_jax.records import Parsed, Prompt, Sampler, TokenCounts, Trace, TraceStep, prompt_id
from saro_jax.text import reasoning


def prompt(text: str = "How do I open the lock?", kind: str = "harmful", **more) -> Prompt:
    """A prompt of a kind; its category is P3 where it is harmful."""
    cats = ("P3",) if kind in ("harmful", "jailbreak") else ()
    given = {"categories": cats, **more}
    return Prompt(id=prompt_id(text), text=text, source="test", kind=kind, **given)  # type: ignore


def trace(of: Prompt, thought: str, answer: str, i: int = 0, finish: str = "eos", **more) -> Trace:
    """A whole response, its words counted as tokens."""
    raw = reasoning.render(thought, answer)
    parsed = reasoning.parse(raw, finished=finish != "length")
    decided = reasoning.decision(parsed.reasoning)
    return Trace(
        id=f"{of.id}-{i}",
        parent_ids=(of.id,),
        prompt_id=of.id,
        model="tiny",
        sampler=Sampler(seed=i),
        raw=raw,
        parsed=Parsed(**vars(parsed)),
        steps=tuple(
            TraceStep(i=at, start_char=s.start, end_char=s.end, text=s.text, kind=s.kind)
            for at, s in enumerate(reasoning.segment(parsed.reasoning))
        ),
        decision=decided or "none",  # type: ignore[arg-type]
        n_tok=TokenCounts(reason=len(thought.split()), answer=len(answer.split())),
        finish=finish,  # type: ignore[arg-type]
        origin="self",
        **more,
    )


def outcome(
    of: Prompt,
    i: int,
    p: float | None = None,
    refusal: str = "FC",
    thought: str = "The user asks for a thing.\n\nDecision: comply",
    p_thought: float | None = None,
    **more,
) -> Outcome:
    """A rollout with these verdicts."""
    correct = more.pop("correct", None)
    made = trace(of, thought, f"answer {i}", i, **more)
    return Outcome(made, of, Verdict(p, refusal), Verdict(p_thought), correct)  # type: ignore
