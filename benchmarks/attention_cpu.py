"""Attention's loops by the size of their blocks: `python benchmarks/attention_cpu.py`.

Prints ms of one layer with SmolLM2-135M's heads on this CPU, forward and with the backward pass,
the median of some runs: blocks of 64 and of 256 tokens, and auto, which decides by the rows.
`--tree=FOLDER` measures the saro_jax of another checkout, for before and after.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
# Tokens of a row, and the parts that fill it: (branch, tokens), as often as they fit.
CASES = {
    "pairs of 200 + 195 + 190": (1792, [(0, 200), (1, 195), (2, 190)]),
    "conversations of 130": (2048, [(0, 130)]),
    "conversations of 390": (2048, [(0, 390)]),
    "one conversation": (2048, [(0, 2048)]),
    "one long conversation": (8192, [(0, 8192)]),
}


def row(length: int, parts: list[tuple[int, int]]) -> list[jax.Array]:
    """Segment, branch and position of one row."""
    found, at, segment = np.zeros((3, 1, length), np.int32), 0, 0
    while at + sum(size for _, size in parts) <= length:
        segment += 1
        for branch, size in parts:
            first = parts[0][1] if branch else 0
            here = slice(at, at + size)
            found[0, 0, here], found[1, 0, here] = segment, branch
            found[2, 0, here] = first + np.arange(size)
            at += size
    return [jnp.asarray(x) for x in found]


def milliseconds(run, *inputs: jax.Array) -> float:
    jax.block_until_ready(run(*inputs))
    times = []
    while len(times) < 5 or (sum(times) < 1 and len(times) < 31):
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tree = Path(__file__).resolve().parents[1]
    parser.add_argument("--tree", type=Path, default=tree, help="checkout that is measured")
    args = parser.parse_args()
    if not (args.tree / "saro_jax" / "models").is_dir():
        sys.exit(f"error: --tree={args.tree}: no checkout of saro_jax")
    sys.path.insert(0, str(args.tree))
    from saro_jax.models import attention  # of that checkout

    print("| tokens | row | dtype | 64 | 256 | auto | 64, backward too | 256 | auto |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (length, parts) in CASES.items():
        tokens = attention.Tokens(*row(length, parts))
        for dtype in ("bfloat16", "float32"):
            keys = jax.random.split(jax.random.key(0), 4)
            q, g = (jax.random.normal(k, (1, length, HEADS, WIDTH)).astype(dtype) for k in keys[:2])
            k, v = (
                jax.random.normal(k, (1, length, KEY_HEADS, WIDTH)).astype(dtype) for k in keys[2:]
            )
            cells: list[list[float]] = [[], []]
            for options in ({"block": 64}, {"block": 256}, {}):

                def forward(q, k, v, options=options, tokens=tokens):
                    return attention.attend(q, k, v, tokens, 2**30, WIDTH**-0.5, **options)

                def both(q, k, v, g, forward=forward):
                    return jax.vjp(forward, q, k, v)[1](g)

                cells[0].append(milliseconds(jax.jit(forward), q, k, v))
                cells[1].append(milliseconds(jax.jit(both), q, k, v, g))
            numbers = " | ".join(f"{cell:.1f}" for cell in (*cells[0], *cells[1]))
            print(f"| {length} | {name} | {dtype} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
