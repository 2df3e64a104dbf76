"""What a trace records of its reasoning: the steps by their characters, and the decision."""

import pytest

from saro_jax.text.traces import decided, trace_steps

THOUGHT = "They ask about a lock.\n\nIt may not be theirs.\n\nDecision: comply_care"


def test_steps_are_numbered_and_cover_the_reasoning():
    steps = trace_steps(THOUGHT)
    assert [step.i for step in steps] == [0, 1, 2]
    assert "".join(THOUGHT[step.start_char : step.end_char] for step in steps) == THOUGHT
    assert all(THOUGHT[step.start_char : step.end_char] == step.text for step in steps)
    assert {(step.start_tok, step.end_tok) for step in steps} == {(None, None)}
    assert trace_steps("") == ()


@pytest.mark.parametrize(
    ("thought", "decision"),
    [
        (THOUGHT, "comply_care"),
        ("Decision: REFUSE.", "refuse"),
        ("Decision: maybe", "none"),
        ("Decision: none", "none"),
        ("no line of that kind", "none"),
        ("", "none"),
    ],
)
def test_a_decision_is_a_mode_or_none(thought: str, decision: str):
    assert decided(thought) == decision
