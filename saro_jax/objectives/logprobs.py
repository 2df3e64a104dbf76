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
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    train_head: bool = True,
) -> TokenScores:
    """log softmax(hidden @ head.T)[target] for the valid positions, in float32.

    hidden_BSD: the states that predict target_BS (the position *before* each target), any float
    dtype; head_VD is cast to it. valid_BS: True = counts; valid positions come first in each row,
    so that chunks past the longest row are skipped at run time. softcap: Gemma's cap on the
    logits. entropy: compute it, else zeros. low_rank: (u_BSr, b_rV), an adapter of the head that
    adds u @ b to the logits. train_head: False = the head is frozen and its gradient zeros, which
    are not computed: it is a third of the backward products. Gradients flow through `logp` only;
    peak memory is one chunk of logits, forward and backward.
    """
    B, S, _ = hidden_BSD.shape
    size = min(S, max(1, chunk // B))
    pad = -S % size
    if pad:
        hidden_BSD = jnp.pad(hidden_BSD, ((0, 0), (0, pad), (0, 0)))
        target_BS = jnp.pad(target_BS, ((0, 0), (0, pad)))
        valid_BS = jnp.pad(valid_BS, ((0, 0), (0, pad)))
        if low_rank is not None:
            low_rank = jnp.pad(low_rank[0], ((0, 0), (0, pad), (0, 0))), low_rank[1]
    if low_rank is not None:
        low_rank = low_rank[0], low_rank[1].astype(hidden_BSD.dtype)
    head = head_VD.astype(hidden_BSD.dtype)
    with jax.named_scope("logits"):
        scores = cast(
            TokenScores,
            _scores(
                hidden_BSD, head, low_rank, target_BS, valid_BS, softcap, size, entropy, train_head
            ),
        )
    return TokenScores(scores.logp[:, :S], scores.correct[:, :S], scores.entropy[:, :S])


def _chunks(valid_BS: jax.Array, size: int) -> jax.Array:
    """Number of chunks that hold a valid position of any row."""
    index = jnp.arange(1, valid_BS.shape[1] + 1, dtype=jnp.int32)
    return (jnp.max(jnp.where(valid_BS, index, 0)) + size - 1) // size


def _logits(hidden_BCD, head_VD, low_rank, softcap):
    B, C, D = hidden_BCD.shape  # two axes a product: see models/dot.py
    x_MV = jnp.einsum("MD,VD->MV", hidden_BCD.reshape(-1, D), head_VD, preferred_element_type=F32)
    x = x_MV.reshape(B, C, -1)
    if low_rank is not None:
        x = x + jnp.einsum("BCr,rV->BCV", *low_rank, preferred_element_type=F32)
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def _dot_products(a_BCV: jax.Array, b_BCV: jax.Array) -> jax.Array:
    """Sums over V of a * b, [B, C], without a * b in memory; float32 on every device."""

    def product(precision):
        return lambda a, b: jnp.einsum("BCV,BCV->BC", a, b, precision=precision)

    # A CPU computes in float32 anyway, and much faster where no precision is named.
    exact = product(lax.Precision.HIGHEST)
    return lax.platform_dependent(a_BCV, b_BCV, cpu=product(None), default=exact)


def _cut(x: jax.Array, i: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=1)


def _cut_low(low_rank, i: jax.Array, size: int):
    return None if low_rank is None else (_cut(low_rank[0], i, size), low_rank[1])


def _paste(x: jax.Array, part: jax.Array, i: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, i * size, axis=1)


def _forward(hidden_BSD, head_VD, low_rank, target_BS, valid_BS, softcap, size, entropy):
    zeros = jnp.zeros(target_BS.shape, F32)

    def one_chunk(i, carry):
        logp, correct, spread, lse = carry
        x = _logits(_cut(hidden_BSD, i, size), head_VD, _cut_low(low_rank, i, size), softcap)
        top = x.max(-1)
        e = jnp.exp(x - top[..., None])
        total = e.sum(-1)
        lse_i = top + jnp.log(total)
        hit = jnp.take_along_axis(x, _cut(target_BS, i, size)[..., None], axis=-1)[..., 0]
        valid = _cut(valid_BS, i, size)
        parts = [hit - lse_i, (hit >= top).astype(F32), jnp.zeros_like(hit)]
        if entropy:
            parts[2] = lse_i - _dot_products(e, x) / total
        parts = [jnp.where(valid, part, 0.0) for part in parts] + [lse_i]
        return tuple(
            _paste(whole, part, i, size)
            for whole, part in zip((logp, correct, spread, lse), parts, strict=True)
        )

    *scores, lse = lax.fori_loop(0, _chunks(valid_BS, size), one_chunk, (zeros,) * 4)
    return TokenScores(*scores), lse


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _scores(hidden_BSD, head_VD, low_rank, target_BS, valid_BS, softcap, size, entropy, train_head):
    return _forward(hidden_BSD, head_VD, low_rank, target_BS, valid_BS, softcap, size, entropy)[0]


def _scores_fwd(
    hidden_BSD, head_VD, low_rank, target_BS, valid_BS, softcap, size, entropy, train_head
):
    inputs = (hidden_BSD, head_VD, low_rank, target_BS, valid_BS)
    scores, lse = _forward(*inputs, softcap, size, entropy)
    return scores, (*inputs, lse)


def _scores_bwd(softcap, size, entropy, train_head, residuals, dscores):
    hidden_BSD, head_VD, low_rank, target_BS, valid_BS, lse_BS = residuals
    dlogp_BS = jnp.where(valid_BS, dscores.logp, 0.0)
    vocabulary = jnp.arange(head_VD.shape[0], dtype=jnp.int32)

    def one_chunk(i, carry):
        dhidden_BSD, dhead_VD, dlow = carry
        hidden, low = _cut(hidden_BSD, i, size), _cut_low(low_rank, i, size)
        x = _logits(hidden, head_VD, low, softcap)
        p = jnp.exp(x - _cut(lse_BS, i, size)[..., None])
        target = vocabulary == _cut(target_BS, i, size)[..., None]
        dx = (target - p) * _cut(dlogp_BS, i, size)[..., None]
        if softcap is not None:
            dx = dx * (1.0 - jnp.square(x / softcap))
        dx = dx.astype(hidden.dtype)
        V, D = head_VD.shape
        dx_MV = dx.reshape(-1, V)
        dhidden = jnp.einsum("MV,VD->MD", dx_MV, head_VD, preferred_element_type=F32)
        dhidden = dhidden.reshape(hidden.shape)
        if train_head:
            dx_VM, hidden_MD = row_major(dx_MV.T), hidden.reshape(-1, D)
            dhead = jnp.einsum("VM,MD->VD", dx_VM, hidden_MD, preferred_element_type=F32)
            dhead_VD = dhead_VD + dhead
        if low is not None:
            u, b_rV = low
            du = jnp.einsum("BCV,rV->BCr", dx, b_rV, preferred_element_type=F32)
            u_rM = row_major(u.reshape(-1, u.shape[-1]).T)
            db = jnp.einsum("rM,MV->rV", u_rM, dx_MV, preferred_element_type=F32)
            dlow = _paste(dlow[0], du.astype(u.dtype), i, size), dlow[1] + db
        return _paste(dhidden_BSD, dhidden.astype(hidden.dtype), i, size), dhead_VD, dlow

    start = (
        jnp.zeros_like(hidden_BSD),
        jnp.zeros(head_VD.shape, F32) if train_head else None,
        None
        if low_rank is None
        else (jnp.zeros_like(low_rank[0]), jnp.zeros_like(low_rank[1], F32)),
    )
    dhidden, dhead, dlow = lax.fori_loop(0, _chunks(valid_BS, size), one_chunk, start)
    # None stands for zeros: what is frozen has no gradient.
    dhead = None if dhead is None else dhead.astype(head_VD.dtype)
    if low_rank is not None:
        dlow = dlow[0], dlow[1].astype(low_rank[1].dtype)
    return dhidden, dhead, dlow, None, None


_scores.defvjp(_scores_fwd, _scores_bwd)
