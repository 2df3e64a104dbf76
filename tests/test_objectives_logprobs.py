"""Chunked log-probs equal the full computation, values and gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saro_jax.objectives import logprobs
from saro_jax.objectives.logprobs import token_scores
from saro_jax.parallel import mesh as meshes

B, S, D, V = 3, 37, 16, 211  # no two of them divide each other
REAL = 200  # ids 200.. are padding of the vocabulary: never a target, still in the softmax
CHUNKS = [1, 5, 3 * 8, 3 * 37, 10_000]


def inputs(seed: int = 0, lengths: tuple[int, ...] = (37, 0, 21)):
    """hidden, head, target, valid; row 1 has no scored token at all."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    target = jnp.asarray(rng.integers(0, REAL, size=(B, S)), jnp.int32)
    valid = jnp.arange(S)[None] < jnp.asarray(lengths)[:, None]
    return hidden, head, target, valid


def full(hidden, head, target, valid, softcap=None):
    """(logp, correct, entropy) from all logits at once, in float32."""
    logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32).T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logs = jax.nn.log_softmax(logits, axis=-1)
    logp = jnp.take_along_axis(logs, target[..., None], axis=-1)[..., 0]
    correct = (logits.argmax(-1) == target).astype(jnp.float32)
    entropy = -(jnp.exp(logs) * logs).sum(-1)
    return tuple(jnp.where(valid, x, 0.0) for x in (logp, correct, entropy))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_values_equal_the_full_computation(chunk: int, softcap: float | None):
    hidden, head, target, valid = inputs()
    # Make a good share of the targets the most likely token.
    target = jnp.where(target % 2 == 0, (hidden @ head.T)[..., :REAL].argmax(-1), target)
    found = token_scores(hidden, head, target, valid, softcap=softcap, chunk=chunk, entropy=True)
    expected = full(hidden, head, target, valid, softcap)
    assert 0 < float(expected[1].sum()) < float(valid.sum())
    for name, got, want in zip(("logp", "correct", "entropy"), found, expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradients_equal_the_full_computation(chunk: int, softcap: float | None):
    hidden, head, target, valid = inputs()
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(B, S)), jnp.float32)

    def chunked(hidden, head):
        scores = token_scores(hidden, head, target, valid, softcap=softcap, chunk=chunk)
        return jnp.sum(scores.logp * weight)

    def whole(hidden, head):
        return jnp.sum(full(hidden, head, target, valid, softcap)[0] * weight)

    found = jax.jit(jax.grad(chunked, argnums=(0, 1)))(hidden, head)
    expected = jax.grad(whole, argnums=(0, 1))(hidden, head)
    for name, got, want in zip(("hidden", "head"), found, expected, strict=True):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("chunk", [5, 10_000])
def test_a_tied_head_gets_both_gradients(chunk: int):
    _, table, target, valid = inputs()
    tokens = jnp.roll(target, 1, axis=1)

    def chunked(table):
        return token_scores(jnp.tanh(table[tokens]), table, target, valid, chunk=chunk).logp.sum()

    def whole(table):
        return full(jnp.tanh(table[tokens]), table, target, valid)[0].sum()

    found, expected = jax.grad(chunked)(table), jax.grad(whole)(table)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("chunk", [1, 24, 10_000])
def test_rows_without_a_scored_token_give_zeros(chunk: int):
    hidden, head, target, _ = inputs()
    none = jnp.zeros((B, S), bool)

    def total(hidden, head):
        return token_scores(hidden, head, target, none, chunk=chunk).logp.sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
    assert float(value) == 0.0
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("chunk", [5, 10_000])
def test_what_is_not_scored_changes_nothing(chunk: int):
    hidden, head, target, valid = inputs()
    other_hidden, _, other_target, _ = inputs(seed=9)
    changed = jnp.where(valid[..., None], hidden, 50.0 * other_hidden)
    targets = jnp.where(valid, target, other_target)

    def total(hidden, head, target):
        return token_scores(hidden, head, target, valid, chunk=chunk).logp.sum()

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    value, (dhidden, dhead) = gradient(hidden, head, target)
    other_value, (other_dhidden, other_dhead) = gradient(changed, head, targets)
    np.testing.assert_array_equal(value, other_value)
    np.testing.assert_array_equal(dhidden, other_dhidden)
    np.testing.assert_array_equal(dhead, other_dhead)
    assert not dhidden[~valid].any()


def test_the_padded_vocabulary_is_in_the_softmax_and_gets_gradient():
    # A checkpoint's table may be longer than its vocabulary; transformers normalises over all rows.
    hidden, head, target, valid = inputs()
    gradient = jax.grad(lambda h: token_scores(hidden, h, target, valid).logp.sum())(head)
    assert (jnp.abs(gradient[REAL:]).max(-1) > 0).all()
    cut = token_scores(hidden, head[:REAL], target, valid)
    assert float(jnp.abs(cut.logp - token_scores(hidden, head, target, valid).logp).max()) > 1e-3


def test_bfloat16_states_are_scored_in_float32():
    hidden, head, target, valid = inputs()
    rounded, rounded_head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    found = token_scores(rounded, head, target, valid, chunk=24)
    # The only rounding is that of the inputs: log-softmax and sums of bfloat16 would be 1e-2 off.
    expected = full(rounded, rounded_head, target, valid)[0]
    assert found.logp.dtype == jnp.float32
    np.testing.assert_allclose(found.logp, expected, rtol=1e-5, atol=2e-5)


def test_bfloat16_gradients_keep_their_dtypes_and_are_close():
    hidden, head, target, valid = inputs()
    rounded = hidden.astype(jnp.bfloat16)

    def total(hidden, head):
        return token_scores(hidden, head, target, valid, chunk=24).logp.sum()

    dhidden, dhead = jax.jit(jax.grad(total, argnums=(0, 1)))(rounded, head)
    assert (dhidden.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = jax.grad(lambda h, w: full(h, w, target, valid)[0].sum(), argnums=(0, 1))(hidden, head)
    for got, want in zip((dhidden, dhead), wanted, strict=True):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02 * scale)


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_huge_logits_stay_finite(scale: float):
    hidden, head, target, valid = inputs()

    def total(hidden, head):
        scores = token_scores(hidden, head, target, valid, chunk=24, entropy=True)
        return scores.logp.sum() + 0.0 * scores.entropy.sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(scale * hidden, head)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_a_hand_made_distribution():
    # Logits are (0, ln 2, ln 5): probabilities 1/8, 2/8, 5/8.
    head = jnp.log(jnp.asarray([[1.0], [2.0], [5.0]]))
    target = jnp.asarray([[2, 0, 1]], jnp.int32)
    valid = jnp.asarray([[True, True, False]])
    found = token_scores(jnp.ones((1, 3, 1)), head, target, valid, entropy=True)
    np.testing.assert_allclose(found.logp, [[np.log(5 / 8), np.log(1 / 8), 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(found.correct, [[1.0, 0.0, 0.0]])
    p = np.asarray([1, 2, 5]) / 8
    entropy = -(p * np.log(p)).sum()
    np.testing.assert_allclose(found.entropy, [[entropy, entropy, 0.0]], rtol=1e-6)


def test_no_array_of_all_logits_exists():
    # Forward and backward of 2048 tokens: the largest array is the head or one chunk of logits.
    tokens, vocabulary, chunk = 2048, 5000, 64
    hidden = jax.ShapeDtypeStruct((1, tokens, D), jnp.float32)
    head = jax.ShapeDtypeStruct((vocabulary, D), jnp.float32)
    target = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    valid = jax.ShapeDtypeStruct((1, tokens), jnp.bool_)

    def total(hidden, head, target, valid):
        return token_scores(hidden, head, target, valid, chunk=chunk).logp.sum()

    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, head, target, valid).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        pytest.skip("this backend does not report the memory of a program")
    assert memory.temp_size_in_bytes < tokens * vocabulary * 4 / 4


# ---- the vocabulary in parts, as over a mesh and on a TPU ----------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """Two parts of 128 rows, the last of which begins with 45 rows of the one before."""
    monkeypatch.setattr(logprobs, "PART", 128 * B * S * 4)
    with jax.set_mesh(meshes.make_mesh(devices=jax.devices()[:1])):
        cut = logprobs._cut_of(jnp.zeros((B, S, D)), jnp.zeros((V, D)), V)
        assert (cut.size, cut.parts) == (128, 2)
        yield


def by_parts(hidden, head, target, valid, softcap=None, low_rank=None, train_head=True) -> Any:
    return logprobs._by_parts(hidden, head, low_rank, target, valid, V, softcap, True, train_head)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_parts_of_the_vocabulary_give_the_full_values(parts, softcap):
    hidden, head, target, valid = inputs()
    target = jnp.where(target % 2 == 0, (hidden @ head.T)[..., :REAL].argmax(-1), target)
    found = jax.jit(partial(by_parts, softcap=softcap))(hidden, head, target, valid)
    for got, want in zip(found, full(hidden, head, target, valid, softcap), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_parts_of_the_vocabulary_give_the_full_gradients(parts, softcap):
    hidden, head, target, valid = inputs()
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=(B, S)), jnp.float32)
    low = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, S, 3), (3, V)))

    def in_parts(hidden, head, low):
        scores = by_parts(hidden, head, target, valid, softcap, low)
        return jnp.sum(scores.logp * weight)

    def whole(hidden, head, low):
        joined = jnp.concatenate([hidden, low[0]], -1)
        table = jnp.concatenate([head, low[1].T], -1)
        return jnp.sum(full(joined, table, target, valid, softcap)[0] * weight)

    found = jax.jit(jax.grad(in_parts, argnums=(0, 1, 2)))(hidden, head, low)
    expected = jax.grad(whole, argnums=(0, 1, 2))(hidden, head, low)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale)


def test_parts_of_a_frozen_head_have_no_gradient(parts):
    hidden, head, target, valid = inputs()

    def total(hidden, head, train_head):
        return by_parts(hidden, head, target, valid, train_head=train_head).logp.sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    (dhidden, dhead), (wanted, _) = gradient(hidden, head, False), gradient(hidden, head, True)
    assert not dhead.any()
    np.testing.assert_array_equal(dhidden, wanted)
