"""Quotas, shares and lengths of pairs."""

import pytest

from saro_jax.pairing import balance
from saro_jax.records import BranchLengths, Pref


def pair(i: int, w: int, l: int, kind: str = "OP1", **meta) -> Pref:  # noqa: E741
    fields = {"prompt": "p", "chosen": "a", "rejected": "b", "meta": meta}
    return Pref(id=f"{kind}{i}", kind=kind, len_tok=BranchLengths(w=w, l=l), **fields)  # type: ignore


def test_the_rest_of_a_quota_is_rejected():
    pairs = [pair(i, 1, 1, prompt_kind="x" if i % 2 else "y") for i in range(6)]
    kept, rejects = balance.quotas(
        pairs, lambda one: one.meta["prompt_kind"], {"x": 1.0, "y": 2.0}, 3
    )
    assert [one.id for one in kept] == ["OP10", "OP11", "OP12"]
    assert {one.reason for one in rejects} == {"quota: enough of x", "quota: enough of y"}


def test_a_capped_kind_has_its_share_of_what_stays():
    pairs = [pair(i, 1, 1, "OP3" if i % 2 else "OP1") for i in range(16)]
    kept, rejects = balance.capped(pairs, lambda one: one.kind == "OP3", 0.2, "off-policy: enough")
    assert sum(one.kind == "OP3" for one in kept) == 2 and len(kept) == 10 and len(rejects) == 6


def sided(refuse: int, answer: int) -> list[Pref]:
    kinds = ["OP1"] * refuse + ["OP4"] * answer + ["MODE"]
    return [pair(i, 1, 1, kind) for i, kind in enumerate(kinds)]


def side(one: Pref) -> str | None:
    return {"OP1": "refuse", "OP4": "answer"}.get(one.kind)


@pytest.mark.parametrize(
    ("refuse", "answer", "weights"),
    [
        (10, 10, {"OP1": 1.0, "OP4": 45 / 55, "MODE": 1.0}),
        (10, 20, {"OP1": 1.0, "OP4": 45 / 55 / 2, "MODE": 1.0}),
        (40, 10, {"OP1": 55 / 45 / 4, "OP4": 1.0, "MODE": 1.0}),
        (0, 20, {"OP4": 1.0, "MODE": 1.0}),
    ],
)
def test_the_heavier_side_of_the_decision_loses_weight(refuse, answer, weights):
    kept = balance.decided(sided(refuse, answer), side, {"refuse": 0.55, "answer": 0.45})
    assert {one.kind: one.weight for one in kept} == pytest.approx(weights, rel=1e-9)
    assert [one.id for one in kept] == [one.id for one in sided(refuse, answer)]


def test_weights_alone_balance_a_slight_lean():
    pairs = [pair(i, 100, 120) for i in range(6)] + [pair(i + 6, 100, 95) for i in range(4)]
    before = balance.imbalance(pairs)
    kept, rejects, report = balance.balanced(pairs, 0.06, 0.5)
    assert before < -0.06 and not rejects and len(kept) == 10
    assert report["OP1"]["within"] and balance.imbalance(kept) == pytest.approx(-0.06, abs=1e-3)
    assert {one.weight for one in kept[6:]} == {1.0} and all(0.5 <= o.weight < 1 for o in kept[:6])


def test_the_most_lopsided_go_where_weights_do_not_do():
    pairs = [pair(i, 50, 60 + 60 * i) for i in range(8)] + [pair(8, 90, 60), pair(9, 80, 60)]
    kept, rejects, report = balance.balanced(pairs, 0.1, 0.0)
    assert report["OP1"]["within"] and abs(balance.imbalance(kept)) <= 0.101
    assert {one.id for one in rejects} == {f"OP1{i}" for i in range(8 - len(rejects), 8)}
    assert all(one.reason == "length: OP1 would teach length" for one in rejects)


def test_a_floor_keeps_pairs_and_says_so():
    pairs = [pair(i, 50, 150) for i in range(10)]
    kept, rejects, report = balance.balanced(pairs, 0.1, 0.5)
    assert len(kept) == 5 == len(rejects) and report["OP1"]["within"] is False
    assert report["OP1"]["after"] == report["OP1"]["before"] == -1.0


def test_kinds_about_length_are_left_alone():
    pairs = [pair(i, 10, 100, "PPB") for i in range(4)]
    kept, rejects, report = balance.balanced(pairs, 0.1, 0.0)
    assert kept == pairs and not rejects and report["PPB"]["within"]
