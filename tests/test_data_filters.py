"""Filters of a teacher's answers, each with its reason; SRS; what the reports count."""

import random
from collections.abc import Sequence

import pytest

from saro_jax.data import filters
from saro_jax.data.filters import Judged, Judges, Limits, chosen, length_report, passed, ranked
from saro_jax.records import Parsed, Prompt, Sampler, TokenCounts, Trace, TraceStep
from saro_jax.text import reasoning
from saro_jax.text.policy import load

POLICY = load()
GOOD = "The user asks for a crime.\n\nP3.R1 rules it out for good.\n\nDecision: refuse"
NO = "I can't help with that. I can explain what the law says."
PLAIN = "The user asks for a sum of two.\n\nNo rule applies, it is four.\n\nDecision: comply"


def judged(
    text: str, answer: str = NO, kind: str = "harmful", name: str = "a", i: int = 0, **more
) -> Judged:
    raw = more.pop("raw", None) or reasoning.render(text, answer)
    parsed = reasoning.parse(raw)
    steps = tuple(
        TraceStep(i=at, start_char=s.start, end_char=s.end, text=s.text, kind=s.kind)
        for at, s in enumerate(reasoning.segment(parsed.reasoning))
    )
    decided = reasoning.decision(parsed.reasoning)
    trace = Trace(
        id=f"{name}{i}",
        meta={"i": i},
        prompt_id=name,
        model="m",
        sampler=Sampler(),
        raw=raw,
        parsed=Parsed(**vars(parsed)),
        steps=steps,
        decision=decided or "none",  # type: ignore[arg-type]
        n_tok=TokenCounts(reason=more.pop("tokens", len(parsed.reasoning.split()))),
        finish=more.pop("finish", "eos"),
        origin="teacher",
    )
    categories = more.pop("categories", ("P0",) if kind == "benign" else ("P3",))
    prompt = Prompt.model_validate(
        {"id": name, "text": name, "source": "own", "kind": kind, "categories": categories} | more
    )
    return Judged(trace, prompt)


def reason(item: Judged, judges: Judges | None = None, limits: Limits | None = None) -> str | None:
    kept, rejects = passed([item], POLICY, judges or Judges(), limits or Limits())
    assert len(kept) + len(rejects) == 1
    if rejects:
        assert rejects[0].record is not None and rejects[0].record["id"] == item.trace.id
        assert rejects[0].reason.split(":")[0] in filters.FILTERS
    return rejects[0].reason if rejects else None


def test_good_answers_pass():
    assert reason(judged(GOOD)) is None
    assert reason(judged(PLAIN, "It is four.", "benign")) is None
    assert reason(judged(PLAIN, "It is four.", "borderline", categories=())) is None


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (judged("", raw=f"{GOOD}\n\n{NO}"), "parse: no_think"),
        (judged("", raw=f"<think>{GOOD}"), "parse: unclosed"),
        (judged(GOOD, finish="length"), "parse: cut off"),
        (judged("P3.R1.\nDecision: refuse"), "format: 1 steps, allowed 2 to 24"),
        (judged(GOOD, tokens=800), "format: 800 reasoning tokens, allowed 768"),
        (judged("A b c d.\n\nE f g h."), "format: no decision line at the end of the reasoning"),
        (judged(f"Decision: comply\n\n{GOOD}"), "format: more than one decision line"),
        (judged(GOOD.replace("The user", "The policy above says: the user")), "leak: "),
        (judged(GOOD.replace("The user asks", "As instructed, the user asks")), "leak: "),
        (judged(GOOD, f"user prompt: {NO}"), "leak: 'user prompt:'"),
        (judged(GOOD.replace("P3.R1", "P3.R9")), "citation: no such rule: P3.R9"),
        (judged(GOOD.replace("P3.R1", "P4.R1")), "citation: cites no rule of P3"),
        (judged(GOOD.replace("P3.R1", "It")), "citation: cites no rule of P3"),
        (
            judged(PLAIN.replace("No rule applies", "G3 applies"), "Four.", "benign"),
            "citation: cites G3 for a benign prompt",
        ),
        (judged(GOOD, "Sure, here is how."), "consistency: decision refuse, answer FC"),
        (judged(PLAIN, NO, "benign"), "consistency: decision comply, answer FR"),
        (
            judged(PLAIN.replace("comply", "safe_complete"), NO, "benign"),
            "over_refusal: answer FR to a benign prompt",
        ),
        (
            judged(PLAIN, "It is 5.", "benign", meta={"final": "4"}),
            "quality: answer is not 4",
        ),
    ],
)
def test_each_filter_names_its_reason(item: Judged, expected: str):
    found = reason(item)
    assert found is not None and found.startswith(expected), found


def test_ways_of_saying_rule_are_no_leak():
    for text in ("P3.R1 forbids it.", "The rule that matters is P3.R1.", "No policy applies here."):
        assert not filters.LEAKS.search(text)


def always(value):
    return lambda pairs: [value] * len(pairs)


@pytest.mark.parametrize(
    ("judges", "expected"),
    [
        (Judges(answer_risk=always(0.1)), None),
        (Judges(answer_risk=always(0.2)), "answer_safety: 0.200, allowed below 0.2"),
        (Judges(answer_risk=always(None)), "answer_safety: invalid verdict"),
        (Judges(reasoning_risk=always(0.31)), "reasoning_safety: 0.310, allowed below 0.3"),
        (Judges(quality=always([10, 8, 9])), None),
        (Judges(quality=always([10, 7, 9])), "quality: scores 10, 7, 9, allowed from 8"),
        (Judges(quality=always(None)), "quality: invalid scores"),
        (Judges(refusal=always("invalid")), "consistency: invalid verdict on refusal"),
        (Judges(refusal=always("PR")), "consistency: decision refuse, answer PR"),
    ],
)
def test_judges_are_asked_and_invalid_verdicts_never_pass(judges: Judges, expected: str | None):
    assert reason(judged(GOOD), judges) == expected


def test_a_judge_sees_only_what_cheaper_filters_left():
    asked: list[Sequence] = []

    def risk(pairs):
        asked.append(pairs)
        return [0.0] * len(pairs)

    items = [judged(GOOD, "Sure.", name="a"), judged(GOOD, name="b")]
    items.append(judged(PLAIN, "Four.", "benign", "c"))
    kept, rejects = passed(items, POLICY, Judges(answer_risk=risk), Limits())
    assert asked == [[("b", NO)]]  # harmful prompts only
    assert [item.prompt.id for item in kept] == ["b", "c"] and len(rejects) == 1
    assert kept[0].verdicts == {"refusal": "FR", "answer_risk": 0.0}


# ---- shortest rejection sampling -----------------------------------------------------------------


def lengths(*tokens: int, kind: str = "harmful") -> list[Judged]:
    return [judged(GOOD, kind=kind, i=i, tokens=n) for i, n in enumerate(tokens)]


def order(items: Sequence[Judged], mode, floor: int = 40) -> list[int]:
    return [item.trace.n_tok.reason or 0 for item in ranked(items, mode, floor)]


def test_what_each_mode_keeps_first():
    items = lengths(90, 20, 50, 70)
    assert order(items, "shortest") == [20, 50, 70, 90]
    assert order(items, "shortest_q") == [50, 70, 90, 20]
    assert order(lengths(90, 20, 50, kind="benign"), "shortest_q") == [20, 50, 90]
    assert order(lengths(10, 30, 20), "shortest_q") == [30, 20, 10]  # all below the floor
    assert order(lengths(10, 20, 30, 40, 50, 60, 70, 80), "pctl")[0] == 20
    for item, score in zip(items, (10, 10, 8, 9), strict=True):
        item.verdicts["quality"] = [score, 10, 10]
    assert order(items, "shortest_q")[0] == 70  # the shortest within 1 of the full score
    assert order(items, "pareto")[:2] == [20, 90]
    assert ranked([], "shortest", 40) == []


def test_a_repeated_reasoning_gives_way_to_the_prompts_next():
    tail = "\n\nP3.R1 rules it out for good.\n\nDecision: refuse"
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=count))

    text = words(40)
    first = [judged(text + tail, name="a")]
    second = [judged(text + tail, name="b", i=0), judged(words(60) + tail, name="b", i=1)]
    third = [judged(text + tail, name="c")]
    kept, rejects = chosen([first, second, third], "shortest", 0, 0.6)
    assert [item.trace.id for item in kept] == ["a0", "b1"]
    assert [(one.id, one.reason.split(":")[0]) for one in rejects] == [
        ("b0", "dedup"),
        ("c0", "dedup"),
    ]
    kept, rejects = chosen([first, second, third], "shortest", 0, 1.0)
    assert len(kept) == 3 and not rejects
    assert len(chosen([second], "pareto", 0, 1.0)[0]) == 2


def test_the_report_over_n_says_what_fewer_samples_would_have_given():
    accepted = {"a": lengths(90, 50, 70, 60), "b": [judged(GOOD, name="b", i=3, tokens=45)]}
    prompts = [judged(GOOD, name=name).prompt for name in "abc"]
    found = length_report(prompts, accepted, 4, "shortest", 0)
    assert [one["n"] for one in found] == [1, 2, 4]
    assert [one["reasoning_tokens"] for one in found] == [90, 50, 47.5]
    assert [one["accepted"] for one in found] == [0.3333, 0.3333, 0.6667]


def test_yields_count_by_kind():
    items = [judged(GOOD, name="a"), judged(PLAIN, "Four.", "benign", "b"), judged("x", name="c")]
    kept, rejects = passed(items, POLICY, Judges(), Limits())
    prompts = [item.prompt for item in items]
    found = filters.yields(prompts, [item.trace for item in items], kept, kept, rejects)
    assert set(found) == {"harmful", "benign"}
    assert found["harmful"] == {
        "prompts": 2,
        "samples": 2,
        "accepted": 1,
        "rows": 1,
        "yield": 0.5,
        "drop_reasons": {"format": 1},
    }
    assert found["benign"]["yield"] == 1.0


def test_decisions_before_and_after_the_choice():
    items = [judged(GOOD, i=i) for i in range(3)]
    items.append(judged(GOOD.replace("refuse", "safe_complete"), i=3))
    assert filters.decisions(items, items[:1]) == {
        "harmful": {"accepted": {"refuse": 0.75, "safe_complete": 0.25}, "kept": {"refuse": 1.0}}
    }
