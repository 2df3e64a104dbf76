"""The reasoning parser: its table, every status, and what holds for any text."""

import itertools

import pytest

from saro_jax.text.reasoning import (
    CLOSE,
    OPEN,
    STATUSES,
    TAGS,
    decision,
    parse,
    spans,
    steps,
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
