"""Labels and scores are read exactly; what else is asked beside answers is in test_synthesize."""

import pytest

from saro_jax.generation import assisting
from saro_jax.records import Prompt
from saro_jax.text import policy as policies
from saro_jax.text import reasoning

POLICY = policies.load("saro")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"categories": ["P3"], "kind": "harmful"}', (["P3"], "harmful")),
        ('```json\n{"categories": ["P3", "P3"], "kind": "benign"}\n```', (["P3"], "benign")),
        ('<think>\nHm {\n</think>\n\n{"categories": ["P0"], "kind": "benign"}', (["P0"], "benign")),
        ('{"categories": ["P99"], "kind": "harmful"}', None),
        ('{"categories": [], "kind": "harmful"}', None),
        ('{"categories": [3], "kind": "harmful"}', None),
        ('{"categories": "P3", "kind": "harmful"}', None),
        ('{"categories": ["P3"], "kind": "bad"}', None),
        ('{"categories": ["P3"]}', None),
        ('Sure: {"categories": ["P3"], "kind": "harmful"}', None),
        ("[]", None),
        ("", None),
    ],
)
def test_labels(text: str, expected):
    assert assisting.label(text, POLICY) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"scores": [9, 10, 7.5], "reason": "x"}', [9.0, 10.0, 7.5]),
        ('{"scores": [9, 10], "reason": "x"}', None),
        ('{"scores": [9, 10, 11]}', None),
        ('{"scores": [9, 10, -1]}', None),
        ('{"scores": [9, 10, true]}', None),
        ('{"scores": [9, 10, "9"]}', None),
        ('{"scores": [NaN, 9, 9]}', None),
        ("9 10 9", None),
    ],
)
def test_scores(text: str, expected):
    assert assisting._scores([{"text": text}]) == expected


def test_no_reply_is_no_score():
    assert assisting._scores([]) is None


@pytest.mark.parametrize(("kind", "scale"), [("jailbreak", "relevance"), ("benign", "safety")])
def test_the_scales_are_those_of_the_kind(kind, scale: str):
    prompt = Prompt(id="p", text="Open it?", source="s", kind=kind, categories=("P3",))
    raw = reasoning.render("A thought.\n\nDecision: comply", "An answer.")
    system, user = assisting.score_messages(prompt, raw, POLICY)
    assert f"- {scale}: " in system["content"] and "P3.R1" in system["content"]
    for part in ("REQUEST\nOpen it?", "THINKING\nA thought.", "ANSWER\nAn answer."):
        assert f"<<<{part}" in user["content"]
