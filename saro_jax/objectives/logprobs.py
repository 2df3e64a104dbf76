"""Log-probs of given tokens without the logits: [tokens, vocabulary] never exists.

On one device the tokens are cut into chunks. Over the devices of a mesh, and on a TPU, it is the
vocabulary: the devices hold a shard of it each and pass it on in a ring, and with it the sum of its
gradient, while they compute with it for all their tokens. So no device ever holds the whole output
matrix or its gradient, nothing is gathered or reduced twice, and sending overlaps with computing.

Legend: B rows, S scored positions of a row (padded), C chunk of them, M = B * S of one device,
D hidden, V vocabulary, v part of it.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from saro_jax.models.attention import platform
from saro_jax.models.dot import inner, row_major
from saro_jax.parallel.sharding import SHARDS, TOKENS, WIDE, axis_parts, row_axes

F32 = jnp.float32
CHUNK = 256  # tokens of all rows together whose logits exist at one time
PART = 2**28  # bytes of the float32 logits of one part of the vocabulary, on a mesh
LANES = 128  # parts are multiples of it, as TPUs lay out memory


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
    peak memory is one chunk of logits, forward and backward. Where a mesh is set, rows, vocabulary
    and hidden axis may be cut over it as `parallel.sharding` cuts them; `chunk` has no effect then.
    """
    B, S, _ = hidden_BSD.shape
    mesh = jax.sharding.get_abstract_mesh()
    if row_axes(B, TOKENS) and (mesh.size > 1 or platform() == "tpu"):
        with jax.named_scope("logits"):
            low = None if low_rank is None else (low_rank[0], low_rank[1].astype(hidden_BSD.dtype))
            padded = _whole_shards(head_VD, low)
            inputs = (hidden_BSD, *padded, target_BS, valid_BS)
            options = (head_VD.shape[0], softcap, entropy, train_head)
            return TokenScores(*cast(TokenScores, _by_parts(*inputs, *options)))
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
            parts[2] = lse_i - inner(e, x) / total
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


# ---- over a mesh: the vocabulary in parts --------------------------------------------------------


class _Cut(NamedTuple):
    """How one call is laid out on the mesh."""

    sizes: tuple[int, int]  # devices of the ring (SHARDS), rows of the output matrix on each
    size: int  # of a part of them: what is computed at a time
    parts: int
    ring: int  # rows of the ring without the padding at its end
    real: int  # of the whole matrix without any


def _whole_shards(head_VD: jax.Array, low_rank):
    """The output matrix and its adapter, padded with rows so that the shards are equal.

    At the end of each ring's rows: padding at the end of all of them would move rows from ring to
    ring, for which XLA gathers the matrix.
    """
    V, rings = head_VD.shape[0], axis_parts("tensor")
    if V % axis_parts(WIDE) == 0:
        return head_VD, low_rank

    def padded(x_VN, columns):
        x_VN = jnp.pad(x_VN, ((0, -V % rings), (0, 0)))
        x_RVN = x_VN.reshape(rings, -1, x_VN.shape[1])
        if V % rings == 0:  # as the table lies, so that the padding is each device's own
            x_RVN = lax.with_sharding_constraint(x_RVN, P("tensor", None, columns))
        x_RVN = jnp.pad(x_RVN, ((0, 0), (0, -x_RVN.shape[1] % axis_parts(SHARDS)), (0, 0)))
        return x_RVN.reshape(-1, x_VN.shape[1])

    if low_rank is not None:
        low_rank = low_rank[0], padded(low_rank[1].T, None).T
    even = head_VD.shape[1] % axis_parts(SHARDS) == 0
    return padded(head_VD, SHARDS if even else None), low_rank


def _cut_of(hidden_BSD: jax.Array, head_VD: jax.Array, real: int) -> _Cut:
    (B, S, _), V = hidden_BSD.shape, head_VD.shape[0]
    local = V // axis_parts(WIDE)
    parts = -(-local * (B * S // axis_parts(TOKENS)) * 4 // PART)
    size = min(local, -(-local // (parts * LANES)) * LANES)
    ring = -(-real // axis_parts("tensor"))
    return _Cut((axis_parts(SHARDS), local), size, -(-local // size), ring, real)


def _specs(low_rank) -> tuple[P, P, tuple[P, P] | None, P]:
    """Of hidden, output matrix, adapter and what has one entry a token."""
    low = None if low_rank is None else (P(TOKENS), P(None, "tensor"))
    return P(TOKENS), P(WIDE), low, P(TOKENS)


def _pass_on(x: jax.Array, cut: _Cut) -> jax.Array:
    """x of the next device of the ring."""
    n = cut.sizes[0]
    return x if n == 1 else lax.ppermute(x, SHARDS, [(i, (i - 1) % n) for i in range(n)])


def _first_row(k, cut: _Cut) -> jax.Array:
    """Where, in the rows of this device's ring, the shard begins that is here in step k."""
    n, local = cut.sizes
    return (lax.axis_index(SHARDS) + k) % n * local if n > 1 else jnp.zeros((), jnp.int32)


def _part_logits(i, held_vD, base, hidden_MD, low, cut: _Cut, softcap):
    """(rows of the part in `held`, rows in the ring, logits [M, v], new [v]).

    new: in no part before and no padding.
    """
    wanted = i * cut.size
    start = jnp.minimum(wanted, held_vD.shape[0] - cut.size)  # the last part begins earlier
    part_vD = lax.dynamic_slice_in_dim(held_vD, start, cut.size, 0)
    x_Mv = jnp.einsum("MD,vD->Mv", hidden_MD, part_vD, preferred_element_type=F32)
    if low is not None:
        u_Mr, b_rV = low
        b_rv = lax.dynamic_slice_in_dim(b_rV, base + start, cut.size, 1)
        x_Mv = x_Mv + jnp.einsum("Mr,rv->Mv", u_Mr, b_rv, preferred_element_type=F32)
    if softcap is not None:
        x_Mv = softcap * jnp.tanh(x_Mv / softcap)
    row_v = start + jnp.arange(cut.size, dtype=jnp.int32)
    real = jnp.minimum(cut.ring, cut.real - _first_of_ring(cut))
    new_v = (row_v >= wanted) & (base + row_v < real)
    return start, part_vD, x_Mv, new_v


def _first_of_ring(cut: _Cut) -> jax.Array:
    """The row of the whole matrix with which the shards of this device's ring begin."""
    return lax.axis_index("tensor") * cut.ring


def _flat(low_rank):
    if low_rank is None:
        return None
    return low_rank[0].reshape(-1, low_rank[0].shape[-1]), low_rank[1]


def _parts_forward(hidden_BSD, head_VD, low_rank, target_BS, valid_BS, *, cut, softcap, entropy):
    """Scores and the log of each softmax sum, [B, S] each, on one device."""
    hidden_MD, low = hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), _flat(low_rank)
    target_M = target_BS.reshape(-1) - _first_of_ring(cut)

    def one_step(k, carry):
        held_vD, sums = carry
        base = _first_row(k, cut)

        def one_part(i, sums):
            top, total, hit, spread = sums
            start, _, x_Mv, new_v = _part_logits(i, held_vD, base, hidden_MD, low, cut, softcap)
            x_Mv = jnp.where(new_v, x_Mv, -jnp.inf)
            now = jnp.maximum(top, x_Mv.max(-1))
            e_Mv = jnp.exp(x_Mv - now[:, None])
            shrink = jnp.exp(top - now)
            total = total * shrink + e_Mv.sum(-1)
            at = target_M[:, None] == base + start + jnp.arange(cut.size, dtype=jnp.int32)
            hit = hit + jnp.where(at & new_v, x_Mv, 0.0).sum(-1)
            if entropy:
                spread = spread * shrink + jnp.where(new_v, e_Mv * x_Mv, 0.0).sum(-1)
            return now, total, hit, spread

        coming = _pass_on(held_vD, cut)
        return coming, lax.fori_loop(0, cut.parts, one_part, sums)

    zeros = jnp.zeros(hidden_MD.shape[0], F32)
    start = (jnp.full_like(zeros, jnp.finfo(F32).min), zeros, zeros, zeros)
    held = head_VD.astype(hidden_MD.dtype)
    _, (top, total, hit, spread) = lax.fori_loop(0, cut.sizes[0], one_step, (held, start))
    highest = lax.pmax(top, "tensor")
    shrink = jnp.exp(top - highest)
    total, hit, spread = lax.psum((total * shrink, hit, spread * shrink), "tensor")
    top = highest
    lse = top + jnp.log(total)
    scores = [hit - lse, (hit >= top).astype(F32), lse - spread / total if entropy else zeros]
    valid_M = valid_BS.reshape(-1)
    out = [jnp.where(valid_M, score, 0.0) for score in scores] + [lse]
    return tuple(x.reshape(target_BS.shape) for x in out)


def _parts_backward(
    hidden_BSD, head_VD, low_rank, target_BS, lse_BS, dlogp_BS, *, cut, softcap, train_head
):
    """Gradients of hidden, output matrix (float32; None where frozen) and adapter."""
    hidden_MD, low = hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), _flat(low_rank)
    target_M, lse_M, dlogp_M = (
        target_BS.reshape(-1) - _first_of_ring(cut),
        lse_BS.reshape(-1, 1),
        dlogp_BS.reshape(-1, 1),
    )

    def one_step(k, carry):
        held_vD, dhead_vD, dhidden_MD, dlow = carry
        base = _first_row(k, cut)

        def one_part(i, carry):
            dhead_vD, dhidden_MD, dlow = carry
            start, part_vD, x_Mv, new_v = _part_logits(
                i, held_vD, base, hidden_MD, low, cut, softcap
            )
            at = target_M[:, None] == base + start + jnp.arange(cut.size, dtype=jnp.int32)
            dx = jnp.where(new_v, (at - jnp.exp(x_Mv - lse_M)) * dlogp_M, 0.0)
            if softcap is not None:
                dx = dx * (1.0 - jnp.square(x_Mv / softcap))
            dx = dx.astype(hidden_MD.dtype)
            dhidden_MD += jnp.einsum("Mv,vD->MD", dx, part_vD, preferred_element_type=F32)
            if train_head:
                dpart = jnp.einsum("Mv,MD->vD", dx, hidden_MD, preferred_element_type=F32)
                dhead_vD = _add_at(dhead_vD, dpart, start, 0)
            if low is not None:
                u_Mr, b_rV = low
                b_rv = lax.dynamic_slice_in_dim(b_rV, base + start, cut.size, 1)
                du = dlow[0] + jnp.einsum("Mv,rv->Mr", dx, b_rv, preferred_element_type=F32)
                db = jnp.einsum("Mr,Mv->rv", u_Mr, dx, preferred_element_type=F32)
                dlow = du, _add_at(dlow[1], db, base + start, 1)
            return dhead_vD, dhidden_MD, dlow

        # The sum of a shard's gradient travels with it: what comes is what others made of it.
        coming = _pass_on(held_vD, cut)
        summed = None if dhead_vD is None else _pass_on(dhead_vD, cut)
        return coming, *lax.fori_loop(0, cut.parts, one_part, (summed, dhidden_MD, dlow))

    start = (
        head_VD.astype(hidden_MD.dtype),
        jnp.zeros(head_VD.shape, F32) if train_head else None,
        jnp.zeros(hidden_MD.shape, F32),
        None if low is None else (jnp.zeros(low[0].shape, F32), jnp.zeros(low[1].shape, F32)),
    )
    _, dhead_VD, dhidden_MD, dlow = lax.fori_loop(0, cut.sizes[0], one_step, start)
    dhidden_MD = lax.psum(dhidden_MD, "tensor")
    if dhead_VD is not None:
        rest = tuple(axis for axis in TOKENS if axis not in SHARDS)
        dhead_VD = lax.psum(_pass_on(dhead_VD, cut), rest).astype(head_VD.dtype)
    if dlow is not None:
        du, db = dlow
        du = lax.psum(du, "tensor").astype(hidden_BSD.dtype)
        assert low_rank is not None
        db = lax.psum(db, TOKENS).astype(low_rank[1].dtype)
        dlow = du.reshape(low_rank[0].shape), db
    return dhidden_MD.astype(hidden_BSD.dtype).reshape(hidden_BSD.shape), dhead_VD, dlow


def _add_at(x: jax.Array, part: jax.Array, start, axis: int) -> jax.Array:
    old = lax.dynamic_slice_in_dim(x, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(x, old + part, start, axis)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _by_parts(
    hidden_BSD, head_VD, low_rank, target_BS, valid_BS, real, softcap, entropy, train_head
):
    return _by_parts_fwd(
        hidden_BSD, head_VD, low_rank, target_BS, valid_BS, real, softcap, entropy, train_head
    )[0]


def _by_parts_fwd(
    hidden_BSD, head_VD, low_rank, target_BS, valid_BS, real, softcap, entropy, train_head
):
    cut = _cut_of(hidden_BSD, head_VD, real)
    hidden, matrix, low, token = _specs(low_rank)
    run = jax.shard_map(
        partial(_parts_forward, cut=cut, softcap=softcap, entropy=entropy),
        in_specs=(hidden, matrix, low, token, token),
        out_specs=(token,) * 4,
        check_vma=False,
    )
    *scores, lse_BS = run(hidden_BSD, head_VD, low_rank, target_BS, valid_BS)
    return TokenScores(*scores), (hidden_BSD, head_VD, low_rank, target_BS, valid_BS, lse_BS)


def _by_parts_bwd(real, softcap, entropy, train_head, residuals, dscores):
    hidden_BSD, head_VD, low_rank, target_BS, valid_BS, lse_BS = residuals
    dlogp_BS = jnp.where(valid_BS, dscores.logp, 0.0)
    cut = _cut_of(hidden_BSD, head_VD, real)
    hidden, matrix, low, token = _specs(low_rank)
    run = jax.shard_map(
        partial(_parts_backward, cut=cut, softcap=softcap, train_head=train_head),
        in_specs=(hidden, matrix, low, token, token, token),
        out_specs=(hidden, matrix if train_head else None, low),
        check_vma=False,
    )
    dhidden, dhead, dlow = run(hidden_BSD, head_VD, low_rank, target_BS, lse_BS, dlogp_BS)
    return dhidden, dhead, dlow, None, None


_by_parts.defvjp(_by_parts_fwd, _by_parts_bwd)
