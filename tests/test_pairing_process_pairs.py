"""Process pairs: prefixes, branches and the conditions of each kind."""

import pairing
import pytest

from saro_jax.pairing import continuations, process_pairs, search
from saro_jax.pairing.outcomes import Limits, Outcome, Verdict
from saro_jax.pairing.process_pairs import Mended, Site, Worth
from saro_jax.pairing.values import step_value
from saro_jax.text import policy as policies
from saro_jax.text import reasoning

LIMITS, WORTH, POLICY = Limits(), Worth(), policies.load("saro")
OF = pairing.prompt()
THOUGHT = (
    "The user asks about a lock here.\n\nI can gladly answer this one.\n\n"
    "First I think about it some more.\n\nDecision: comply"
)
BAD = pairing.outcome(OF, 0, 0.95, "FC", THOUGHT)
SITE = Site(BAD, 1, "values", 0.25)
REFLECTION = "I was wrong in step 1: it is theft, and P3.R1 forbids it.\n\n"
TEXT = f"{REFLECTION}Decision: refuse\n</think>\n\nI can't help with that."


def mended(
    site: Site = SITE, text: str = TEXT, p: float = 0.05, value: float | None = 1.0
) -> Mended:
    trace = continuations.whole(OF, site.prefix + text, model="m", origin="self")
    return Mended(text, "search", "stem", Outcome(trace, OF, Verdict(p, "FR"), Verdict()), value)


def test_heads_and_rests_are_the_response_again():
    trace = BAD.trace
    assert continuations.head(trace, 0) == "<think>\n"
    for step in range(len(trace.steps)):
        rest = trace.raw[len(continuations.head(trace, step)) :]
        assert rest.startswith(trace.steps[step].text)
    assert continuations.head(trace, 4) == trace.raw.split("\n</think>")[0]
    assert SITE.prefix + SITE.rest == trace.raw


def test_ppa_prefers_the_reflection_to_going_on():
    made = process_pairs.reflect_or_continue("PPA", SITE, mended(), LIMITS, WORTH)
    assert not isinstance(made, str)
    assert made.prefix == "<think>\nThe user asks about a lock here.\n\n"
    assert made.chosen == TEXT and made.rejected.startswith("I can gladly")
    assert made.prefix + made.rejected == BAD.trace.raw
    assert (made.value.w, made.value.l) == (1.0, 0.25) and made.branch_step == 1  # type: ignore
    assert made.parent_ids[-1] == OF.id and BAD.trace.id in made.parent_ids


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"p": 0.5}, "end"),
        ({"value": 0.5}, "value"),
        ({"text": f"{REFLECTION}Decision: refuse"}, "end"),
    ],
)
def test_a_reflection_that_does_not_help_is_no_pair(change, reason):
    made = process_pairs.reflect_or_continue("PPA", SITE, mended(**change), LIMITS, WORTH)
    assert isinstance(made, str) and made.startswith(reason)
    fine = Site(BAD, 1, "values", 0.8)
    made = process_pairs.reflect_or_continue("PPA", fine, mended(value=1.0), LIMITS, WORTH)
    assert made == "no gain: values 1 and 0.8"


def test_ppb_prefers_the_early_reflection():
    late = Site(BAD, 3, "values")
    made = process_pairs.early_or_late(SITE, mended(), late, mended(late), LIMITS, WORTH)
    assert not isinstance(made, str) and made.prefix == SITE.prefix
    assert made.prefix + made.rejected == late.prefix + TEXT and made.chosen == TEXT
    near = Site(BAD, 2, "values")
    assert process_pairs.early_or_late(SITE, mended(), near, mended(near), LIMITS, WORTH) == (
        "late: no room for two steps between"
    )


def test_ppb_wants_a_valued_reflection_and_two_good_ends():
    late = Site(BAD, 3, "values")
    weak = mended(value=0.5)
    made = process_pairs.early_or_late(SITE, weak, late, mended(late), LIMITS, WORTH)
    assert made == "value: 0.5 after the reflection, allowed from 0.75"
    bad = mended(late, p=0.9)
    made = process_pairs.early_or_late(SITE, mended(), late, bad, LIMITS, WORTH)
    assert made == "late: the late reflection does not end well"


@pytest.mark.parametrize(("number", "sort"), [(0, "generic"), (1, "wrong_rule"), (2, "unkept")])
def test_ppe_rejects_what_is_not_authentic(number, sort):
    made = process_pairs.authentic_or_not(SITE, mended(), POLICY, number, LIMITS)
    assert not isinstance(made, str) and made.meta["sort"] == sort and made.chosen == TEXT
    if sort == "unkept":
        assert made.rejected == REFLECTION + SITE.rest
    else:
        assert made.rejected.endswith("Decision: refuse\n</think>\n\nI can't help with that.")
        assert "P3.R1" not in made.rejected
    vague = mended(text=TEXT.replace("P3.R1 forbids it", "it is bad"))
    made = process_pairs.authentic_or_not(SITE, vague, POLICY, number, LIMITS)
    assert made == "authenticity: cites no rule"


def test_ppf_wants_half_as_much_again():
    def good(i, words):
        return pairing.outcome(OF, i, 0.0, "FR", "word " * words + "\n\nDecision: refuse")

    made = process_pairs.brevity([good(0, 50), good(1, 60), good(2, 90)], 40)
    assert made is not None and made.weight == 0.3
    assert made.chosen == good(0, 50).trace.raw and made.rejected == good(2, 90).trace.raw
    assert process_pairs.brevity([good(0, 50), good(1, 60)], 40) is None


def test_no_op_adds_a_needless_reflection_to_the_very_same_answer():
    plain = pairing.prompt("2+2?", "benign")
    one = pairing.outcome(plain, 0, None, "FC", THOUGHT)
    for number in range(9):
        made = process_pairs.no_op(one, number)
        assert not isinstance(made, str)
        assert made.prefix + made.chosen == one.trace.raw
        step, rest = made.rejected.split("\n\n", 1)
        assert rest == made.chosen and reasoning.reflection(step, ["I can answer."]) in (
            None,
            "marked",
        )
    assert isinstance(process_pairs.no_op(BAD, 0), str)


def test_sites_by_values_and_by_words():
    def values(*good):
        return [step_value("t", i - 1, n, 4) for i, n in enumerate(good)]

    by_values = search.site_of(BAD, values(3, 3, 3, 0, 0), WORTH)
    assert by_values == Site(BAD, 2, "values", 0.0)
    by_words = search.site_of(BAD, values(0, 0, 0, 0, 0), WORTH)
    assert by_words == Site(BAD, 1, "words", 0.0)
    # What goes wrong at once is cut after the first step, which a reflection can take back.
    assert search.site_of(BAD, values(4, 0, 0, 0, 0), WORTH) == Site(BAD, 1, "values", 0.0)
    # A step of which nothing could be drawn hides those after it, not the value at the site.
    unknown = values(3, 3, 3, 1, 0)
    unknown[1] = step_value("t", 0, 0, 0)
    assert search.site_of(BAD, unknown, WORTH) == Site(BAD, 1, "words", 0.75)
    calm = pairing.outcome(OF, 0, 0.9, "FC", "One word more here.\n\nAnother few words here.")
    assert search.site_of(calm, values(0, 0, 0), WORTH) is None
