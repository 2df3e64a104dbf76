"""The decoder: logits of every architecture against transformers; packing, remat, cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_huggingface import FAMILIES, SIZES, make_folder

from saro_jax.models import decoder, huggingface
from saro_jax.models.architecture import from_hf
from saro_jax.models.attention import Tokens

LENGTHS = (9, 17, 30)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request, tmp_path_factory):
    """(folder, arch, params, three sequences of ids) of one architecture, random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    # Weights of unit variance would make softmax and layers so steep that float32 noise of either
    # side grows past any tolerance; at 0.3 every part still moves the logits.
    make_folder(folder, FAMILIES[request.param], scale=0.3)
    arch = huggingface.load_architecture(folder)
    params = huggingface.load_params(folder, arch, jnp.float32)
    rng = np.random.default_rng(1)
    ids = [rng.integers(3, arch.vocab_size, n).astype(np.int32) for n in LENGTHS]
    return folder, arch, params, ids


def packed(ids: list[np.ndarray], length: int) -> tuple[jax.Array, Tokens]:
    """All sequences side by side in one row, the rest padding."""
    tokens, segment, position = (np.zeros((1, length), np.int32) for _ in range(3))
    at = 0
    for i, sequence in enumerate(ids):
        n = len(sequence)
        tokens[0, at : at + n], segment[0, at : at + n] = sequence, i + 1
        position[0, at : at + n] = np.arange(n)
        at += n
    where = Tokens(jnp.asarray(segment), jnp.zeros_like(segment), jnp.asarray(position))
    return jnp.asarray(tokens), where


def padded(ids: list[np.ndarray], left: bool) -> tuple[jax.Array, Tokens]:
    """One sequence a row, padded on the left or on the right."""
    length = max(map(len, ids)) + 3
    tokens, segment, position = (np.zeros((len(ids), length), np.int32) for _ in range(3))
    for i, sequence in enumerate(ids):
        n = len(sequence)
        cut = slice(length - n, length) if left else slice(0, n)
        tokens[i, cut], segment[i, cut], position[i, cut] = sequence, 1, np.arange(n)
    return jnp.asarray(tokens), Tokens(
        jnp.asarray(segment), jnp.zeros_like(segment), jnp.asarray(position)
    )


def logits(arch, params, tokens, where) -> np.ndarray:
    hidden = decoder.forward(arch, params, tokens, where)
    return np.asarray(decoder.logits(arch, params, hidden))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "gemma2" else ())
        for name in sorted(FAMILIES)
    ],
    indirect=True,
)
def test_states_of_every_layer_equal_transformers(model):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder, arch, params, ids = model
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    at = np.cumsum([0, *LENGTHS[:-1]])[:, None] + [[0, 5, n - 1] for n in LENGTHS]
    tokens, where = packed(ids, 64)
    got = decoder.states(arch, params, tokens, where, jnp.asarray(at.reshape(1, -1)))
    assert got.shape == (arch.num_layers + 1, 1, 9, arch.hidden_size)
    for i, sequence in enumerate(ids):
        with torch.no_grad():
            out = reference(
                torch.tensor(sequence[None].astype(np.int64)), output_hidden_states=True
            )
        want = torch.stack(out.hidden_states)[:, 0, [0, 5, len(sequence) - 1]].numpy()
        np.testing.assert_allclose(got[:, 0, 3 * i : 3 * i + 3], want, rtol=0, atol=1e-4)


def test_logits_equal_transformers_packed_and_padded(model):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder, arch, params, ids = model
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        want = [reference(torch.tensor(x[None].astype(np.int64))).logits[0].numpy() for x in ids]
    row = logits(arch, params, *packed(ids, 64))[0]
    at = 0
    for sequence, theirs in zip(ids, want, strict=True):
        np.testing.assert_allclose(row[at : at + len(sequence)], theirs, rtol=0, atol=1e-4)
        at += len(sequence)
    for left in (False, True):
        tokens, where = padded(ids, left)
        ours = logits(arch, params, tokens, where)
        for i, theirs in enumerate(want):
            np.testing.assert_allclose(
                ours[i][np.asarray(where.segment)[i] > 0], theirs, rtol=0, atol=1e-4
            )


@pytest.mark.parametrize(
    "model", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)], indirect=True
)
def test_remat_changes_no_gradient(model):
    _, arch, params, ids = model
    tokens, where = packed(ids, 64)
    weight = jax.random.normal(jax.random.key(0), (1, 64, arch.hidden_size))

    def grads(remat: str) -> Any:
        def loss(params):
            hidden = decoder.forward(arch, params, tokens, where, remat=remat)
            return jnp.vdot(hidden, weight)

        return jax.jit(jax.grad(loss))(params)

    plain = grads("none")
    for remat in ("dots", "attention", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads(remat), plain
        )


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen3", "gemma2", "gemma3"], indirect=True)
def test_cached_equals_packed(model):
    """Prefill of right-padded rows, then token by token, gives the hidden states of the whole."""
    _, arch, params, ids = model
    tokens, where = padded(ids, left=False)
    want = decoder.forward(arch, params, tokens, where)
    cache = decoder.empty_cache(arch, len(ids), tokens.shape[1] + 4, jnp.float32)
    prefill = 8
    start = jnp.broadcast_to(jnp.arange(prefill, dtype=jnp.int32), (len(ids), prefill))
    step = jax.jit(lambda t, p, c: decoder.decode(arch, params, t, p, c))
    hidden, cache = step(tokens[:, :prefill], start, cache)
    got = [hidden]
    for at in range(prefill, max(LENGTHS)):
        position = jnp.full((len(ids), 1), at, jnp.int32)
        hidden, cache = step(tokens[:, at : at + 1], position, cache)
        got.append(hidden)
    got = np.concatenate(got, 1)
    for i, n in enumerate(LENGTHS):
        np.testing.assert_allclose(got[i, :n], np.asarray(want)[i, :n], atol=2e-5)


def test_no_token_sees_a_later_one_or_another_example():
    """Causality by gradients: the states of example 2 depend on its own earlier tokens alone."""
    arch = from_hf(SIZES | FAMILIES["llama"])
    params = decoder.init_params(arch, jax.random.key(0))
    ids = [np.arange(3, 12, dtype=np.int32), np.arange(20, 32, dtype=np.int32)]
    tokens, where = packed(ids, 32)
    table = params["model"]["embed_tokens"]["weight"]

    def state(table):
        changed = params | {"model": params["model"] | {"embed_tokens": {"weight": table}}}
        return decoder.forward(arch, changed, tokens, where)[0, 9 + 5].sum()

    touched = np.flatnonzero(np.abs(np.asarray(jax.grad(state)(table))).sum(1))
    assert set(touched) == set(range(20, 26))


def test_dynamic_rope_refuses_longer_sequences():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    arch = from_hf(SIZES | {"model_type": "llama", "rope_parameters": rope})
    decoder.check_length(arch, 128)
    with pytest.raises(ValueError, match=r"dynamic.*128.*129"):
        decoder.check_length(arch, 129)
