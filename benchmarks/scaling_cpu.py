"""How the cost of a step grows with vocabulary, row length and pairs; memory of the loss.

`python benchmarks/scaling_cpu.py [--small] [--out FOLDER]`, on the backend that JAX finds: random
weights in the shape of SmolLM2-135M with 8 of its 30 layers, the training step itself
(`saro_jax.training.step`). What grows linearly keeps its GFLOP/s: the last column of each table.

vocabulary      warmup steps of the same rows; only the two ends of the model differ
tokens of a row one step of 8,192 tokens as rows of one conversation each, 512 to 8,192 long
pairs of a row  one step of 16 pairs that share half of their tokens, 1, 4 or 16 of them in a row
loss            temporary memory of loss and gradient (`objectives.logprobs.token_scores`) as XLA
                planned it, beside what the logits alone would take
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import harness
from harness import ROOT, table

BODY = harness.SMOLLM2_135M | {"num_hidden_layers": 8}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--small", action="store_true", help="a miniature of everything, seconds: for the tests")
    add("--steps", type=int, default=3, help="timed steps of each measurement; the median counts")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--out", type=Path, default=ROOT / "runs" / "benchmarks" / "scaling_cpu")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    small = args.small
    tables: dict[str, tuple[list[str], list[list[Any]]]] = {
        "Vocabulary": vocabulary(args, (512, 1024) if small else (49152, 128256)),
        "Tokens of a row": tokens(args, (64, 128, 256) if small else (512, 2048, 8192)),
        "Pairs of a row": pairs(args, (1, 2, 4) if small else (1, 4, 16)),
        "Memory of the loss": loss_memory(
            args,
            (2048, 8192) if small else (49152, 128256),
            (512, 1024) if small else (512, 2048, 8192, 32768),
        ),
    }
    versions = harness.versions()
    text = f"{harness.cpu()}. {harness.named(versions)}. {args.dtype}, median of {args.steps}; "
    text += f"load before {load:.1f}, after {os.getloadavg()[0]:.1f}.\n"
    for title, (head, rows) in tables.items():
        text += f"\n{title}\n\n{table(head, rows)}\n"
    record = {
        "cpu": harness.cpu(),
        "versions": versions,
        "dtype": args.dtype,
        "load": [load, os.getloadavg()[0]],
        "tables": {name: {"head": head, "rows": rows} for name, (head, rows) in tables.items()},
    }
    harness.write(args.out, "scaling_cpu", text, record)
    print(text, end="")
    return 0


def measure(args, hf: dict[str, Any], stage: str, items: list[Any], row: int) -> list[Any]:
    """Tokens of a step, seconds, tokens/s, GFLOP/s."""
    from saro_jax.data.pipeline import Shape

    config = harness.settings(model={"dtype": args.dtype})
    found = harness.time_steps(hf, config, stage, items, Shape(row, 1, "shared"), args.steps)
    flops = harness.training_flops(hf, found)
    return [
        found["sequence"],
        found["seconds"],
        found["sequence"] / found["seconds"],
        flops / found["seconds"] / 1e9,
    ]


def body(args, **changes: Any) -> dict[str, Any]:
    return (harness.MINIATURE if args.small else BODY) | changes


COLUMNS = ["tokens of a step", "seconds", "tokens/s", "GFLOP/s"]


def vocabulary(args, sizes: tuple[int, ...]) -> tuple[list[str], list[list[Any]]]:
    row = 128 if args.small else 2048
    items = harness.synthetic_items(2, 0, row, vocabulary=min(sizes))
    rows = [[V, *measure(args, body(args, vocab_size=V), "rw", items, row)] for V in sizes]
    return ["vocabulary", *COLUMNS], rows


def tokens(args, lengths: tuple[int, ...]) -> tuple[list[str], list[list[Any]]]:
    rows = []
    for T in lengths:
        hf = body(args)
        count = max(lengths) // T
        items = harness.synthetic_items(count, 0, T, vocabulary=hf["vocab_size"])
        rows.append([T, *measure(args, hf, "rw", items, T)])
    return ["tokens of a row", *COLUMNS], rows


def pairs(args, counts: tuple[int, ...]) -> tuple[list[str], list[list[Any]]]:
    # 256 tokens laid out: 128 shared and 64 of each branch.
    prefix, branch = (16, 8) if args.small else (128, 64)
    hf = body(args)
    items = harness.synthetic_items(
        max(counts), prefix, branch, branch, vocabulary=hf["vocab_size"]
    )
    length = prefix + 2 * branch
    rows = [[n, *measure(args, hf, "srpo", items, n * length)] for n in counts]
    return ["pairs of a row", *COLUMNS], rows


def loss_memory(
    args, sizes: tuple[int, ...], lengths: tuple[int, ...]
) -> tuple[list[str], list[list[Any]]]:
    """MB of temporaries by vocabulary and tokens, and of float32 logits [tokens, vocabulary]."""
    D = harness.MINIATURE["hidden_size"] if args.small else BODY["hidden_size"]
    rows = []
    for V in sizes:
        for T in lengths:
            planned = loss_temporaries(V, T, D, args.dtype)
            rows.append([V, T, planned / 1e6, 4 * V * T / 1e6])
    return ["vocabulary", "tokens", "loss and gradient, MB", "logits alone, MB"], rows


def loss_temporaries(vocabulary: int, tokens: int, width: int, dtype: str) -> int:
    """Bytes of temporaries in the compiled loss and its gradient; nothing is run."""
    import jax
    import jax.numpy as jnp

    from saro_jax.objectives.logprobs import token_scores

    def loss(hidden_BSD, head_VD, target_BS, valid_BS):
        return -token_scores(hidden_BSD, head_VD, target_BS, valid_BS).logp.sum()

    of = jax.ShapeDtypeStruct
    arguments = (
        of((1, tokens, width), dtype),
        of((vocabulary, width), jnp.float32),
        of((1, tokens), jnp.int32),
        of((1, tokens), jnp.bool_),
    )
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    planned = compiled.memory_analysis()
    assert planned is not None
    return int(planned.temp_size_in_bytes)


if __name__ == "__main__":
    sys.exit(main())
