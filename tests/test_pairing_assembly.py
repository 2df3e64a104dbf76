"""The sets that train obey their shares, whatever they are put together from."""

from collections import Counter
from typing import Any

import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from saro_jax.pairing import assembly, balance, reflections
from saro_jax.pairing.assembly import Shares
from saro_jax.records import KINDS, BranchLengths, Pref

REFLECTING = ("PPA", "PPB", "PPC", "PPD", "PPE", "PPG")
OPENINGS = ("Wait, that is wrong.", "On a second reading it is theft.")
one_pair = st.tuples(
    st.sampled_from(("OP1", "OP3", "OP4", *assembly.PROCESS, "NOOP", "MODE")),
    st.sampled_from(KINDS),
    st.sampled_from(OPENINGS),
    st.integers(0, 5),  # the stem
    st.integers(5, 60),
    st.integers(5, 60),
)


def made(i: int, kind: Any, of: str, opening: str, stem: int, w: int, l: int) -> Pref:  # noqa: E741
    meta: dict[str, Any] = {"prompt_kind": of}
    if kind in REFLECTING:
        meta |= {"source": "search", "stem": f"stem {stem}"}
    lengths = BranchLengths(w=w, l=l)
    return Pref(
        id=f"{i}", kind=kind, prompt="p", chosen=opening, rejected="b", meta=meta, len_tok=lengths
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(one_pair, max_size=60),
    st.builds(
        Shares,
        size=st.sampled_from((None, 5, 20)),
        off_policy=st.sampled_from((0.0, 0.2)),
        balance=st.sampled_from((0.1, 0.5)),
        balance_floor=st.sampled_from((0.0, 0.5)),
        stem=st.sampled_from((0.08, 0.3)),
        no_op=st.sampled_from((0.1, 0.4)),
    ),
)
def test_the_pairs_that_are_written_obey_all_shares(drawn, shares):
    pairs = [made(i, *one) for i, one in enumerate(drawn)]
    op = [pair for pair in pairs if pair.kind.startswith("OP")]
    pp = [pair for pair in pairs if not pair.kind.startswith("OP")]
    kept, rejects, _ = assembly.assembled(op, pp, shares)
    assert sorted([*(p.id for p in kept), *(r.id for r in rejects)]) == sorted(p.id for p in pairs)
    kinds = Counter(pair.kind for pair in kept)
    outcome = sum(count for kind, count in kinds.items() if kind.startswith("OP"))
    process = len(kept) - outcome
    assert kinds["OP3"] <= shares.off_policy * outcome + 1e-9
    assert kinds["NOOP"] <= shares.no_op * process + 1e-9
    stems = Counter(pair.meta["stem"] for pair in kept if "stem" in pair.meta)
    assert max(stems.values(), default=0) <= max(1, shares.stem * process)
    reflecting = [pair for pair in kept if "source" in pair.meta]
    assert reflections.unmarked_share(reflecting) >= 0.4
    if shares.size is not None:
        variants = sum(kinds[kind] for kind in assembly.PROCESS)
        assert outcome <= shares.size and variants <= shares.size
        assert kinds["MODE"] <= 0.05 * process + 1e-9
    before = Counter(pair.kind for pair in pairs)
    for kind, count in kinds.items():
        mine = [pair for pair in kept if pair.kind == kind]
        assert all(0.5 - 1e-3 <= pair.weight <= 1.0 for pair in mine)
        lean = abs(balance.imbalance(mine))
        within = kind in balance.SHORTER or lean <= shares.balance + 1e-3
        assert within or count <= max(1, shares.balance_floor * before[kind] + 1)


def test_what_is_left_out_does_not_undo_a_share():
    """One stem in 14 of 194 pairs is within its share only while nothing else goes."""
    plain = [made(i, "PPF", "harmful", OPENINGS[1], 0, 30, 30) for i in range(90)]
    lopsided = [made(100 + i, "PPC", "harmful", OPENINGS[1], i, 60, 5) for i in range(90)]
    one_stem = [made(200 + i, "PPA", "harmful", OPENINGS[1], 99, 30, 30) for i in range(14)]
    kept, _, _ = assembly.assembled([], [*plain, *lopsided, *one_stem], Shares(balance_floor=0.0))
    assert Counter(pair.kind for pair in kept) == {"PPF": 90, "PPC": 1, "PPA": 7}


def test_an_early_reflection_is_the_shorter_in_tokens():
    pair = made(0, "PPB", "harmful", "Wait.", 0, 1, 1)
    long = pair.model_copy(update={"chosen": "no lock", "rejected": "no refuse it"})
    kept, rejects, _ = assembly.checked([long], tiny.tokenizer())
    assert len(kept) + len(rejects) == 1
    turned = long.model_copy(update={"id": "1", "chosen": long.rejected, "rejected": long.chosen})
    both, gone, _ = assembly.checked([long, turned], tiny.tokenizer())
    assert [pair.id for pair in both] == ["0"] and [one.id for one in gone] == ["1"]
    assert gone[0].reason == "PPB: the early reflection has no fewer tokens"
