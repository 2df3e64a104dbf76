"""MFU, tokens/s, compile time and memory of training on one GPU, random weights of 1B and 8B.

    python benchmarks/train_gpu.py [--models 1b 8b] [--methods full lora] [--small]

Each measurement is a process of its own, so that its peak memory is its own and one that does not
fit ends alone (its row says why). Token ids are random; the speed does not depend on them.

sft            packed warmup: rows of 4,096 tokens with two conversations each
srpo shared    process pairs, prefix 1,024 and branches of 512, the prefix computed once (3 a row)
srpo separate  the same pairs, the prefix computed once a branch (2 a row of the same length)

tokens/s  of every sequence (of both branches of a pair with its prefix), whatever is computed
MFU       FLOPs that the model needs for the tokens that are computed (`harness.training_flops`: no
          recomputation, no padding; LoRA without the gradients of the matrices), over the seconds
          of a step and the dense bf16 peak of the device from the table below
optimizer AdamW where weights, moments and the float32 gradient fit the device, else SGD

Without a GPU it says so in one line and exits with code 2. --small is a miniature on any backend:
it shows that the script works, and its MFU means nothing.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
from harness import ROOT, table

LLAMA_1B = {  # Llama-3.2-1B
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA_1B | {  # Llama-3.1-8B
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
MODELS = {"1b": LLAMA_1B, "8b": LLAMA_8B, "miniature": harness.MINIATURE}
WORK = {"sft": ("rw", "shared"), "srpo shared": ("srpo", "shared")}
WORK |= {"srpo separate": ("srpo", "separate")}
# Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets; first match.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=("1b", "8b"), default=["1b", "8b"])
    add("--methods", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    add("--work", nargs="+", choices=list(WORK), default=list(WORK))
    add("--steps", type=int, default=5, help="timed steps; the median counts")
    add("--rows", type=int, default=2, help="packed rows of one forward and backward pass")
    add("--remat", nargs="+", choices=("none", "dots", "full"), default=["full"])
    add("--rank", type=int, default=16, help="of the adapters")
    add("--small", action="store_true", help="a miniature on any backend: for the tests")
    add("--out", type=Path, default=ROOT / "runs" / "benchmarks" / "train_gpu")
    add("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case is not None:
        print(json.dumps(measure(args, **json.loads(args.case))))
        return 0
    device = in_process(
        ["-c", "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"]
    )
    platform, _, kind = device.strip().splitlines()[-1].partition(" ")
    if platform != "gpu" and not args.small:
        print(f"train_gpu: no GPU (JAX found {platform}: {kind}); --small runs a miniature here")
        return 2
    run_all(args, argv if argv is not None else sys.argv[1:], kind)
    return 0


def run_all(args: argparse.Namespace, argv: list[str], kind: str) -> None:
    """Measure every case in its process and write the table after each."""
    cases = [
        {"model": model, "method": method, "work": work, "remat": remat}
        for model in (["miniature"] if args.small else args.models)
        for method in args.methods
        for remat in args.remat
        for work in args.work
    ]
    results: list[dict[str, Any]] = []
    for case in cases:
        try:
            output = in_process([__file__, *argv, f"--case={json.dumps(case)}"])
            results.append(case | json.loads(output.splitlines()[-1]))
        except ValueError as error:
            results.append(case | {"failed": str(error)})
        print(json.dumps(results[-1]), flush=True)
        report(args, results, kind)
    print((args.out / "train_gpu.md").read_text(), end="")


def in_process(arguments: list[str]) -> str:
    """What another interpreter prints; ValueError with its last line where it fails."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        # XLA explains at length; the line that names the shortage says it best.
        short = [line for line in lines if "RESOURCE_EXHAUSTED" in line or "Out of memory" in line]
        raise ValueError((short or lines[-1:])[0][:200])
    return done.stdout


def measure(
    args: argparse.Namespace, model: str, method: str, work: str, remat: str
) -> dict[str, Any]:
    """One case, in this process."""
    import jax

    from saro_jax.data.pipeline import Shape

    hf, (stage, layout), device = MODELS[model], WORK[work], jax.devices()[0]
    unit = 16 if args.small else 512  # tokens of a branch; a prefix has 2 of them, a pair 4 or 6
    if stage == "rw":
        row = 8 * unit
        items = harness.synthetic_items(4 * args.rows, 0, row // 2, vocabulary=hf["vocab_size"])
    else:
        row = 12 * unit
        items = harness.synthetic_items(
            6 * args.rows, 2 * unit, unit, unit, vocabulary=hf["vocab_size"]
        )
    sections: dict[str, Any] = {"model": {"dtype": "bfloat16", "remat": remat}}
    sections["srpo"] = {"layout": layout}
    if method == "lora":
        sections["lora"] = {"rank": args.rank}
        sections["model"] |= {"param_dtype": "float32", "frozen_dtype": "bfloat16"}
        optimizer = "adamw"
    else:
        sections["model"]["param_dtype"] = "bfloat16"
        optimizer = choose_optimizer(hf, device)
    sections["optimizer"] = {"learning_rate": 1e-6, "name": optimizer}
    found = harness.time_steps(
        hf,
        harness.settings(**sections),
        stage,
        items,
        Shape(row, args.rows, layout),
        args.steps,
    )
    flops = harness.training_flops(hf, found, frozen=method == "lora")
    peak = peak_flops(device.device_kind)
    return found | {
        "optimizer": optimizer,
        "tokens_per_second": found["sequence"] / found["seconds"],
        "compile_seconds": found["first_seconds"] - found["seconds"],
        "step_tflop": flops / 1e12,
        "mfu": flops / found["seconds"] / peak if peak else None,
    }


def choose_optimizer(hf: dict[str, Any], device: Any) -> str:
    """AdamW where bf16 weights and moments, a float32 gradient and a third more fit, else SGD."""
    limit = (device.memory_stats() or {}).get("bytes_limit") or 1e9 * harness.memory_gb()
    body, head = harness.matrix_parameters(hf)
    tables = 1 if hf["tie_word_embeddings"] else 2
    return "adamw" if (body + tables * head) * (3 * 2 + 4) * 4 / 3 < limit else "sgd"


def peak_flops(kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device, None where the table does not have it."""
    return next((peak for name, peak in PEAKS if name.lower() in kind.lower()), None)


def report(args: argparse.Namespace, results: list[dict[str, Any]], kind: str) -> None:
    """Write the table of the cases so far."""
    speeds = {
        (r["model"], r["method"], r["remat"]): r["tokens_per_second"]
        for r in results
        if r["work"] == "srpo separate" and "failed" not in r
    }
    rows = []
    for r in results:
        cells: list[Any] = [r["model"], r["method"], r["work"], r["remat"]]
        if "failed" in r:
            rows.append([*cells, "", r["failed"], *[""] * 6])
            continue
        separate = speeds.get((r["model"], r["method"], r["remat"]))
        shared = r["work"] == "srpo shared" and separate
        cells += [r["optimizer"], r["tokens_per_second"]]
        cells.append(f"{r['mfu']:.1%}" if r["mfu"] is not None else "unknown peak")
        cells.append(1 - r["real"] / r["padded"])
        cells += [r["seconds"], r["compile_seconds"], r["peak_gb"] or "not told"]
        cells.append(r["tokens_per_second"] / separate if shared else "")
        rows.append(cells)
    head = ["model", "method", "work", "remat", "optimizer", "tokens/s", "MFU", "padding"]
    head += ["s a step", "compile s", "peak GB", "x separate"]
    versions = harness.versions()
    peak = peak_flops(kind)
    text = f"{kind}, peak {peak / 1e12:.0f} TFLOP/s bf16. " if peak else f"{kind}. "
    text += f"{harness.named(versions)}. bf16, {args.rows} rows a pass, median of {args.steps}."
    harness.write(
        args.out,
        "train_gpu",
        f"{text}\n\n{table(head, rows)}",
        {"device": kind, "peak_flops": peak, "versions": versions, "cases": results},
    )


if __name__ == "__main__":
    sys.exit(main())
