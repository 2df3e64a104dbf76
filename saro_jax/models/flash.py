"""Fused attention over packed rows for TPUs: Pallas kernels of the same contract as `attention`.

Legend: B rows, T tokens of a row, N query heads, K key/value heads, G = N / K, H head width,
S steps: pairs of a query block and a key block that are computed, q/k suffixes: a block of queries
/ keys, R = G * q: the queries of one key head side by side.

One step of the grid multiplies one query block (of all G heads that share a key head, so that keys,
values and the mask are fetched and made once) with one key block. Which pairs there are is computed
from `Tokens` before the kernel and prefetched as a list, so a pair without a visible key costs
neither a fetch nor a step: the second branch of an item never touches the first. Scores are kept
transposed, [k, R]: the statistics of the queries are then rows of lanes, and sums over keys run
over sublanes, the cheap direction of a TPU.
"""

import math
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from saro_jax.models.attention import NEGATIVE, Tokens, over_mesh, partitions
from saro_jax.models.remat import ATTENTION, store

F32, I32 = jnp.float32, jnp.int32
LANES = 128
WORKING_SET = 16 * 2**20  # bytes of fast memory for the blocks and scores of one step
LIVE, MASKED, FIRST, LAST = 1, 2, 4, 8  # flags of a step
NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


class Blocks(NamedTuple):
    """Queries (of one head) and keys of one step."""

    query: int
    key: int


class Steps(NamedTuple):
    """The pairs of blocks that are computed, int32 [B, S], grouped by query block."""

    query: jax.Array
    key: jax.Array
    flags: jax.Array
    count: jax.Array  # scalar, of the row with most; a row with fewer repeats its last, not LIVE


class Shape(NamedTuple):
    """What is static about one call."""

    blocks: Blocks
    scale: float
    softcap: float | None
    interpret: bool


def default_blocks(length: int, group: int) -> Blocks:
    """Blocks for rows of `length` tokens and `group` query heads a key head.

    Powers of two that divide the padded length: 256, which on rows of several pairs compute a
    quarter to a half less than 512 do, and fewer queries only where many heads share a key head.
    """
    key = math.gcd(_round_up(length, LANES), 256)
    return Blocks(min(key, 256 if group <= 4 else LANES), key)


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def _ids(tokens: Tokens, window: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mask of `attention` as comparisons of rows of numbers, int32 [B, 8, T] (queries, keys).

    A query sees a key whose run (segment and branch) is its own or its prefix's, whose position is
    above the window's lower end, and whose index in the row is not above its own.
    """
    segment, branch, position = tokens
    branches = branch.max() + 1
    run, prefix = segment * branches + branch, segment * branches
    real = segment > 0
    index = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=I32), segment.shape)
    query = [jnp.where(real, prefix, -2), jnp.where(real, run, -2), position - window, index]
    key = [jnp.where(real, run, -1), position, index]

    def stacked(rows):  # 8 rows: whole tiles, which the kernel can transpose
        return jnp.stack(rows + [jnp.zeros_like(index)] * (8 - len(rows)), axis=1)

    return stacked(query), stacked(key)


def causal_pairs(length: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Query and key block of all pairs at or below the diagonal, in order, [S] each."""
    count = [((i + 1) * blocks.query - 1) // blocks.key + 1 for i in range(length // blocks.query)]
    query = np.repeat(np.arange(len(count)), count)
    return query, np.concatenate([np.arange(n) for n in count])


def plan(tokens: Tokens, window: jax.Array, blocks: Blocks) -> Steps:
    """Which pairs of blocks of rows are computed, and which of them need a mask.

    Decided by intervals of each block's ids, so a pair may be computed that no query sees (at the
    border of two items) but none is left out; and the pair on the diagonal always is computed, so
    every query gets its output.
    """
    T = tokens.segment.shape[1]
    i, j = causal_pairs(T, blocks)
    real = tokens.segment > 0
    far = jnp.iinfo(I32).max
    run = tokens.segment * (tokens.branch.max() + 1) + tokens.branch

    def lowest(x, where, size, at):
        return jnp.where(where, x, far).reshape(len(x), -1, size).min(-1)[:, at]

    def highest(x, where, size, at):
        return jnp.where(where, x, -1).reshape(len(x), -1, size).max(-1)[:, at]

    def ends(x, size, at, where=real):
        return lowest(x, where, size, at), highest(x, where, size, at)

    def meet(a, b):
        return (a[0] <= b[1]) & (b[0] <= a[1])

    q_run, k_run = ends(run, blocks.query, i), ends(run, blocks.key, j)
    q_segment, k_segment = (
        ends(tokens.segment, *where) for where in ((blocks.query, i), (blocks.key, j))
    )
    k_prefix = ends(tokens.segment, blocks.key, j, real & (tokens.branch == 0))
    q_position, k_position = (
        ends(tokens.position, *where) for where in ((blocks.query, i), (blocks.key, j))
    )
    diagonal = np.diff(i, append=-1) != 0  # the last pair of each query block
    near = (q_position[0] - window < k_position[1]) & (q_position[1] >= 0) & (k_position[1] >= 0)
    visible = (near & (meet(q_run, k_run) | meet(q_segment, k_prefix))) | diagonal

    def filled(size, at):
        return real.reshape(len(real), -1, size).all(-1)[:, at]

    plain = (
        filled(blocks.query, i)
        & filled(blocks.key, j)
        & (q_segment[0] == q_segment[1])
        & (k_segment[0] == k_segment[1])
        & (q_segment[0] == k_segment[0])
        & (q_position[1] - window < k_position[0])
        & ((j + 1) * blocks.key - 1 <= i * blocks.query)
    )
    k_branch = ends(tokens.branch, blocks.key, j)
    q_branch = ends(tokens.branch, blocks.query, i)
    shared = k_branch[1] == 0
    own = (k_branch[0] == k_branch[1]) & (q_branch[0] == q_branch[1]) & (k_branch[0] == q_branch[0])
    plain &= shared | own

    rank = jnp.cumsum(visible, axis=1, dtype=I32)
    number = rank[:, -1]
    at = jnp.arange(len(i), dtype=I32)
    # The n-th visible pair comes after all pairs of rank <= n; no sort, which compiles slowly.
    wanted = jnp.minimum(at, number[:, None] - 1)
    order = (rank[:, None, :] <= wanted[:, :, None]).sum(-1, dtype=I32)
    query, key = jnp.asarray(i, I32)[order], jnp.asarray(j, I32)[order]
    live = at < number[:, None]
    first = jnp.diff(query, axis=1, prepend=-1) != 0
    last = (jnp.diff(query, axis=1, append=-1) != 0) | (at == number[:, None] - 1)
    masked = ~jnp.take_along_axis(plain, order, axis=1)
    flags = jnp.where(live, LIVE + masked * MASKED + first * FIRST + last * LAST, 0)
    return Steps(query, key, flags.astype(I32), number.max())


# ---- the kernels ---------------------------------------------------------------------------------


def _dot(a, b, dimensions):
    return lax.dot_general(a, b, dimensions, preferred_element_type=F32)


def _side_by_side(x_Gq: jax.Array) -> jax.Array:
    """[G, q] -> [1, G * q]."""
    return jnp.concatenate([x_Gq[g : g + 1] for g in range(x_Gq.shape[0])], axis=1)


def _mask(q_ids_ref, k_ids_ref, group: int) -> jax.Array:
    """What `attention._visible` says of the pair, bool [k, R]."""
    q, k = q_ids_ref[...], k_ids_ref[...].T
    run, position, index = (k[:, n : n + 1] for n in range(3))
    seen = (run == q[0:1]) | (run == q[1:2])
    seen = seen & (position > q[2:3]) & (index <= q[3:4])
    return jnp.concatenate([seen] * group, axis=1)


def _scores(k_kH, q_RH, shape: Shape) -> jax.Array:
    s_kR = _dot(k_kH, q_RH, NT) * shape.scale
    return s_kR if shape.softcap is None else shape.softcap * jnp.tanh(s_kR / shape.softcap)


def _each_kind(flags, step) -> None:
    """Run `step(masked)` for a pair that needs a mask and for one that does not."""
    live = flags & (LIVE | MASKED)
    pl.when(live == LIVE)(partial(step, False))
    pl.when(live == LIVE | MASKED)(partial(step, True))


def _forward_kernel(
    query, key, flags, q_ids, k_ids, q, k, v, out, lse, acc, top, total, *, shape: Shape
):
    flag = flags[pl.program_id(0), pl.program_id(2)]
    G, _, H = q.shape

    @pl.when(flag & FIRST != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, NEGATIVE)
        total[...] = jnp.zeros_like(total)

    def step(masked: bool):
        s_kR = _scores(k[...], q[...].reshape(-1, H), shape)
        seen = _mask(q_ids, k_ids, G) if masked else None
        if seen is not None:
            s_kR = jnp.where(seen, s_kR, NEGATIVE)
        before = top[...]
        now = jnp.maximum(before, s_kR.max(0, keepdims=True))
        p_kR = jnp.exp(s_kR - now)
        if seen is not None:
            p_kR = jnp.where(seen, p_kR, 0.0)
        shrink = jnp.exp(before - now)
        top[...] = now
        total[...] = total[...] * shrink + p_kR.sum(0, keepdims=True)
        acc[...] = acc[...] * shrink + _dot(v[...], p_kR.astype(v.dtype), TN)

    _each_kind(flag, step)

    @pl.when(flag & LAST != 0)
    def _():
        sums = jnp.where(total[...] == 0.0, 1.0, total[...])  # padding sees nothing: output 0
        out[...] = (acc[...] / sums).T.reshape(out.shape).astype(out.dtype)
        logs = top[...] + jnp.log(sums)
        width = lse.shape[1]
        for g in range(G):
            lse[g : g + 1, :] = logs[:, g * width : (g + 1) * width]


def _backward_kernel(
    query, key, flags, q_ids, k_ids, q, k, v, dout, lse, delta, dq, dk, dv, acc, *, shape: Shape
):
    row, step_index = pl.program_id(0), pl.program_id(2)
    flag = flags[row, step_index]
    G, _, H = q.shape
    size = k.shape[0]
    # dk and dv of the whole row stay in fast memory for all steps of a key head.
    here = pl.ds(pl.multiple_of(key[row, step_index] * size, size), size)

    @pl.when(step_index == 0)
    def _():
        def clear(j, _):
            block = pl.ds(pl.multiple_of(j * size, size), size)
            dk[block] = jnp.zeros((size, H), F32)
            dv[block] = jnp.zeros((size, H), F32)
            return 0

        lax.fori_loop(0, dk.shape[0] // size, clear, 0)

    @pl.when(flag & FIRST != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def step(masked: bool):
        q_RH, dout_RH = q[...].reshape(-1, H), dout[...].reshape(-1, H)
        s_kR = _scores(k[...], q_RH, shape)
        p_kR = jnp.exp(s_kR - _side_by_side(lse[...]))
        if masked:
            p_kR = jnp.where(_mask(q_ids, k_ids, G), p_kR, 0.0)
        dv[here] += _dot(p_kR.astype(dout.dtype), dout_RH, NN)
        ds_kR = p_kR * (_dot(v[...], dout_RH, NT) - _side_by_side(delta[...]))
        if shape.softcap is not None:
            ds_kR = ds_kR * (1.0 - jnp.square(s_kR / shape.softcap))
        ds_kR = (ds_kR * shape.scale).astype(q.dtype)
        dk[here] += _dot(ds_kR, q_RH, NN)
        acc[...] += _dot(k[...], ds_kR, TN)

    _each_kind(flag, step)

    @pl.when(flag & LAST != 0)
    def _():
        dq[...] = acc[...].T.reshape(dq.shape).astype(dq.dtype)


# ---- the calls -----------------------------------------------------------------------------------


def _specs(shape: Shape, G: int, T: int, H: int) -> dict[str, pl.BlockSpec]:
    """Where each operand's block of step (row, key head, step) lies."""
    bq, bk = shape.blocks

    def spec(block, index):
        return pl.BlockSpec(
            block, lambda b, h, s, query, key, _: index(b, h, query[b, s], key[b, s])
        )

    return {
        "q_ids": spec((None, 8, bq), lambda b, h, i, j: (b, 0, i)),
        "k_ids": spec((None, 8, bk), lambda b, h, i, j: (b, 0, j)),
        "queries": spec((None, None, G, bq, H), lambda b, h, i, j: (b, h, 0, i, 0)),
        "keys": spec((None, None, bk, H), lambda b, h, i, j: (b, h, j, 0)),
        "statistics": spec((None, None, G, bq), lambda b, h, i, j: (b, h, 0, i)),
        "whole": pl.BlockSpec(
            (None, None, T, H), lambda b, h, *_: (b, h, 0, 0), pipeline_mode=pl.Buffered(1)
        ),
    }


def _call(kernel, shape: Shape, steps: Steps, operands, results, scratch, *, products: int):
    """Run a kernel over (rows, key heads, steps); operands and results: (spec name, array)."""
    q = operands["q"][1]
    B, K, G, T, H = q.shape
    specs = _specs(shape, G, T, H)
    area = len(steps.query[0]) * shape.blocks.query * shape.blocks.key  # at most; causal
    sizes = [*(x for _, x in operands.values()), *(x for _, x in results)]
    cost = pl.CostEstimate(
        flops=2 * products * B * K * G * H * area,
        transcendentals=B * K * G * area,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in sizes),
    )
    call = pl.pallas_call(
        partial(kernel, shape=shape),
        out_shape=[x for _, x in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, steps.count),
            in_specs=[specs[name] for name, _ in operands.values()],
            out_specs=[specs[name] for name, _ in results],
            scratch_shapes=[pltpu.VMEM(size, F32) for size in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=WORKING_SET
            + sum(math.prod(x.shape[2:]) * 4 for name, x in results if name == "whole"),
        ),
        cost_estimate=cost,
        interpret=shape.interpret,
        name=kernel.__name__.strip("_"),
    )
    return call(steps.query, steps.key, steps.flags, *(x for _, x in operands.values()))


def _head_major(x_BTNH: jax.Array, heads: int, length: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, T, H], padded to `length` tokens."""
    B, T, N, H = x_BTNH.shape
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, length - T), (0, 0), (0, 0)))
    return x_BTNH.reshape(B, length, heads, N // heads, H).transpose(0, 2, 3, 1, 4)


def _token_major(x_BKGTH: jax.Array, T: int) -> jax.Array:
    B, K, G, _, H = x_BKGTH.shape
    return x_BKGTH[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _padded(tokens: Tokens, length: int) -> Tokens:
    return Tokens(*(jnp.pad(t, ((0, 0), (0, length - t.shape[1]))) for t in tokens))


def _length(T: int, shape: Shape) -> int:
    return _round_up(T, math.lcm(*shape.blocks))


def _prepared(q_BTNH, k_BTKH, v_BTKH, tokens: Tokens, window, shape: Shape):
    """Steps, and the operands that both kernels read."""
    T, K = q_BTNH.shape[1], k_BTKH.shape[2]
    length = _length(T, shape)
    tokens = _padded(tokens, length)
    q_ids, k_ids = _ids(tokens, window)
    operands = {
        "q_ids": ("q_ids", q_ids),
        "k_ids": ("k_ids", k_ids),
        "q": ("queries", _head_major(q_BTNH, K, length)),
        "k": ("keys", _head_major(k_BTKH, K, length)[:, :, 0]),
        "v": ("keys", _head_major(v_BTKH, K, length)[:, :, 0]),
    }
    return plan(tokens, window, shape.blocks), operands


# Compiled as functions of their own, for JAX drops a function whose results are not used, but never
# a kernel: the backward pass of a layer that saved the results would else name the kernel again.
@partial(jax.jit, static_argnames="shape")
def _run_forward(q_BTNH, k_BTKH, v_BTKH, tokens, window, shape: Shape):
    """The output [B, T, N, H], and the log of each softmax sum, float32 [B, K, G, padded T]."""
    steps, operands = _prepared(q_BTNH, k_BTKH, v_BTKH, tokens, window, shape)
    q = operands["q"][1]
    results = [
        ("queries", jax.ShapeDtypeStruct(q.shape, q.dtype)),
        ("statistics", jax.ShapeDtypeStruct(q.shape[:4], F32)),
    ]
    G, H = q.shape[2], q.shape[4]
    R = G * shape.blocks.query
    scratch = [(H, R), (1, R), (1, R)]
    out, lse = _call(_forward_kernel, shape, steps, operands, results, scratch, products=2)
    return _token_major(out, q_BTNH.shape[1]), lse


@partial(jax.jit, static_argnames="shape")
def _run_backward(q_BTNH, k_BTKH, v_BTKH, tokens, window, out_BTNH, lse, dout_BTNH, shape: Shape):
    """Gradients of q, k and v, in their dtypes."""
    steps, operands = _prepared(q_BTNH, k_BTKH, v_BTKH, tokens, window, shape)
    q, k = operands["q"][1], operands["k"][1]
    T, K = q_BTNH.shape[1], k_BTKH.shape[2]
    delta_BTN = jnp.einsum("BTNH,BTNH->BTN", dout_BTNH.astype(F32), out_BTNH.astype(F32))
    delta = _head_major(delta_BTN[..., None], K, q.shape[3])[..., 0]
    operands |= {
        "dout": ("queries", _head_major(dout_BTNH, K, q.shape[3])),
        "lse": ("statistics", lse),
        "delta": ("statistics", delta),
    }
    results = [
        ("queries", jax.ShapeDtypeStruct(q.shape, q.dtype)),
        ("whole", jax.ShapeDtypeStruct(k.shape, F32)),
        ("whole", jax.ShapeDtypeStruct(k.shape, F32)),
    ]
    scratch = [(q.shape[4], q.shape[2] * shape.blocks.query)]
    dq, dk, dv = _call(_backward_kernel, shape, steps, operands, results, scratch, products=5)
    dk, dv = (_token_major(x[:, :, None], T).astype(k_BTKH.dtype) for x in (dk, dv))
    return _token_major(dq, T), dk, dv


def _partitions(q_BTNH, k_BTKH) -> tuple[P, P, P]:
    """How the mesh cuts (arrays [B, T, N, H], ids [B, T], statistics [B, K, ...])."""
    rows, heads = partitions(q_BTNH, k_BTKH)
    return P(rows, None, heads, None), P(rows), P(rows, heads)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q_BTNH, k_BTKH, v_BTKH, tokens, window, shape):
    return _flash_fwd(q_BTNH, k_BTKH, v_BTKH, tokens, window, shape)[0]


def _flash_fwd(q_BTNH, k_BTKH, v_BTKH, tokens, window, shape):
    arrays, ids, statistics = _partitions(q_BTNH, k_BTKH)
    run = over_mesh(
        partial(_run_forward, shape=shape),
        (arrays, arrays, arrays, ids, P()),
        (arrays, statistics),
    )
    out_BTNH, lse = run(q_BTNH, k_BTKH, v_BTKH, tokens, window)
    # Named here, where both are residuals: a policy that saves them never runs the kernel again.
    out_BTNH, lse = store(out_BTNH, ATTENTION[0]), store(lse, ATTENTION[1])
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, tokens, window, out_BTNH, lse)


def _flash_bwd(shape, residuals, dout_BTNH):
    q_BTNH, k_BTKH = residuals[:2]
    arrays, ids, statistics = _partitions(q_BTNH, k_BTKH)
    inputs = (arrays, arrays, arrays, ids, P(), arrays, statistics, arrays)
    run = over_mesh(partial(_run_backward, shape=shape), inputs, (arrays, arrays, arrays))
    return *run(*residuals, dout_BTNH), None, None


_flash.defvjp(_flash_fwd, _flash_bwd)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    tokens: Tokens,
    window: jax.Array | int,
    scale: float,
    softcap: float | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attention.attend` by the kernels above, [B, T, N, H] in q's dtype.

    blocks: None = `default_blocks`; on a TPU multiples of 128 tokens. interpret: run the kernels'
    bodies as plain XLA operations, for tests on any device. The algorithm is FlashAttention-2
    (Dao, 2023) with the gradients of q, k and v in one pass: those of a row's keys and values stay
    in fast memory, which bounds the row length (`attention.LONGEST`).
    """
    T, N = q_BTNH.shape[1:3]
    K = k_BTKH.shape[2]
    assert N % K == 0, (q_BTNH.shape, k_BTKH.shape)
    shape = Shape(blocks or default_blocks(T, N // K), scale, softcap, interpret)
    window = jnp.asarray(window, I32)
    return cast(jax.Array, _flash(q_BTNH, k_BTKH, v_BTKH, tokens, window, shape))
