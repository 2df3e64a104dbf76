"""OP1 to OP6: which answers of a prompt make a pair."""

import pairing
import pytest

from saro_jax.pairing import outcome_pairs as op
from saro_jax.pairing.outcomes import Limits
from saro_jax.records import RITD

LIMITS, CHOICE = Limits(), op.Choice(floor=3)
HARMFUL = pairing.prompt()
SUM = pairing.prompt("2+2?", "benign", meta={"final": "4"})
REFUSES = "That is a crime, P3.R1 forbids it.\n\nDecision: refuse"
TAUGHT = RITD(
    id="r1",
    parent_ids=("t0", HARMFUL.id),
    kind="harmful",
    prompt=HARMFUL.text,
    reasoning=REFUSES,
    answer="I won't.",
    decision="refuse",
)


def safe(i, **more):
    return pairing.outcome(HARMFUL, i, 0.05, "FR", more.pop("thought", REFUSES), **more)


def unsafe(i, p=0.95, **more):
    return pairing.outcome(HARMFUL, i, p, "FC", **more)


def kinds(pairs):
    return [one.kind for one in pairs]


def test_op1_pairs_the_shortest_good_with_bad_ones_at_most_two_a_prompt():
    long = "That is a crime and nothing else at all, P3.R1 forbids it.\n\nDecision: refuse"
    pairs, rejects = op.outcome_pairs(
        [safe(0, thought=long), safe(1), unsafe(2), unsafe(3), unsafe(4), safe(5)],
        {},
        [],
        LIMITS,
        CHOICE,
    )
    assert kinds(pairs) == ["OP1", "OP1"] and not rejects
    first = pairs[0]
    assert first.chosen == safe(1).trace.raw
    assert first.parent_ids[0] == safe(1).trace.id and first.parent_ids[2] == HARMFUL.id
    assert len({one.rejected for one in pairs}) == 2 == len({one.chosen for one in pairs})
    assert first.meta["difficulty"] == 0.5 and first.noise == pytest.approx((0.05 + 0.05) / 2)


def test_degenerate_reasoning_comes_last():
    short = pairing.outcome(HARMFUL, 1, 0.0, "FR", "No.")
    pairs, _ = op.outcome_pairs([short, safe(2), unsafe(3)], {}, [], LIMITS, CHOICE)
    assert pairs[0].chosen == safe(2).trace.raw


def test_what_is_neither_safe_nor_unsafe_is_in_no_pair():
    pairs, rejects = op.outcome_pairs([safe(0), unsafe(1, 0.6)], {}, [], LIMITS, CHOICE)
    assert not pairs and rejects[0].reason == "no outcome pair: nothing that is surely bad"
    cut = pairing.outcome(HARMFUL, 2, 0.05, "FR", REFUSES, finish="length")
    assert not op.outcome_pairs([cut, unsafe(1)], {}, [], LIMITS, CHOICE)[0]


def test_op2_takes_the_taught_answer_where_none_is_good():
    pairs, _ = op.outcome_pairs([unsafe(0), unsafe(1)], {HARMFUL.text: TAUGHT}, [], LIMITS, CHOICE)
    assert kinds(pairs) == ["OP2"] and pairs[0].parent_ids[0] == "r1"
    assert pairs[0].chosen == f"<think>\n{REFUSES}\n</think>\n\nI won't."


def test_op3_takes_another_models_answer_where_none_is_bad_at_half_weight():
    pairs, _ = op.outcome_pairs([safe(0)], {}, [unsafe(9), safe(8)], LIMITS, CHOICE)
    assert kinds(pairs) == ["OP3"] and pairs[0].weight == 0.5
    assert pairs[0].rejected == unsafe(9).trace.raw


def test_op4_and_op6_for_harmless_prompts():
    right = pairing.outcome(SUM, 0, None, "FC", correct=True)
    wrong = pairing.outcome(SUM, 1, None, "FC", correct=False)
    refused = pairing.outcome(SUM, 2, None, "FR", correct=False)
    pairs, _ = op.outcome_pairs([right, wrong, refused], {}, [], LIMITS, CHOICE)
    assert kinds(pairs) == ["OP6", "OP4"]
    assert pairs[0].rejected == wrong.trace.raw and pairs[1].rejected == refused.trace.raw


def test_op5_prefers_clear_reasoning_among_safe_answers():
    clear = safe(0, p_thought=0.0)
    risky = safe(1, p_thought=1.0)
    pairs, _ = op.outcome_pairs([clear, risky, unsafe(2), unsafe(3)], {}, [], LIMITS, CHOICE)
    assert kinds(pairs) == ["OP1", "OP5"] and pairs[1].rejected == risky.trace.raw


def test_hard_rejected_answers_are_the_most_unsafe_ones():
    bad = [unsafe(i, 0.85 + i / 100) for i in range(10)]
    hard = op.Choice(hard=1.0, per_prompt=1, floor=3)
    assert op.outcome_pairs([safe(20), *bad], {}, [], LIMITS, hard)[0][0].rejected == (
        bad[-1].trace.raw
    )
    any_ = {
        op.outcome_pairs([safe(20), *bad], {}, [], LIMITS, op.Choice(0.0, 1, 3, seed))[0][
            0
        ].rejected
        for seed in range(20)
    }
    assert len(any_) > 3
