"""The reasoning parser: its table, every status, and what holds for any text."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saro_jax.data.sources import QUICKSTART
from saro_jax.text.reasoning import (
    CLOSE,
    MAX_STEPS,
    OPEN,
    STATUSES,
    STEP_KINDS,
    STYLES,
    TAGS,
    cited_rules,
    decision,
    has_marker,
    parse,
    reflection,
    render,
    segment,
    spans,
    stance,
    steps,
    to_think,
    without_decision,
)

# (text, options, status, reasoning, answer)
TABLE = [
    ("<think>a</think>b", {}, "ok", "a", "b"),
    ("<think>\na\n\nc\n</think>\n\nb\n", {}, "ok", "a\n\nc", "b"),
    (" \n<think>a</think>b", {}, "ok", "a", "b"),
    ("a</think>b", {}, "missing_open", "a", "b"),
    ("</think>b", {}, "missing_open", "", "b"),
    ("a</think>b", {"prefilled_open": True}, "ok", "a", "b"),
    ("\n<think>a</think>b", {"prefilled_open": True}, "ok", "a", "b"),
    ("</think>b", {"prefilled_open": True}, "empty_think", "", "b"),
    ("<think>a", {}, "unclosed", "a", ""),
    ("<think>a", {"finished": False}, "truncated", "a", ""),
    ("a", {"finished": False, "prefilled_open": True}, "truncated", "a", ""),
    ("", {"prefilled_open": True}, "unclosed", "", ""),
    ("<think>a</thi", {"finished": False}, "truncated", "a</thi", ""),
    ("<think>a</think>b<think>c</think>d", {}, "multi", "a\nc", "b\nd"),
    ("Sure! <think>a</think>b", {}, "leading_text", "a", "Sure!\nb"),
    ("x<think>a</think>b<think>c</think>d", {}, "multi", "a\nc", "x\nb\nd"),
    ("<think>a</think>b<think>c", {}, "unclosed", "a\nc", "b"),
    ("</think>a<think>", {}, "unclosed", "", "a"),
    ("x<think>a", {}, "unclosed", "a", "x"),
    ("<think>a</think>b", {"finished": False}, "truncated_answer", "a", "b"),
    ("<think>a</think>\n", {}, "empty_answer", "a", ""),
    ("<think>a</think>", {"finished": False}, "empty_answer", "a", ""),
    ("", {}, "empty_answer", "", ""),
    ("<think> \n</think>b", {}, "empty_think", "", "b"),
    ("b", {}, "no_think", "", "b"),
    ("b", {"finished": False}, "no_think", "", "b"),
    ("<think>a<think>b</think>c", {}, "malformed", "a\nb", "c"),
    ("<think>a</think>b</think>c", {}, "malformed", "a", "b\nc"),
    ("a</think>b<think>c</think>d", {}, "malformed", "a\nc", "b\nd"),
    ("a</think>b</think>c", {}, "malformed", "a", "b\nc"),
]


@pytest.mark.parametrize(("text", "options", "status", "reasoning", "answer"), TABLE)
def test_table(text: str, options: dict, status: str, reasoning: str, answer: str):
    found = parse(text, **options)
    assert (found.status, found.reasoning, found.answer) == (status, reasoning, answer)


def test_the_table_covers_every_status():
    assert {row[2] for row in TABLE} == set(STATUSES)


@pytest.mark.parametrize("prefilled_open", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_any_order_of_tags_keeps_each_word_once(finished: bool, prefilled_open: bool):
    for count in range(5):
        for tags in itertools.product([OPEN, CLOSE], repeat=count):
            text = "w0" + "".join(f"{tag}w{i + 1}" for i, tag in enumerate(tags))
            found = parse(text, finished=finished, prefilled_open=prefilled_open)
            words = found.reasoning.split() + found.answer.split()
            assert sorted(words) == [f"w{i}" for i in range(count + 1)]
            assert found.status in STATUSES
            inside = tags[-1] == OPEN if tags else prefilled_open
            assert (found.status in ("unclosed", "truncated")) == inside
            if found.status == "ok":
                assert finished and CLOSE in tags and found.reasoning and found.answer


@pytest.mark.parametrize(
    ("reasoning", "mode"),
    [
        ("It is safe.\n\nDecision: comply", "comply"),
        ("Decision: comply_care\n", "comply_care"),
        ("x\nDecision:refuse.", "refuse"),
        ("x\n**Decision:** Refuse", "refuse"),
        ("Decision: refuse\nand more", None),
        ("My decision: comply", None),
        ("Decision: to be made later", None),
        ("Decision:", None),
        ("", None),
    ],
)
def test_decision(reasoning: str, mode: str | None):
    assert decision(reasoning) == mode


@pytest.mark.parametrize("text", [row[0] for row in TABLE if not row[1]])
def test_spans_hold_the_reasoning_that_parse_finds(text):
    inside = "\n".join(text[first:last] for first, last in spans(text))
    words = [part.strip() for part in TAGS.sub("\n", inside).split("\n") if part.strip()]
    assert words == [part for part in parse(text).reasoning.split("\n") if part]
    for first, last in spans(text):
        assert text[first:last].endswith(CLOSE) or last == len(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\nb", ["a\n\n", "b"]),
        ("\n\na\n \n\nb\n", ["\n\na\n \n\n", "b\n"]),
        ("a\nb</think>\n\nc", ["a\nb</think>", "\n\nc"]),
        ("</think>\nc", ["</think>", "\nc"]),
        ("<think>a\n\nb\n</think>\n\nc\n\nd", ["<think>a\n\n", "b\n</think>", "\n\nc\n\n", "d"]),
        ("a\n\n", ["a\n\n"]),
        (" ", [" "]),
        ("", []),
    ],
)  # fmt: skip
def test_steps_are_paragraphs_and_join_to_the_text(text, expected):
    assert steps(text) == expected


def test_steps_of_any_text_join_to_it():
    for parts in itertools.product(["\n", " ", "a", CLOSE, OPEN, "\n\n"], repeat=4):
        assert "".join(steps("".join(parts))) == "".join(parts)


# ---- other surfaces ------------------------------------------------------------------------------

STAIR = (
    "<|Reasoning_step|> Title: Look\na\n<|/Reasoning_step|>\n<|Reasoning_step|>\nTitle: Weigh\nb"
    "\n<|/Reasoning_step|>\n<|Output|>\nFinal Answer: c\n\nd\n<|/Output|>"
)


@pytest.mark.parametrize(
    ("style", "text", "status", "reasoning", "answer"),
    [
        ("headed", "Reasoning: a\n\nAnswer: b", "ok", "a", "b"),
        ("headed", "**Reasoning:**\na\nb\n\n## Final answer:\nc", "ok", "a\nb", "c"),
        ("headed", "Thinking:\na\nThe answer: no\nResponse: b", "ok", "a\nThe answer: no", "b"),
        ("headed", "Sure.\nReasoning: a\nAnswer: b", "leading_text", "a", "Sure.\nb"),
        ("headed", "Reasoning: a", "unclosed", "a", ""),
        ("headed", "Reasoning:\nAnswer: b", "empty_think", "", "b"),
        ("headed", "Reasoning: a\nAnswer:", "empty_answer", "a", ""),
        ("headed", "b", "no_think", "", "b"),
        ("stair_tags", STAIR, "ok", "Title: Look\na\n\nTitle: Weigh\nb", "c\n\nd"),
        ("stair_tags", f"Hi {STAIR}", "leading_text", None, "Hi\nc\n\nd"),
        ("stair_tags", "<|Reasoning_step|>a<|/Reasoning_step|>", "unclosed", "a", ""),
        ("stair_tags", "<|Reasoning_step|>a", "unclosed", "a", ""),
        ("stair_tags", "<|Reasoning_step|>a<|Output|>b", "ok", "a", "b"),
        ("stair_tags", "<|Output|>Final Answer: b<|/Output|>", "empty_think", "", "b"),
        ("stair_tags", "b", "no_think", "", "b"),
        ("think_xml", "<think>a</think>b", "ok", "a", "b"),
    ],
)
def test_other_styles_are_read(style, text, status, reasoning, answer):
    found = parse(to_think(text, style))
    assert (found.status, found.answer) == (status, answer)
    assert reasoning is None or found.reasoning == reasoning


@pytest.mark.parametrize("style", STYLES)
def test_every_style_comes_back_as_it_was_written(style):
    reasoning = "The user asks for a lock.\n\nP3.R1 decides here.\n\nDecision: refuse"
    found = parse(to_think(render(reasoning, "I won't.\n\nAsk a smith.", style), style))
    assert (found.status, found.reasoning) == ("ok", reasoning)
    assert found.answer == "I won't.\n\nAsk a smith."


# ---- steps of a reasoning ------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["a", "lock.", "Wait,", "the", "x!\n", "\n\n", "```", "- item", "\n", " ", "1. B"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=200).map(" ".join) | st.text(max_size=60))
def test_the_steps_of_any_reasoning_join_to_it(text: str):
    found = segment(text)
    assert "".join(step.text for step in found) == text
    assert len(found) <= MAX_STEPS
    at = 0
    for step in found:
        assert (step.start, text[step.start : step.end]) == (at, step.text)
        assert step.kind in STEP_KINDS
        at = step.end


def texts(reasoning: str) -> list[str]:
    return [step.text.strip() for step in segment(reasoning)]


def test_paragraphs_are_steps_and_short_ones_join_the_next():
    assert texts("one two three four\n\nfive six seven eight") == [
        "one two three four",
        "five six seven eight",
    ]
    assert texts("Hm, so.\n\none two three four\n\nno") == ["Hm, so.\n\none two three four\n\nno"]
    assert texts("one two three four\n\nDecision: refuse\n") == [
        "one two three four",
        "Decision: refuse",
    ]
    assert texts("no") == ["no"] and texts("") == []


def test_code_and_lists_stay_whole():
    code = "```python\nx = 1\n\ny = 2\n\nprint(x + y, x, y)\n```"
    text = f"This is the program we need:\n\n{code}\n\nIt prints the sum first."
    assert texts(text) == ["This is the program we need:", code, "It prints the sum first."]
    items = "1. take the first key out\n\n2. turn it to the left side\n\n- oil the old lock"
    assert texts(f"Here is what to do:\n\n{items}\n\nThen it opens again.")[1] == items
    long_list = "\n".join(f"- item {i} of a list. It is long." for i in range(20))
    assert texts(long_list) == [long_list]


def test_long_paragraphs_are_cut_at_ends_of_sentences():
    sentence = "This sentence has exactly ten words in it, e.g. these."
    found = texts(" ".join([sentence] * 20))
    assert [len(text.split()) for text in found] == [80, 80, 40]
    assert all(text.endswith("these.") for text in found)


def test_more_steps_than_allowed_are_joined():
    text = "\n\n".join(f"step number {i} has some words" for i in range(60))
    assert len(segment(text)) == MAX_STEPS


def test_steps_of_a_public_set_are_as_measured():
    """saro.md, B.4: steps of a trace 4/5/8, words of a step 24/39/58 (5, 50, 95 %)."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "star1.jsonl"
    if not path.is_file():
        pytest.skip("needs star1.jsonl beside the checkout")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [segment(parse(row["response"]).reasoning) for row in rows]
    words = [len(step.text.split()) for one in found for step in one]
    assert np.percentile([len(one) for one in found], [5, 50, 95]).tolist() == [4, 5, 8]
    assert np.percentile(words, [5, 50, 95]).tolist() == [24, 39, 58]
    # Its reasoning deliberates at the start and hardly ever corrects itself.
    marked = [any(has_marker(step.text) for step in one) for one in found]
    kinds = [step.kind for one in found for step in one]
    assert np.mean(marked) < 0.05 and kinds.count("reflect") < 20


# ---- what a step does ----------------------------------------------------------------------------


def test_the_kinds_of_the_packaged_reasonings():
    rows = [json.loads(line) for line in (QUICKSTART / "ritd.jsonl").read_text().splitlines()]
    for row in rows:
        kinds = [step.kind for step in segment(row["reasoning"])]
        assert kinds[-1] == "decide" and "reflect" not in kinds and "rule_cite" in kinds
    assert {step.kind for row in rows for step in segment(row["reasoning"])} >= {
        "understand",
        "rule_cite",
        "plan",
        "decide",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wait, that is not it.", True),
        ("It looks fine. Hold on, who is hurt?", True),
        ("Let me reconsider the second step.", True),
        ("Let me re-check it.", True),
        ("On second thought, no.", True),
        ("Stepping back, it is a story.", True),
        ("Actually, it is a frame.", True),
        ("They should wait, of course.", False),
        ("It is actually fine.", False),
        ("Waiting is an option.", False),
        ("However, this is odd. Hmm.", False),
        ("Let me think about it.", False),
    ],
)
def test_strict_markers_stand_at_the_start_of_a_sentence(text: str, expected: bool):
    assert has_marker(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("That would be illegal and would hurt people.", "forbids"),
        ("No rule applies, I can answer.", "allows"),
        ("There is nothing harmful in this.", "allows"),
        ("It is not illegal, so I can help.", "allows"),
        ("The sum is twelve.", None),
        ("Decision: comply_care", "allows"),
        ("Decision: safe_complete", "forbids"),
    ],
)
def test_stance(text: str, expected: str | None):
    assert stance(text) == expected


TRUSTING = "The user wants a story. It is just a story, so I can write the steps."
ALARMED = "The word kill points to harm, and violence is forbidden."


@pytest.mark.parametrize(
    ("step", "before", "expected"),
    [
        ("Wait, step 1 took the frame at face value; real people are hurt.", TRUSTING, "marked"),
        ("Hold on, this is dangerous, P3.R1 forbids it.", TRUSTING, "marked"),
        ("Looking again, no rule applies: a process is killed.", ALARMED, "marked"),
        ("I treated the frame as harmless, but the steps would be a crime.", TRUSTING, "unmarked"),
        ("The last step was about a word; the request is harmless.", ALARMED, "unmarked"),
        ("Wait, let me write the second part.", TRUSTING, None),
        ("Wait, the sum is twelve.", "The sum is eleven.", None),
        ("That is dangerous.", TRUSTING, None),
        ("I can write more of it.", TRUSTING, None),
    ],
)
def test_a_reflection_takes_a_thought_back(step: str, before: str, expected: str | None):
    assert reflection(step, [before]) == expected
    assert reflection(step, []) is None
    kinds = [found.kind for found in segment(f"{before}\n\n{step}")]
    assert (kinds[-1] == "reflect") == (expected is not None)


def test_cited_rules_and_the_decision_line():
    text = "P3.R1 and G5 decide, not P3.R1 again; P3 or R2 alone name nothing.\n\nDecision: refuse"
    assert cited_rules(text) == ["P3.R1", "G5"]
    assert without_decision(text).endswith("name nothing.")
    assert without_decision("no decision here") == "no decision here"
    assert without_decision("Decision: refuse") == ""
