"""What a trace records of its reasoning: the steps, and the mode it decided on."""

from saro_jax.records import MODES, Decision, TraceStep
from saro_jax.text import reasoning


def trace_steps(thought: str) -> tuple[TraceStep, ...]:
    """The steps of a reasoning; token offsets are left open."""
    return tuple(
        TraceStep(i=at, start_char=one.start, end_char=one.end, text=one.text, kind=one.kind)
        for at, one in enumerate(reasoning.segment(thought))
    )


def decided(thought: str) -> Decision:
    """The mode that the reasoning's last line names; "none" where it names none there is."""
    mode = reasoning.decision(thought)
    return mode if mode in MODES else "none"
