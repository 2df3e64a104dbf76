"""Milliseconds of one decode step: layers scanned or unrolled, float32 or bfloat16, by batch.

`python benchmarks/decode_cpu.py [--batch 16 32 60] [--slots 256] [--repeats 8]`, on the backend
that JAX finds; weights are random, in the shape of SmolLM2-135M. The variants take turns, and the
fastest of the repeats counts: CPU time of the process, which other work disturbs least.

2 cores of an AMD EPYC (AVX-512), jax 0.10.2, 256 slots, step with its logits:
batch   float32 scan   float32 unrolled   bfloat16 scan   bfloat16 unrolled
   16             104                 69             781                  97
   32             175                112            1825                 171
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from harness import SMOLLM2_135M
from jax import lax

from saro_jax.generation.engine import cast_matrices
from saro_jax.models import decoder
from saro_jax.models.architecture import from_hf

STEPS = 6


def prepare(arch, params, batch: int, slots: int, dtype, unroll: bool) -> Callable[[], None]:
    """A compiled function that decodes STEPS tokens of a batch in the middle of its cache."""
    params = cast_matrices(params, dtype)
    cache = decoder.empty_cache(arch, batch, slots, dtype)
    if unroll:
        params = decoder.unstack_layers(params)
        cache = decoder.unstack(cache, arch.num_layers)

    @partial(jax.jit, donate_argnums=1)
    def steps(params, cache):
        def step(i, carry):
            token_B, cache = carry
            position_BT = jnp.full((batch, 1), slots // 2 + i, jnp.int32)
            hidden_BTD, cache = decoder.decode(
                arch, params, token_B[:, None], position_BT, cache, dtype=dtype
            )
            logits_BV = decoder.logits(arch, params, hidden_BTD[:, 0])
            return jnp.argmax(logits_BV, -1).astype(jnp.int32), cache

        return lax.fori_loop(0, STEPS, step, (jnp.zeros(batch, jnp.int32), cache))

    kept = [cache]

    def run() -> None:
        token_B, kept[0] = steps(params, kept[0])
        token_B.block_until_ready()

    run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 60])
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    arch = from_hf(SMOLLM2_135M)
    params = decoder.init_params(arch, jax.random.key(0))
    for batch in args.batch:
        runs = {
            (dtype.__name__, unroll): prepare(arch, params, batch, args.slots, dtype, unroll)
            for dtype in (jnp.float32, jnp.bfloat16)
            for unroll in (False, True)
        }
        best: dict[tuple[str, bool], tuple[float, float]] = {}
        for _ in range(args.repeats):
            for variant, run in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                best[variant] = min(best.get(variant, (cpu, wall)), (cpu, wall))
        for (dtype, unroll), (cpu, wall) in best.items():
            print(
                f"batch {batch:3}  {dtype:8}  {'unrolled' if unroll else 'scan':8}  "
                f"cpu {1e3 * cpu / STEPS:6.0f} ms  wall {1e3 * wall / STEPS:6.0f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
