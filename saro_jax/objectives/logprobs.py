"""Log-probs of given tokens without the logits: [tokens, vocabulary] never exists.

Legend: B rows, S scored positions of a row (padded), C chunk of them, D hidden, V vocabulary.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from saro_jax.models.dot import row_major

F32 = jnp.float32
CHUNK = 256  # tokens of all rows together whose logits exist at one time


class TokenScores(NamedTuple):
    """Per scored token, float32 [B, S], zero where not valid."""

    logp: jax.Array  # natural log
    correct: jax.Array  # 1.0 where the token is the most likely one
    entropy: jax.Array  # of the whole distribution, nats


def token_scores(
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    target_BS: jax.Array,
    valid_BS: jax.Array,
    *,
    softcap: float | None = None,
    chunk: int = CHUNK,
    entropy: bool = False,
) -> TokenScores:
    """log softmax(hidden @ head.T)[target] for the valid positions, in float32.

    hidden_BSD: the states that predict target_BS (the position *before* each target), any float
    dtype; head_VD is cast to it. valid_BS: True = counts; valid positions come first in each row,
    so that chunks past the longest row are skipped at run time. softcap: Gemma's cap on the
    logits. entropy: compute it, else zeros. Gradients flow through `logp` only; peak memory is one
    chunk of logits, forward and backward.
    """
    B, S, _ = hidden_BSD.shape
    size = min(S, max(1, chunk // B))
    pad = -S % size
    if pad:
        hidden_BSD = jnp.pad(hidden_BSD, ((0, 0), (0, pad), (0, 0)))
        target_BS = jnp.pad(target_BS, ((0, 0), (0, pad)))
        valid_BS = jnp.pad(valid_BS, ((0, 0), (0, pad)))
    head = head_VD.astype(hidden_BSD.dtype)
    with jax.named_scope("logits"):
        scores = cast(
            TokenScores,
            _scores(hidden_BSD, head, target_BS, valid_BS, softcap, size, entropy),
        )
    return TokenScores(scores.logp[:, :S], scores.correct[:, :S], scores.entropy[:, :S])


def _chunks(valid_BS: jax.Array, size: int) -> jax.Array:
    """Number of chunks that hold a valid position of any row."""
    index = jnp.arange(1, valid_BS.shape[1] + 1, dtype=jnp.int32)
    return (jnp.max(jnp.where(valid_BS, index, 0)) + size - 1) // size


def _logits(hidden_BCD, head_VD, softcap):
    x = jnp.einsum("BCD,VD->BCV", hidden_BCD, head_VD, preferred_element_type=F32)
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def _cut(x: jax.Array, i: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=1)


def _paste(x: jax.Array, part: jax.Array, i: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, i * size, axis=1)


def _forward(hidden_BSD, head_VD, target_BS, valid_BS, softcap, size, entropy):
    zeros = jnp.zeros(target_BS.shape, F32)

    def one_chunk(i, carry):
        logp, correct, spread, lse = carry
        x = _logits(_cut(hidden_BSD, i, size), head_VD, softcap)
        top = x.max(-1)
        e = jnp.exp(x - top[..., None])
        total = e.sum(-1)
        lse_i = top + jnp.log(total)
        hit = jnp.take_along_axis(x, _cut(target_BS, i, size)[..., None], axis=-1)[..., 0]
        valid = _cut(valid_BS, i, size)
        parts = [hit - lse_i, (hit >= top).astype(F32), jnp.zeros_like(hit)]
        if entropy:
            parts[2] = lse_i - (e * x).sum(-1) / total
        parts = [jnp.where(valid, part, 0.0) for part in parts] + [lse_i]
        return tuple(
            _paste(whole, part, i, size)
            for whole, part in zip((logp, correct, spread, lse), parts, strict=True)
        )

    *scores, lse = lax.fori_loop(0, _chunks(valid_BS, size), one_chunk, (zeros,) * 4)
    return TokenScores(*scores), lse


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _scores(hidden_BSD, head_VD, target_BS, valid_BS, softcap, size, entropy):
    return _forward(hidden_BSD, head_VD, target_BS, valid_BS, softcap, size, entropy)[0]


def _scores_fwd(hidden_BSD, head_VD, target_BS, valid_BS, softcap, size, entropy):
    scores, lse = _forward(hidden_BSD, head_VD, target_BS, valid_BS, softcap, size, entropy)
    return scores, (hidden_BSD, head_VD, target_BS, valid_BS, lse)


def _scores_bwd(softcap, size, entropy, residuals, dscores):
    hidden_BSD, head_VD, target_BS, valid_BS, lse_BS = residuals
    dlogp_BS = jnp.where(valid_BS, dscores.logp, 0.0)
    vocabulary = jnp.arange(head_VD.shape[0], dtype=jnp.int32)

    def one_chunk(i, carry):
        dhidden_BSD, dhead_VD = carry
        hidden = _cut(hidden_BSD, i, size)
        x = _logits(hidden, head_VD, softcap)
        p = jnp.exp(x - _cut(lse_BS, i, size)[..., None])
        target = vocabulary == _cut(target_BS, i, size)[..., None]
        dx = (target - p) * _cut(dlogp_BS, i, size)[..., None]
        if softcap is not None:
            dx = dx * (1.0 - jnp.square(x / softcap))
        dx = dx.astype(hidden.dtype)
        dhidden = jnp.einsum("BCV,VD->BCD", dx, head_VD, preferred_element_type=F32)
        V, D = head_VD.shape
        dx_VM, hidden_MD = row_major(dx.reshape(-1, V).T), hidden.reshape(-1, D)
        dhead = jnp.einsum("VM,MD->VD", dx_VM, hidden_MD, preferred_element_type=F32)
        return _paste(dhidden_BSD, dhidden.astype(hidden.dtype), i, size), dhead_VD + dhead

    start = (jnp.zeros_like(hidden_BSD), jnp.zeros(head_VD.shape, F32))
    dhidden, dhead = lax.fori_loop(0, _chunks(valid_BS, size), one_chunk, start)
    return dhidden, dhead.astype(head_VD.dtype), None, None


_scores.defvjp(_scores_fwd, _scores_bwd)
