"""MaxText's training step beside ours, both compiled for a TPU that is not there.

    python benchmarks/maxtext_tpu.py --maxtext-python=VENV/bin/python [--topology=v5p-32]

VENV: Python 3.12 with `pip install 'maxtext[tpu]==0.2.5'`. Its own `train_compile` compiles its
step of Llama-3.1-8B, one row of 4096 tokens a device, remat full; `parallel/hlo_walk.py` and
`parallel/schedule.py` then read the program as they read ours. Times are estimates.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from saro_jax.parallel import hlo, hlo_walk, schedule, topologies

TOKENS, HEADS, WIDTH, BLOCK = 4096, 32, 128, 512
# Its attention kernels by a part of their name: products of queries and keys, or alike, in each.
KERNELS = {"fwd": 2, "dkv": 4, "dq": 3}
CHILD = """
import json, sys
from maxtext.trainers.pre_train import train_compile
compile_step = train_compile.jit_and_compile
def caught(*args, **kwargs):
    compiled = compile_step(*args, **kwargs)
    memory = compiled.memory_analysis()
    open(sys.argv[-1] + ".hlo", "w").write(compiled.as_text())
    json.dump({"peak_bytes": memory.peak_memory_in_bytes}, open(sys.argv[-1] + ".json", "w"))
    return compiled
train_compile.jit_and_compile = caught
import maxtext, os
base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
train_compile.main(["train_compile", base, *sys.argv[1:-1]])
"""


def kernel_flops(name: str, _) -> float | None:
    if "splash" not in name:
        return None
    products = next(n for part, n in KERNELS.items() if part in name)
    return products * 2.0 * HEADS * WIDTH * TOKENS * (TOKENS + BLOCK) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maxtext-python", required=True)
    parser.add_argument("--topology", default="v5p-32")
    args = parser.parse_args()
    topology = topologies.find(args.topology)
    settings = {
        "model_name": "llama3.1-8b",
        "per_device_batch_size": 1,
        "max_target_length": TOKENS,
        "compile_topology": args.topology,
        "compile_topology_num_slices": 1,
        "remat_policy": "full",
        "dataset_type": "synthetic",
        "run_name": "compile",
        "log_config": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "step")
        options = [f"{k}={v}" for k, v in settings.items()] + [f"base_output_directory={folder}"]
        told = {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost"}
        told |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
        inherited = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"}  # our libtpu
        subprocess.run(
            [args.maxtext_python, "-c", CHILD, *options, out],
            env=inherited | told,
            check=True,
            stdout=sys.stderr,
        )
        module = hlo.parse(Path(out + ".hlo").read_text())
        memory = json.loads(Path(out + ".json").read_text())
    found = hlo_walk.totals(module, kernels=kernel_flops)
    times = schedule.estimate(module, topology.chip, kernels=kernel_flops)
    report = {
        "peak_gib": memory["peak_bytes"] / topologies.GIB,
        "product_tflop": found.flops / 1e12,
        "attention_kernel_tflop": found.kernel_flops / 1e12,
        "collectives_gb": {k: v["bytes"] / 1e9 for k, v in found.by_kind().items()},
        "estimate_step_ms": times.total * 1e3,
        "estimate_attention_kernels_ms": times.kernels * 1e3,
        "loops_counted_once": found.unknown_loops,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
