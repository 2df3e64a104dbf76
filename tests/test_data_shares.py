"""How a size is shared out among groups."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saro_jax.data import shares


def test_quotas_give_what_one_group_lacks_to_the_others():
    wanted = {"a": 25.0, "b": 30.0, "c": 25.0, "d": 20.0}
    assert shares.allotted({"a": 99, "b": 99, "c": 99, "d": 99}, wanted, 100) == {
        "a": 25,
        "b": 30,
        "c": 25,
        "d": 20,
    }
    found = shares.allotted({"a": 99, "b": 0, "c": 10, "d": 99}, wanted, 100)
    assert found["b"] == 0 and found["c"] == 10 and found["a"] + found["d"] == 90
    assert found["a"] == pytest.approx(50, abs=1)


@given(
    st.lists(st.integers(0, 30), min_size=4, max_size=4),
    st.lists(st.sampled_from([0.0, 5.0, 25.0, 30.0]), min_size=4, max_size=4),
    st.integers(0, 80),
)
def test_quotas_sum_to_the_size_or_to_all_there_is(counts, wanted, size):
    names = "abcd"
    found = shares.allotted(
        dict(zip(names, counts, strict=True)), dict(zip(names, wanted, strict=True)), size
    )
    able = [c for c, s in zip(counts, wanted, strict=True) if s]
    assert sum(found.values()) == min(size, sum(able))
    assert all(found[n] <= c for n, c in zip(names, counts, strict=True))
