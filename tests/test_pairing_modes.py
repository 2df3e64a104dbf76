"""Modes of reasoning: labels, the cheapest that is enough, forced openings."""

import pytest

from saro_jax.pairing import modes
from saro_jax.text import reasoning

LONG = "\n\n".join(f"This is step number {i} of it all." for i in range(6)) + "\n\nDecision: comply"


def test_the_cheapest_sufficient_mode():
    rates: dict[modes.Mode, tuple[int, int]] = {"none": (3, 4), "brief": (4, 4), "full": (4, 4)}
    assert modes.cheapest(rates, "benign") == "brief"
    assert modes.cheapest({"none": (10, 10)}, "benign") == "none"
    assert modes.cheapest({"none": (9, 10)}, "benign") == "none"
    # A jailbreak is not trusted without reasoning where that failed once.
    assert modes.cheapest({"none": (9, 10), "full": (9, 10)}, "jailbreak") == "full"
    assert modes.cheapest({"none": (0, 4), "brief": (1, 4), "full": (3, 4)}, "harmful") is None
    assert modes.cheapest({}, "harmful") is None


@pytest.mark.parametrize("mode", modes.MODES)
def test_openings_parse_as_their_mode(mode):
    text = modes.opening(mode, LONG) or f"<think>\n{LONG}\n</think>\n\n"
    parsed = reasoning.parse(text + "Answer.")
    assert parsed.status == ("empty_think" if mode == "none" else "ok")
    assert modes.mode_of(parsed.reasoning) == mode
    if mode == "brief":
        assert reasoning.decision(parsed.reasoning) == "comply"


def test_brief_is_short_whatever_the_thought():
    words = "word " * 500
    parsed = reasoning.parse(modes.opening("brief", words) + "x")
    assert len(parsed.reasoning.split()) <= modes.BRIEF_WORDS
