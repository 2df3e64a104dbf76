"""Speed of the decoder's matrix products on this CPU: `python benchmarks/dot_cpu.py`.

Prints GFLOP/s of one MLP product of a 135M model in bfloat16 and float32: forward, gradient of the
input, gradient of the weight, as XLA does it when left alone and as `saro_jax.models.dot` asks for.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from saro_jax.models.dot import row_major

T, D, F = 1024, 576, 1536
F32 = jnp.float32


def gflops(f: Callable[..., jax.Array], *args: jax.Array) -> float:
    run = jax.jit(f)
    run(*args).block_until_ready()
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(5):
            out = run(*args)
        out.block_until_ready()
        best = min(best, (time.perf_counter() - start) / 5)
    return 2 * T * D * F / best / 1e9


def product(a, b, axes, **kwargs):
    return lax.dot_general(a, b, ((axes[:1], axes[1:]), ((), ())), **kwargs)


def main() -> None:
    print("| product | bfloat16 | float32 |\n|---|---|---|")
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, y = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((T, D), (D, F), (T, F)), strict=True)
    )
    wide = {"preferred_element_type": F32}
    rows: list[tuple[str, Callable[..., jax.Array], tuple[jax.Array, ...]]] = [
        ("x @ w, result in its own dtype", lambda x, w: product(x, w, (1, 0)), (x, w)),
        ("x @ w, float32 result", lambda x, w: product(x, w, (1, 0), **wide), (x, w)),
        ("dy @ w.T, float32 result", lambda y, w: product(y, w, (1, 1), **wide), (y, w)),
        ("x.T @ dy, float32 result", lambda x, y: product(x, y, (0, 0), **wide), (x, y)),
        (
            "x.T @ dy, x.T laid out in memory",
            lambda x, y: product(row_major(x.T), y, (1, 0), **wide),
            (x, y),
        ),
    ]
    for name, f, args in rows:
        speeds = [
            gflops(f, *(a.astype(dtype) for a in args)) for dtype in (jnp.bfloat16, jnp.float32)
        ]
        print(f"| {name} | {speeds[0]:.0f} | {speeds[1]:.0f} |")


if __name__ == "__main__":
    main()
