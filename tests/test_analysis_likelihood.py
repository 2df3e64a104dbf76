"""Tests analysis/likelihood.py: scores against a plain numpy model; gains on planted numbers."""

import numpy as np
import pytest
import tiny

from saro_jax.analysis import likelihood
from saro_jax.analysis.likelihood import Scores
from saro_jax.data.rows import PreferenceRow
from saro_jax.text.chat import Message, prompt_ids


def row(i: int, prompt: str | None = None, thought: str = "it is fine. go on") -> PreferenceRow:
    return PreferenceRow(
        id=f"p{i}",
        where=f"x:{i}",
        kind="OP1",
        weight=1.0,
        prompt=(Message("user", prompt or f"lock {i}"),),
        prefix="",
        chosen=(Message("assistant", f"<think>\n{thought} {i}\n</think>\n\nno, {i}"),),
        rejected=(Message("assistant", f"<think>\nyes\n</think>\n\nwell, {i} then"),),
    )


def test_cases_are_pairs_with_two_answers_and_reasoning():
    bare = likelihood.replace(row(1), chosen=(Message("assistant", "no"),))
    process = likelihood.replace(row(2), chosen=(Message("assistant", "<think>\nno. so"),))
    found = likelihood.cases([row(0), bare, process])
    assert [(one.row.id, one.reasoning, one.safe, one.unsafe) for one in found] == [
        ("p0", "it is fine. go on 0", "no, 0", "well, 0 then")
    ]


def test_contexts_keep_the_words_and_take_others_from_other_prompts():
    given = likelihood.cases([row(i, prompt=f"lock {i // 2}") for i in range(8)])
    found = likelihood.contexts(given, seed=1)
    assert found.keys() == set(likelihood.CONDITIONS)
    assert set(found["prompt"]) == {""}
    assert found["reasoning"][3] == "<think>\nit is fine. go on 3\n</think>\n\n"
    for right, mixed in zip(found["reasoning"], found["shuffled"], strict=True):
        assert sorted(right.split()) == sorted(mixed.split())
    assert found["shuffled"] != found["reasoning"]
    for i, text in enumerate(found["other"]):
        source = int(text.split()[-2])
        assert source // 2 != i // 2
    assert found == likelihood.contexts(given, seed=1) != likelihood.contexts(given, seed=2)


def test_one_prompt_alone_has_no_other():
    with pytest.raises(ValueError, match="all pairs have the same prompt"):
        likelihood.contexts(likelihood.cases([row(i, prompt="a") for i in range(3)]))


def test_scores_are_those_of_a_plain_model():
    tokenizer, params = tiny.tokenizer(), tiny.params()
    given = likelihood.cases([row(i) for i in range(3)])
    before = likelihood.contexts(given)["reasoning"]
    rows = likelihood.in_context(given, before)
    told: list[int] = []
    found = likelihood.score(
        tiny.ARCH, params, tokenizer, rows, row_length=256, progress=told.append
    )
    assert sum(told) == 3
    for case, text in zip(given, before, strict=True):
        assert not isinstance(case.row.prompt, str)
        start = prompt_ids(tokenizer, case.row.prompt, text)
        for answer, got, count in (
            (case.safe, found[case.row.id].chosen, found[case.row.id].chosen_tokens),
            (case.unsafe, found[case.row.id].rejected, found[case.row.id].rejected_tokens),
        ):
            ids = [*tokenizer.encode(answer), tokenizer.eos_token_id]
            want = tiny.logps(params, np.concatenate([start, ids]))[-len(ids) :].sum()
            assert count == len(ids)
            assert got == pytest.approx(want, abs=1e-3)


def test_rows_that_are_too_long_are_left_out():
    tokenizer = tiny.tokenizer()
    rows = [row(0), row(1, prompt="a lock " * 60)]
    assert likelihood.score(tiny.ARCH, tiny.params(), tokenizer, rows, row_length=256).keys() == {
        "p0"
    }
    assert likelihood.score(tiny.ARCH, tiny.params(), tokenizer, rows[1:], row_length=256) == {}


def test_gains_are_paired_and_per_token():
    given = likelihood.cases([row(i) for i in range(30)])
    rng = np.random.default_rng(0)
    base = rng.normal(size=30)

    def of(shift: float) -> dict[str, Scores]:
        return {f"p{i}": Scores(2 * (base[i] + shift), 0.0, 2, 5) for i in range(30)}

    scored = {"prompt": of(0.0), "reasoning": of(1.5), "shuffled": of(0.25), "other": of(0.0)}
    del scored["other"]["p7"]  # left out of all
    found = {one.condition: one for one in likelihood.gains("m", scored, given)}
    assert {one.n for one in found.values()} == {29}
    assert found["prompt"].mean == pytest.approx(np.delete(base, 7).mean())
    assert found["prompt"].low < found["prompt"].mean < found["prompt"].high
    gain = found["gain:reasoning"]
    assert (gain.mean, gain.low, gain.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found["gain:shuffled"].mean == pytest.approx(0.25)
    assert found["gain:other"].mean == pytest.approx(0.0, abs=1e-12)
    assert likelihood.gains("m", {**scored, "other": {}}, given) == []
