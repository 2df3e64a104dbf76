"""Attention over packed rows: exact, in blocks, memory linear in the row length.

Legend: B rows, T tokens of a row, N query heads, K key/value heads, G = N / K, H head width,
q/k suffixes: a block of queries / keys.

Which key a query sees is decided by `Tokens` alone: keys of its own segment that stand at or
before it in the row, in the shared prefix (branch 0) or in its own branch, and inside the sliding
window. So a row can hold several examples, and an example can hold one prefix with several
branches, without any of them seeing another.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from saro_jax.models.dot import inner
from saro_jax.models.remat import ATTENTION, store
from saro_jax.parallel.sharding import HEADS, ROWS, axis_parts, constrain_heads

F32 = jnp.float32
NEGATIVE = -1e30  # a finite "minus infinity": (NEGATIVE - NEGATIVE) stays a number
SMALL, LARGE = 64, 256  # of a block: less is masked; up to twice as fast a score on a CPU
WASTE = 1.8  # scores of large blocks for one of small blocks, at which the two are as fast
LONGEST = 2**25  # bytes of the keys' and values' gradients of one row and head that `flash` holds

Kernel = Literal["auto", "xla", "flash", "interpret"]


class Tokens(NamedTuple):
    """Where each token of packed rows belongs; all int32 [B, T].

    segment: 0 = padding, 1.. = example within the row, contiguous. branch: 0 = shared prefix,
    1.. = continuation. position: distance from the start of the example along its own branch.
    """

    segment: jax.Array
    branch: jax.Array
    position: jax.Array


def segment_starts(segment_BT: jax.Array) -> jax.Array:
    """Index in the row at which the segment of each token starts, [B, T]."""
    index_BT = jnp.broadcast_to(jnp.arange(segment_BT.shape[1], dtype=jnp.int32), segment_BT.shape)
    previous = jnp.pad(segment_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return lax.cummax(jnp.where(segment_BT != previous, index_BT, 0), axis=1)


def _first_keys(tokens: Tokens, window: jax.Array, block: int) -> jax.Array:
    """First key that any query of a block can see, over all rows of the batch, [T / block]."""
    start_BT = segment_starts(tokens.segment)
    # The key at position p stands at or after start + p, in the prefix and in every branch.
    first_BT = start_BT + jnp.maximum(0, tokens.position - window + 1)
    index_BT = jnp.broadcast_to(jnp.arange(start_BT.shape[1], dtype=jnp.int32), start_BT.shape)
    first_BT = jnp.where(tokens.segment > 0, first_BT, index_BT)
    return first_BT.reshape(first_BT.shape[0], -1, block).min(axis=(0, 2))


def _plan(tokens: Tokens, window: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Which key blocks each query block has to look at, over all rows of the batch.

    Returns (order [T / block, T / block], count [T / block]): the blocks of query block i are
    order[i, :count[i]]. Left out are later blocks, those before the first visible key, and those
    that lie in another branch of the same example.
    """
    B, T = tokens.segment.shape
    blocks = T // block
    segment, branch = (x.reshape(B, blocks, block) for x in (tokens.segment, tokens.branch))
    uniform = (segment.min(-1) == segment.max(-1)) & (branch.min(-1) == branch.max(-1))
    segment_q, branch_q = segment[:, :, :1], branch[:, :, :1]
    segment_k, branch_k = segment[:, None, :, 0], branch[:, None, :, 0]
    sibling = uniform[:, :, None] & uniform[:, None] & (segment_q == segment_k)
    sibling = (sibling & (branch_k > 0) & (branch_q != branch_k)).all(0)
    i, j = jnp.arange(blocks)[:, None], jnp.arange(blocks)[None]
    first = (_first_keys(tokens, window, block) // block)[:, None]
    visible = (first <= j) & (j <= i) & ~sibling
    order = jnp.argsort(~visible, axis=1, stable=True).astype(jnp.int32)
    return order, visible.sum(1, dtype=jnp.int32)


def _slice(x: jax.Array, i: jax.Array, block: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, i * block, block, axis)


class _Block(NamedTuple):
    """`Tokens` of one block and where each stands in the row, [B, block] with axes between."""

    segment: jax.Array
    branch: jax.Array
    position: jax.Array
    index: jax.Array


def _block_of(
    tokens: Tokens, i: jax.Array, block: int, axes: tuple[int, ...], copies: int = 1
) -> _Block:
    """Block i of the tokens, `copies` times one after the other, with further axes at `axes`."""
    index = jnp.broadcast_to(i * block + jnp.arange(block, dtype=jnp.int32), (1, block))
    parts = (*(_slice(t, i, block, 1) for t in tokens), index)
    return _Block(*(jnp.expand_dims(jnp.tile(t, (1, copies)), axes) for t in parts))


def _visible(q: _Block, k: _Block, window: jax.Array) -> jax.Array:
    """Which queries see which keys, bool, in the shape that the two broadcast to."""
    same = (q.segment == k.segment) & (k.segment > 0)
    branch = (k.branch == 0) | (k.branch == q.branch)
    return (q.index >= k.index) & same & branch & (q.position - k.position < window)


def _scores(q_BKqH, k_BKkH, scale: float, softcap: float | None) -> jax.Array:
    s = jnp.einsum("BKqH,BKkH->BKqk", q_BKqH, k_BKkH, preferred_element_type=F32) * scale
    return s if softcap is None else softcap * jnp.tanh(s / softcap)


def _masked_scores(q_BKqH, k_BKkH, scale, softcap, visible) -> jax.Array:
    """Scores, NEGATIVE where not `visible`, which broadcasts to [B, K, q, k]."""
    return jnp.where(visible, _scores(q_BKqH, k_BKkH, scale, softcap), NEGATIVE)


def over_mesh(run: Callable[..., Any], inputs: tuple[Any, ...], results: Any) -> Callable[..., Any]:
    """`run` of each device's rows and heads, where a mesh is set.

    Left to the compiler, a kernel is not cut at all, and the loops of this file run over the blocks
    that any row of the batch needs.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run
    return jax.shard_map(run, in_specs=inputs, out_specs=results, check_vma=False)


def partitions(q_BTNH, k_BTKH) -> tuple[Any, Any]:
    """The axes of the mesh that cut rows and heads; None where a number does not divide.

    Every device of axes that do not cut computes the whole.
    """
    rows = ROWS if q_BTNH.shape[0] % axis_parts(ROWS) == 0 else None
    heads = HEADS if k_BTKH.shape[2] % axis_parts(HEADS) == 0 else None
    return rows, heads


def _whole_rows(q_BTNH, k_BTKH, v_BTKH):
    """q, k and v with all tokens of some heads on each device of the mesh.

    Where there are fewer key heads than devices (or they do not divide), each is repeated for the
    devices whose queries it serves: query head n of N reads key head n * K // N before and after.
    """
    K = k_BTKH.shape[2]
    copies = math.lcm(K, axis_parts(HEADS)) // K
    kv = (k_BTKH, v_BTKH)
    kv = (_repeated_heads(x, copies) for x in kv) if copies > 1 else map(constrain_heads, kv)
    return constrain_heads(q_BTNH), *kv


def _repeated_heads(x_BTKH: jax.Array, copies: int) -> jax.Array:
    """Each head `copies` times, [B, T, K * copies, H], and all tokens of a device's own of them.

    A device repeats its own tokens and sends them on: it holds and receives lcm(K, n) / n heads of
    a row, n devices sharing it, and never all K, as it would if it gathered them first.
    """
    T, K = x_BTKH.shape[1:3]
    tensor, sequence = axis_parts("tensor"), axis_parts("sequence")
    heads = "tensor" if K % tensor == 0 else None
    tokens = "sequence" if T % sequence == 0 else None  # as `constrain_rows` leaves them
    parts = K * copies // tensor

    def run(x):
        at = jnp.arange(parts, dtype=jnp.int32)
        if heads is None:
            at = at + lax.axis_index("tensor") * parts
        if tokens is None:
            own = parts // sequence
            at = lax.dynamic_slice_in_dim(at, lax.axis_index("sequence") * own, own)
        x = jnp.take(x, at // copies, axis=2, mode="clip")
        return x if tokens is None else lax.all_to_all(x, tokens, 2, 1, tiled=True)

    return over_mesh(run, (P(ROWS, tokens, heads),), P(ROWS, None, HEADS))(x_BTKH)


def _grouped(x_BTNH: jax.Array, heads: int, blocks: int) -> jax.Array:
    """[B, T, N, H] -> [blocks, B, K, G*q, H]: the queries of one key head side by side."""
    B, T, N, H = x_BTNH.shape
    x = x_BTNH.reshape(B, blocks, T // blocks, heads, N // heads, H)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(blocks, B, heads, -1, H)


def _ungrouped(x: jax.Array, block: int) -> jax.Array:
    blocks, B, K, GQ, H = x.shape
    x = x.reshape(blocks, B, K, GQ // block, block, H).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, blocks * block, K * (GQ // block), H)


def _by_size(run: Callable[[int], Any], tokens: Tokens, window: jax.Array, sizes) -> Any:
    """`run` with the size of blocks, of one or two, that is faster for these rows."""
    if len(sizes) == 1:
        return run(sizes[0])
    small, large = sizes
    pairs = [_plan(tokens, window, size)[1].sum() for size in sizes]
    few_more = pairs[1] * (large // small) ** 2 <= WASTE * pairs[0]
    return lax.cond(few_more, lambda: run(large), lambda: run(small))


def _forward(q_BTNH, k_BTKH, v_BTKH, tokens, window, scale, softcap, block):
    T, N, H = q_BTNH.shape[1:]
    K = k_BTKH.shape[2]
    blocks, groups = T // block, N // K
    q = _grouped(q_BTNH, K, blocks)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    order, count = _plan(tokens, window, block)

    def one_query_block(_, inputs):
        i, q_i = inputs
        of_q = _block_of(tokens, i, block, (2,))

        def one_key_block(n, carry):
            j = order[i, n]
            out, top, total = carry
            k_j, v_j = _slice(k_BKTH, j, block, 2), _slice(v_BKTH, j, block, 2)
            visible = _visible(of_q, _block_of(tokens, j, block, (1,)), window)
            visible = jnp.tile(visible, (1, groups, 1))[:, None]
            s = _masked_scores(q_i, k_j, scale, softcap, visible)
            new_top = jnp.maximum(top, s.max(-1))
            # Where nothing was visible yet these are ones; `shrink` is 0 as soon as something is.
            p = jnp.exp(s - new_top[..., None]).astype(v_j.dtype)
            shrink = jnp.exp(top - new_top)
            pv = jnp.einsum("BKqk,BKkH->BKqH", p, v_j, preferred_element_type=F32)
            return out * shrink[..., None] + pv, new_top, total * shrink + p.astype(F32).sum(-1)

        rows = q_i.shape[:3]
        start = (jnp.zeros((*rows, H), F32), jnp.full(rows, NEGATIVE, F32), jnp.zeros(rows, F32))
        out, top, total = lax.fori_loop(0, count[i], one_key_block, start)
        # Padding queries see nothing: output 0, and in the backward pass exp(s - lse) = 0.
        blind = top <= NEGATIVE
        out = jnp.where(blind[..., None], 0.0, out / total[..., None])
        return None, (out.astype(q_i.dtype), jnp.where(blind, -NEGATIVE, top + jnp.log(total)))

    index = jnp.arange(blocks, dtype=jnp.int32)
    _, (out, lse) = lax.scan(one_query_block, None, (index, q))
    return _ungrouped(out, block), _ungrouped(lse[..., None], block)[..., 0]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _blockwise(q_BTNH, k_BTKH, v_BTKH, tokens, window, scale, softcap, sizes):
    return _blockwise_fwd(q_BTNH, k_BTKH, v_BTKH, tokens, window, scale, softcap, sizes)[0]


def _blockwise_fwd(q, k, v, tokens, window, scale, softcap, sizes):
    def forward(*inputs):
        run = partial(_forward, *inputs, scale, softcap)
        return _by_size(run, *inputs[3:5], sizes)

    rows, heads = partitions(q, k)
    arrays = P(rows, None, heads)
    run = over_mesh(forward, (arrays, arrays, arrays, P(rows), P()), (arrays, arrays))
    out, lse = run(q, k, v, tokens, window)
    # Named here, where both are residuals: remat that saves them does not run the forward again.
    out, lse = store(out, ATTENTION[0]), store(lse, ATTENTION[1])
    return out, (q, k, v, tokens, window, out, lse)


def _blockwise_bwd(scale, softcap, sizes, residuals, dout_BTNH):
    def backward(*inputs):
        run = partial(_backward, *inputs, scale, softcap)
        return _by_size(run, *inputs[3:5], sizes)

    rows, heads = partitions(*residuals[:2])
    arrays = P(rows, None, heads)
    inputs = (arrays, arrays, arrays, P(rows), P(), arrays, arrays, arrays)
    run = over_mesh(backward, inputs, (arrays, arrays, arrays))
    return *run(*residuals, dout_BTNH), None, None


def _backward(
    q_BTNH, k_BTKH, v_BTKH, tokens, window, out_BTNH, lse_BTN, dout_BTNH, scale, softcap, block
):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    blocks, groups = T // block, N // K
    q, dout = _grouped(q_BTNH, K, blocks), _grouped(dout_BTNH, K, blocks)
    kT_BKHT = k_BTKH.transpose(0, 2, 3, 1)
    delta_BTN = inner(dout_BTNH, out_BTNH)
    lse, delta = (_grouped(x[..., None], K, blocks)[..., 0] for x in (lse_BTN, delta_BTN))
    order, count = _plan(tokens, window, block)

    def one_query_block(carry, inputs):
        i, q_i, do_i, lse_i, delta_i = inputs
        of_q = _block_of(tokens, i, block, (1, 2), groups)

        # Keys x queries, so that every product contracts the last axis of its left operand, which
        # XLA's CPU backend multiplies two to three times as fast as the first.
        def one_key_block(n, carry):
            j = order[i, n]
            dq_BKHq, dk_BKTH, dv_BKTH = carry
            k_j, v_j = (_slice(x, j, block, 1).swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
            visible = _visible(of_q, _block_of(tokens, j, block, (1, 3)), window)
            s = _masked_scores(k_j, q_i, scale, softcap, visible)
            p = jnp.exp(s - lse_i[..., None, :])
            dp = jnp.einsum("BKkH,BKqH->BKkq", v_j, do_i, preferred_element_type=F32)
            ds = p * (dp - delta_i[..., None, :])
            if softcap is not None:  # (a masked s is far outside the cap, but there p is 0)
                ds = ds * (1.0 - jnp.square(jnp.maximum(s, -softcap) / softcap))
            ds = (ds * scale).astype(q_i.dtype)
            kT_j = _slice(kT_BKHT, j, block, 3)
            dq_BKHq += jnp.einsum("BKHk,BKkq->BKHq", kT_j, ds, preferred_element_type=F32)
            dk_j = jnp.einsum("BKkq,BKqH->BKkH", ds, q_i, preferred_element_type=F32)
            p = p.astype(do_i.dtype)
            dv_j = jnp.einsum("BKkq,BKqH->BKkH", p, do_i, preferred_element_type=F32)
            dk_BKTH = lax.dynamic_update_slice_in_dim(
                dk_BKTH, _slice(dk_BKTH, j, block, 2) + dk_j, j * block, 2
            )
            dv_BKTH = lax.dynamic_update_slice_in_dim(
                dv_BKTH, _slice(dv_BKTH, j, block, 2) + dv_j, j * block, 2
            )
            return dq_BKHq, dk_BKTH, dv_BKTH

        dk_BKTH, dv_BKTH = carry
        start = (jnp.zeros_like(q_i.swapaxes(2, 3), F32), dk_BKTH, dv_BKTH)
        dq_BKHq, dk_BKTH, dv_BKTH = lax.fori_loop(0, count[i], one_key_block, start)
        return (dk_BKTH, dv_BKTH), dq_BKHq.swapaxes(2, 3).astype(q_i.dtype)

    index = jnp.arange(blocks, dtype=jnp.int32)
    zeros = jnp.zeros((B, K, T, H), F32)
    (dk, dv), dq = lax.scan(one_query_block, (zeros, zeros), (index, q, dout, lse, delta))
    dk_BTKH = dk.transpose(0, 2, 1, 3).astype(k_BTKH.dtype)
    dv_BTKH = dv.transpose(0, 2, 1, 3).astype(v_BTKH.dtype)
    return _ungrouped(dq, block), dk_BTKH, dv_BTKH


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


def platform() -> str:
    """Where a function that is being traced will run: tpu, gpu or cpu.

    The mesh decides where one is set: it may be of devices that this process does not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return "tpu" if kind.startswith("tpu") else "cpu" if kind == "cpu" else "gpu"


def check_kernel(kernel: Kernel) -> None:
    """Refuse the fused kernel where there is no device that it is written for."""
    if kernel == "flash" and platform() != "tpu":
        raise ValueError(
            f"model.attention=flash needs a TPU, this is a {platform()}; set it to auto or xla"
        )


def _fused(kernel: Kernel, length: int, head_dim: int) -> bool:
    """Whether the kernels of `flash` compute it; `auto` takes them on a TPU, for rows that fit."""
    check_kernel(kernel)
    size = 2 * 4 * length * max(head_dim, 128)
    if kernel == "flash" and size > LONGEST:
        longest = LONGEST // (size // length)
        raise ValueError(
            f"model.attention=flash holds rows of up to {longest} tokens at a head width of "
            f"{head_dim}, got {length}; set it to auto or xla"
        )
    return kernel in ("flash", "interpret") or (
        kernel == "auto" and platform() == "tpu" and size <= LONGEST
    )


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    tokens: Tokens,
    window: jax.Array | int,
    scale: float,
    softcap: float | None = None,
    *,
    block: int | None = None,
    kernel: Kernel = "auto",
) -> jax.Array:
    """Attention of packed rows, [B, T, N, H] in q's dtype; float32 softmax.

    window: a query sees keys less than `window` positions before it (itself included); may be
    traced. Queries of padding get zeros. Blocks of keys that no query of a block can see (earlier
    segments, outside the window, the future, sibling branches) are skipped, not masked.

    kernel: xla = the loops of this file; flash = the fused kernels of `flash.py`, for TPUs; auto =
    flash on a TPU, else xla; interpret = the bodies of the fused kernels as XLA operations, on any
    device, for tests. block: tokens of a block of those loops; None = 64, or 256 where so few
    conversations fill the rows at hand that this is faster.
    """
    q_BTNH, k_BTKH, v_BTKH = _whole_rows(q_BTNH, k_BTKH, v_BTKH)
    if _fused(kernel, q_BTNH.shape[1], q_BTNH.shape[3]):
        from saro_jax.models import flash  # here, for it imports this file, and Pallas takes time

        interpret = kernel == "interpret"
        return flash.attend(
            q_BTNH, k_BTKH, v_BTKH, tokens, window, scale, softcap, interpret=interpret
        )
    T, N = q_BTNH.shape[1:3]
    assert N % k_BTKH.shape[2] == 0, (q_BTNH.shape, k_BTKH.shape)
    sizes = (min(block or SMALL, T),)
    # In shorter rows the scores of a large block would be most of what a layer holds.
    if block is None and T % LARGE == 0 and T >= 4 * LARGE:
        sizes = (SMALL, LARGE)
    pad = -T % sizes[0]
    if pad:
        q_BTNH, k_BTKH, v_BTKH = (
            jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        tokens = Tokens(*(jnp.pad(t, ((0, 0), (0, pad))) for t in tokens))
    window = jnp.asarray(window, jnp.int32)
    out = _blockwise(q_BTNH, k_BTKH, v_BTKH, tokens, window, scale, softcap, sizes)
    return cast(jax.Array, out)[:, :T]


def attend_cache(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array,
    window: jax.Array | int,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of T new tokens to a cache whose slot s holds position s, [B, T, N, H].

    Written as plain matrix products with the batch axes first, rows R = G * T: XLA's CPU backend
    runs these fastest, and others of the same bfloat16 einsums not at all.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BSKH.shape[2], k_BSKH.shape[1]
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    s = _scores(q_BKRH, k_BKSH, scale, softcap).reshape(B, K, N // K, T, S)
    slot = jnp.arange(S, dtype=jnp.int32)
    back_BTS = position_BT[:, :, None] - slot
    visible = ((back_BTS >= 0) & (back_BTS < window))[:, None, None]
    p = jax.nn.softmax(jnp.where(visible, s, NEGATIVE), axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("BKRS,BKSH->BKRH", p.reshape(B, K, -1, S), v_BKSH, preferred_element_type=F32)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(B, T, N, H).astype(q_BTNH.dtype)
