"""Shared-prefix rows against padded single sequences, for random lengths, branch counts and cuts.

Hypothesis draws the items; the reference is every branch as a row of its own, with nothing shared.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saro_jax.data import packing
from saro_jax.data.tokenise import Branch, Item
from saro_jax.parallel import mesh as meshes
from saro_jax.training.scoring import put, score_tokens, sum_sequences

BRANCHES, COUNT, ROW = 4, 5, 256
REPEATABLE = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@cache
def params():
    return tiny.params()


@cache
def program(row_length, rows):
    """Per item and branch the summed log-prob; and the gradient of a weighted sum of them."""

    def total(tree, block, factor_BPK):
        logp = score_tokens(tiny.ARCH, tree, block, dtype=jnp.float32, remat="attention").logp
        sums = sum_sequences(logp, block, BRANCHES).logp.sum(-1)
        return jnp.sum(sums * factor_BPK), sums

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(items, factors, indices, shape):
    """Log-prob sums [n, K] and summed gradient of the items, packed in groups of indices."""
    found, gradient = np.zeros((len(items), BRANCHES)), None
    for group in indices:
        for block in packing.pack(items, group, **shape._asdict()):
            present = block.item >= 0
            factor = np.where(present[..., None], factors[block.item], 0.0).astype(np.float32)
            rows = put(meshes.make_mesh(), block)
            (_, sums), new = program(shape.row_length, shape.rows)(params(), rows, factor)
            found[block.item[present]] = np.asarray(sums)[present]
            gradient = new if gradient is None else jax.tree.map(jnp.add, gradient, new)
    return found, gradient


@st.composite
def drawn_items(draw):
    """Items of 1 to BRANCHES branches; every one has BRANCHES, the missing ones unscored."""
    items = []
    for i in range(COUNT):
        seed, prefix = draw(st.integers(0, 999)), draw(st.integers(1, 60))
        lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=BRANCHES))
        unscored = [draw(st.integers(0, n - 1)) for n in lengths]
        one = tiny.item(seed, prefix, *lengths)
        branches = tuple(
            Branch(b.ids, np.arange(len(b.ids)) >= skip, False)
            for b, skip in zip(one.branches, unscored, strict=True)
        )
        items.append(Item(f"i{i}", f"f:{i}", "test", 1.0, one.prefix, branches))
    # The most of any item decides the width of the arrays: the same for every draw.
    extra = tiny.item(7, 4, *(2,) * BRANCHES)
    return [*items, extra]


def alone(items, factors):
    """The same numbers from padded rows that hold one sequence each."""
    singles, where = [], []
    for i, item in enumerate(items):
        for k, branch in enumerate(item.branches):
            singles.append(Item(f"{i}/{k}", "f", "test", 1.0, item.prefix, (branch,)))
            where.append((i, k))
    wide = [*singles, tiny.item(7, 4, *(2,) * BRANCHES)]  # for arrays of the same width
    weights = np.zeros((len(wide), BRANCHES), np.float32)
    weights[: len(singles), 0] = [factors[at] for at in where]
    shape = packing.Shape(128, 1, "shared")
    sums, gradient = run(wide, weights, [[n] for n in range(len(singles))], shape)
    found = np.zeros((len(items), BRANCHES))
    for n, at in enumerate(where):
        found[at] = sums[n, 0]
    return found, gradient


@REPEATABLE
@given(drawn_items(), st.integers(0, 99))
def test_shared_and_separate_rows_equal_padded_sequences(items, seed):
    factors = np.random.default_rng(seed).normal(size=(len(items), BRANCHES)).astype(np.float32)
    expected, gradient = alone(items, factors)
    every = [range(len(items))]
    for layout, rows, length in (("shared", 2, ROW), ("separate", 2, 512)):
        shape = packing.Shape(length, rows, layout)
        found, summed = run(items, factors, every, shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=layout)
        for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(summed), strict=True):
            x, y = np.asarray(x), np.asarray(y)
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(x).max(), err_msg=layout)


@REPEATABLE
@given(drawn_items(), st.integers(0, COUNT - 1), st.data())
def test_no_branch_sees_another_and_no_item_its_neighbours(items, which, data):
    """Other tokens in one branch move that branch's log-prob and, to the last bit, nothing else."""
    changed = data.draw(st.integers(0, len(items[which].branches) - 1))
    branches = list(items[which].branches)
    ids = (branches[changed].ids + 11) % 300
    branches[changed] = Branch(ids, branches[changed].scored, False)
    other = list(items)
    other[which] = replace(items[which], branches=tuple(branches))
    shape, ones = packing.Shape(ROW, 2, "shared"), np.ones((len(items), BRANCHES), np.float32)
    before, _ = run(items, ones, [range(len(items))], shape)
    after, _ = run(other, ones, [range(len(items))], shape)
    moved = before != after
    assert moved[which, changed]
    moved[which, changed] = False
    assert not moved.any()
