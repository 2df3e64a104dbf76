"""The one matrix product of the decoder: accumulates in float32, forward and backward.

Legend: M rows (any leading axes), I input features, O output features.

XLA's CPU backend runs bfloat16 products at full speed only when the result is asked for in float32
and both operands are matrices in row-major order: [B, T, I] @ [I, O] runs at half the speed of
[B * T, I] @ [I, O], and left to itself it contracts the first axis of the left operand for
the weight gradient and runs at 40 % of that speed (`benchmarks/dot_cpu.py` has the table). On other
backends the same formulas are the ordinary mixed-precision rule: bf16 in, float32 accumulation.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from saro_jax.parallel.sharding import axis_parts

F32 = jnp.float32


def _rows(x: jax.Array) -> jax.Array:
    """x as a matrix, unless a mesh cuts both rows and tokens: their product could not be cut."""
    return x if axis_parts("sequence") > 1 else x.reshape(-1, x.shape[-1])


def row_major(x: jax.Array) -> jax.Array:
    """x laid out in memory in its axis order on CPU; elsewhere the compiler chooses the layout."""
    if x.dtype != jnp.bfloat16:
        return x
    order = Layout(major_to_minor=tuple(range(x.ndim)))
    return lax.platform_dependent(
        x, cpu=lambda x: with_layout_constraint(x, order), default=lambda x: x
    )


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums over the last axis of a * b, without a * b in memory; float32 on every device."""

    def product(precision):
        return lambda a, b: jnp.einsum("...I,...I->...", a, b, precision=precision)

    # A CPU computes in float32 anyway, and much faster where no precision is named.
    exact = product(lax.Precision.HIGHEST)
    return lax.platform_dependent(a.astype(F32), b.astype(F32), cpu=product(None), default=exact)


@jax.custom_vjp
def dot(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x @ w in x's dtype with float32 accumulation; w is cast to x's dtype first.

    x: [..., I]; w: [I, O], any float dtype. The gradient of w comes out in w's own dtype, rounded
    once from the float32 product, so float32 master weights get float32 gradients. Over a mesh each
    device's part of it is summed in that dtype too, but on CPU in float32.
    """
    return _forward(x, w_IO)


def _forward(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    w, rows = w_IO.astype(x.dtype), _rows(x)
    last = rows.ndim - 1
    y = lax.dot_general(rows, w, (((last,), (0,)), ((), ())), preferred_element_type=F32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], w.shape[1])


def _dot_fwd(x, w_IO):
    return _forward(x, w_IO), (x, w_IO)


def _dot_bwd(residuals, dy):
    x, w_IO = residuals
    w = w_IO.astype(x.dtype)
    rows, dy_rows = _rows(x), _rows(dy)
    last = rows.ndim - 1
    dx = lax.dot_general(dy_rows, w, (((last,), (1,)), ((), ())), preferred_element_type=F32)
    dx = dx.astype(x.dtype).reshape(x.shape)
    left, axes = (row_major(rows.T), (1,)) if last == 1 else (rows, tuple(range(last)))
    contracted = (axes, tuple(range(last)))

    def product(left, dy_rows, result):
        return lax.dot_general(left, dy_rows, (contracted, ((), ())), preferred_element_type=result)

    if w_IO.dtype == F32:
        return dx, product(left, dy_rows, F32)
    dw = lax.platform_dependent(
        left,
        dy_rows,
        cpu=lambda left, dy_rows: product(left, dy_rows, F32).astype(w_IO.dtype),
        default=lambda left, dy_rows: product(left, dy_rows, w_IO.dtype),
    )
    return dx, dw


dot.defvjp(_dot_fwd, _dot_bwd)
