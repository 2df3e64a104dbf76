"""The mixed-precision product: shapes that XLA must run, values and gradients against float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saro_jax.models.dot import dot


# Some bfloat16 products compile and then fail at run time on CPU, so each shape that the decoder
# uses is run: packed rows, a single token, odd sizes, a vector of rows without a batch axis.
@pytest.mark.parametrize("shape", [(1, 64, 32), (3, 1, 32), (2, 7, 33), (5, 32)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("jit", [False, True])
def test_values_and_gradients(shape, dtype, jit):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape).astype(dtype)
    w = jax.random.normal(keys[1], (shape[-1], 48))
    g = jax.random.normal(keys[2], (*shape[:-1], 48)).astype(dtype)

    def run(x, w):
        y, pull = jax.vjp(dot, x, w)
        return y, *pull(g)

    y, dx, dw = (jax.jit(run) if jit else run)(x, w)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    x32, w32, g32 = (
        x.astype(jnp.float32),
        w.astype(dtype).astype(jnp.float32),
        g.astype(jnp.float32),
    )
    rows, cot = x32.reshape(-1, shape[-1]), g32.reshape(-1, 48)
    rtol, atol = (1e-2, 1e-2) if dtype == jnp.bfloat16 else (1e-5, 1e-4)
    np.testing.assert_allclose(y.astype(jnp.float32), x32 @ w32, rtol=rtol, atol=atol)
    np.testing.assert_allclose(dx.astype(jnp.float32), g32 @ w32.T, rtol=rtol, atol=atol)
    # Accumulated in float32 and not rounded to bfloat16 on the way.
    np.testing.assert_allclose(dw, rows.T @ cot, rtol=1e-5, atol=1e-4)


def test_the_gradient_of_a_bfloat16_matrix_is_rounded_once():
    x, w, g = (jax.random.normal(jax.random.key(k), (4, 4)).astype(jnp.bfloat16) for k in range(3))
    dw = jax.vjp(dot, x, w)[1](g)[1]
    exact = jnp.einsum("mi,mo->io", x, g, preferred_element_type=jnp.float32)
    assert dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dw, exact.astype(jnp.bfloat16))
