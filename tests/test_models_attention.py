"""Blockwise attention against a full T x T softmax, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saro_jax.models import attention
from saro_jax.models.attention import LARGE, SMALL, Tokens, attend, attend_cache

B, T, N, K, H = 2, 53, 6, 2, 8
FAR = 2**30


def rows() -> Tokens:
    """Row 0: a conversation, a pair with shared prefix, padding. Row 1: one conversation."""
    segment = np.zeros((B, T), np.int32)
    branch = np.zeros((B, T), np.int32)
    position = np.zeros((B, T), np.int32)
    segment[0, :11], position[0, :11] = 1, np.arange(11)
    segment[0, 11:45] = 2
    branch[0, 20:35], branch[0, 35:45] = 1, 2
    position[0, 11:20] = np.arange(9)
    position[0, 20:35], position[0, 35:45] = 9 + np.arange(15), 9 + np.arange(10)
    segment[1], position[1] = 1, np.arange(T)
    return Tokens(*(jnp.asarray(x) for x in (segment, branch, position)))


def mask(tokens: Tokens, window: int) -> jax.Array:
    """The rule in words: same example, not later, own branch or the prefix, within the window."""
    s, b, p = (np.asarray(x) for x in tokens)
    seen = np.zeros((B, T, T), bool)
    for r in range(B):
        for q in range(T):
            for k in range(q + 1):
                seen[r, q, k] = (
                    s[r, q] == s[r, k] != 0
                    and b[r, k] in (0, b[r, q])
                    and p[r, q] - p[r, k] < window
                )
    return jnp.asarray(seen)


def full(q, k, v, seen, scale, softcap):
    k, v = jnp.repeat(k, N // K, 2), jnp.repeat(v, N // K, 2)
    s = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scale
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    p = jnp.where(seen[:, None], jax.nn.softmax(jnp.where(seen[:, None], s, -1e30), -1), 0.0)
    return jnp.einsum("BNTS,BSNH->BTNH", p, v)


@pytest.mark.parametrize("block", [8, 128])
@pytest.mark.parametrize(("window", "softcap"), [(FAR, None), (5, None), (FAR, 2.0), (7, 3.0)])
def test_equals_full_softmax_with_gradients(block, window, softcap):
    keys = jax.random.split(jax.random.key(0), 4)
    q, g = (jax.random.normal(key, (B, T, N, H)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[2:])
    tokens = rows()
    seen = mask(tokens, window)

    def ours(q, k, v):
        return attend(q, k, v, tokens, window, 0.3, softcap, block=block)

    def theirs(q, k, v):
        return full(q, k, v, seen, 0.3, softcap)

    np.testing.assert_allclose(ours(q, k, v), theirs(q, k, v), atol=2e-6)
    got = jax.grad(lambda *x: jnp.vdot(ours(*x), g), (0, 1, 2))(q, k, v)
    want = jax.grad(lambda *x: jnp.vdot(theirs(*x), g), (0, 1, 2))(q, k, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "chosen"), [((1000,), LARGE), ((600, 424), LARGE), ([50] * 20, SMALL)]
)
def test_the_size_of_blocks_follows_the_rows_and_changes_nothing(sizes, chosen):
    length, at = 4 * LARGE, np.cumsum([0, *sizes])
    found = np.zeros((3, 1, length), np.int32)
    for n, size in enumerate(sizes):
        here = slice(at[n], at[n] + size)
        found[0, 0, here], found[2, 0, here] = n + 1, np.arange(size)
    tokens = Tokens(*(jnp.asarray(x) for x in found))
    window = jnp.asarray(FAR, jnp.int32)
    assert attention._by_size(jnp.asarray, tokens, window, (SMALL, LARGE)) == chosen
    keys = jax.random.split(jax.random.key(2), 4)
    q, g = (jax.random.normal(key, (1, length, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (1, length, 2, 8)) for key in keys[2:])

    @partial(jax.jit, static_argnames="block")
    def run(q, k, v, block):
        out, pull = jax.vjp(lambda *x: attend(*x, tokens, FAR, 0.3, block=block), q, k, v)
        return out, *pull(g)

    for a, b in zip(run(q, k, v, None), run(q, k, v, 32), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_padding_is_zero_and_sends_no_gradient():
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:])
    tokens = rows()
    assert not np.any(np.asarray(attend(q, k, v, tokens, FAR, 0.3))[0, 45:])

    def total(q, k, v):
        return attend(q, k, v, tokens, FAR, 0.3).sum()

    grads = jax.grad(total, (0, 1, 2))(q, k, v)
    for grad in grads:
        assert np.all(np.isfinite(grad))
        assert not np.any(np.asarray(grad)[0, 45:])


def test_second_branch_does_not_see_the_first():
    keys = jax.random.split(jax.random.key(2), 3)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:])
    tokens = rows()
    before = attend(q, k, v, tokens, FAR, 0.3)
    after = attend(q, k.at[0, 20:35].add(3.0), v.at[0, 20:35].add(3.0), tokens, FAR, 0.3)
    np.testing.assert_array_equal(before[0, 35:45], after[0, 35:45])
    assert np.abs(np.asarray(before - after)[0, 20:35]).max() > 0.1


@pytest.mark.parametrize(("window", "softcap"), [(FAR, None), (4, 2.0)])
def test_cached_equals_packed(window, softcap):
    keys = jax.random.split(jax.random.key(3), 3)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:])
    ones = jnp.ones((B, T), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    want = attend(q, k, v, Tokens(ones, 0 * ones, position), window, 0.3, softcap)
    got = attend_cache(q[:, -3:], k, v, position[:, -3:], window, 0.3, softcap)
    np.testing.assert_allclose(got, want[:, -3:], atol=2e-6)
