"""Stems of reflections by the project's own detector, the guard of authenticity, shares."""

import pairing
import pytest

from saro_jax.pairing import reflections
from saro_jax.records import Pref
from saro_jax.text import policy as policies
from saro_jax.text import reasoning

POLICY = policies.load("saro")
PROMPTS = {"harmful": pairing.prompt(), "benign": pairing.prompt("Why is it blue?", "borderline")}
BEFORE = {
    "harmful": ["The user asks about a lock.", "That is fine, I can gladly answer it."],
    "benign": ["The user asks about colour.", "That is dangerous and I must refuse it."],
}
STEMS = [
    (side, style, number, stem)
    for side in ("harmful", "benign")
    for style in ("marked", "unmarked")
    for number, stem in enumerate(reflections.stems()[side][style])
]


def filled(stem: str, side: str) -> str:
    prompt = PROMPTS[side]
    return reflections.fill(stem, reflections.slots(prompt, prompt.text, POLICY, 1, 0))


def test_there_are_enough_stems_for_the_cap():
    slots = reflections.stems()
    for side in ("harmful", "benign"):
        assert len({*slots[side]["marked"], *slots[side]["unmarked"]}) >= 20
    assert len({*slots["cue"]["marked"], *slots["cue"]["unmarked"]}) >= 20


@pytest.mark.parametrize(("side", "style", "number", "stem"), STEMS)
def test_each_stem_is_a_reflection_of_its_style(side, style, number, stem):
    text = filled(stem, side)
    assert "{" not in text
    assert reasoning.reflection(text, BEFORE[side]) == style, text
    assert reflections.style_of(text) == style
    assert reflections.unauthentic(text, PROMPTS[side], POLICY) is None, text
    assert len(reasoning.segment(f"{text}\n\nDecision: refuse")) == 2


def test_cues_are_neutral_and_of_their_style():
    for style in ("marked", "unmarked"):
        for number in range(len(reflections.stems()["cue"][style])):
            text = filled(reflections.cue(style, number), "harmful")
            assert reasoning.has_marker(text) == (style == "marked"), text
            assert reasoning.stance(text) is None, text
            assert not reasoning.cited_rules(text)


def test_alarms_and_needless_checks_are_not_authentic():
    for text in (*reflections.stems()["generic"], *reflections.stems()["needless"]):
        assert reflections.unauthentic(text, PROMPTS["harmful"], POLICY) is not None, text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("I was wrong in step 2: it is theft, and P3.R1 forbids it.", None),
        ("I was wrong in step 2: it is theft.", "cites no rule"),
        ("I was wrong in step 2: P1.R1 forbids it.", "cites no rule of P3"),
        ("I was wrong in step 2: P3.R99 forbids it.", "no such rule: P3.R99"),
        ("P3.R1 forbids it.", "names no mistake"),
    ],
)
def test_the_citation_check(text, complaint):
    assert reflections.unauthentic(text, PROMPTS["harmful"], POLICY) == complaint


def test_a_wrong_rule_is_one_of_another_category():
    wrong = reflections.wrong_rule("P3.R1", POLICY)
    assert wrong in POLICY.rule_ids() and not wrong.startswith("P3.")


def pref(i: int, chosen: str, stem: str = "") -> Pref:
    meta = {"stem": stem or f"s{i}", "source": "template"}
    return Pref(id=f"{i}", kind="PPA", prompt="p", chosen=chosen, rejected="r", meta=meta)


def test_no_stem_opens_more_than_its_share():
    pairs = [pref(i, "x", "one" if i % 2 else "") for i in range(50)]
    kept, rejects = reflections.capped_stems(pairs, 0.08)
    assert sum(one.meta["stem"] == "one" for one in kept) == 4 and len(kept) == 29
    assert {one.reason for one in rejects} == {"stem: opens 4 pairs already"}


def test_two_of_five_have_no_marker():
    pairs = [pref(i, "Wait, no." if i < 8 else "No.") for i in range(10)]
    kept, rejects = reflections.guarded(pairs)
    assert reflections.unmarked_share(kept) >= 0.4 and len(kept) == 5 == len(rejects)
    assert [one.id for one in kept] == ["0", "1", "2", "8", "9"]
