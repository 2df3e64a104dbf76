"""What the benchmarks share: the machine, its ceilings, timed steps on random weights, tables.

`python benchmarks/harness.py` prints the ceilings of this machine as JSON. Only the standard
library is imported at the top: JAX takes its backend from the environment of whoever calls.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Wherever a benchmark is started from, it measures the saro_jax of its own checkout.
sys.path.insert(0, str(ROOT))

SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# A body of seconds to compile and milliseconds to run: for `--small`, that is for the tests.
MINIATURE = SMOLLM2_135M | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# ---- machine and tables --------------------------------------------------------------------------


def cpu() -> str:
    """Name and number of the processors this process may use; whether they have bfloat16."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = value
    except OSError:
        pass
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags.split()]
    return f"{cores()} x {name}" + (f" ({', '.join(bf16)})" if bf16 else "")


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float:
    """Memory of the machine, 1e9 bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def versions() -> dict[str, str]:
    """Versions of what runs saro_jax."""
    from saro_jax.config import provenance

    found = {k: v for k, v in provenance().items() if k in ("saro_jax", "jax", "git_commit") and v}
    return {"python": platform.python_version()} | {k: str(v)[:12] for k, v in found.items()}


def named(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with three significant digits."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return str(value)

    lines = [list(head), ["---"] * len(head), *([cell(v) for v in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(out: Path, name: str, text: str, record: dict[str, Any]) -> None:
    """`text` as NAME.md and `record` as NAME.json in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# ---- ceilings ------------------------------------------------------------------------------------


def fastest(run: Callable[[], Any], seconds: float = 1.0) -> float:
    """Shortest duration of `run`, after one call that does not count, in about `seconds`."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        run()
        best = min(best, time.perf_counter() - start)
    return best


def copy_bandwidth(gib: float = 1.0) -> float:
    """GB/s (1e9, read and written) of copying a large numpy array on all cores."""
    import numpy as np

    count = cores()
    source = np.ones((count, int(gib * 2**30) // count), np.uint8)
    target = np.zeros_like(source)
    with ThreadPoolExecutor(count) as pool:
        seconds = fastest(lambda: list(pool.map(np.copyto, target, source)))
    return 2 * source.nbytes / seconds / 1e9


def matmul_speed(dtype: str, rows: int = 1024, inner: int = 576, columns: int = 1536) -> float:
    """GFLOP/s of XLA on [rows, inner] x [inner, columns] with float32 results."""
    import jax
    import jax.numpy as jnp

    a, b = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    seconds = fastest(lambda: [product(a, b) for _ in range(8)][-1].block_until_ready()) / 8
    return 2 * rows * inner * columns / seconds / 1e9


def decode_speed(batch: int = 16, slots: int = 256) -> float:
    """Tokens/s of saro_jax's own decode step with logits, float32, in the shape of SmolLM2-135M."""
    import decode_cpu
    import jax
    import jax.numpy as jnp

    from saro_jax.models import decoder
    from saro_jax.models.architecture import from_hf

    arch = from_hf(SMOLLM2_135M)
    params = decoder.init_params(arch, jax.random.key(0))
    run = decode_cpu.prepare(arch, params, batch, slots, jnp.float32, True)
    return batch * decode_cpu.STEPS / fastest(run, 3.0)


def matrix_parameters(hf: dict[str, Any]) -> tuple[int, int]:
    """Parameters that a token is multiplied with: of the layers, of the head."""
    D, F, N = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"]
    H = hf.get("head_dim", D // N)
    attention = 2 * D * H * (N + hf["num_key_value_heads"])
    return hf["num_hidden_layers"] * (attention + 3 * D * F), hf["vocab_size"] * D


def ceilings() -> dict[str, float]:
    """What this machine could do: copies, products, and decoding bounded by either of them."""
    found = {"copy_gb_s": copy_bandwidth()}
    for dtype in ("bfloat16", "float32"):
        found[f"xla_{dtype}_gflop_s"] = matmul_speed(dtype)
    found["decode_tokens_s"] = decode_speed()
    # A decode step of 16 reads every matrix once and multiplies it with 16 tokens.
    parameters = sum(matrix_parameters(SMOLLM2_135M))
    read = 16 * found["copy_gb_s"] / (4e-9 * parameters)
    multiply = found["xla_float32_gflop_s"] / (2e-9 * parameters)
    return found | {"decode_ceiling_tokens_s": min(read, multiply)}


# ---- training steps on random weights ------------------------------------------------------------


def settings(**sections: dict[str, Any]) -> Any:
    """The config of a run on random weights and synthetic rows."""
    from saro_jax.config import Config

    tree = {"data": {"train": "synthetic"}, "optimizer": {"learning_rate": 1e-6}}
    tree |= {name: tree.get(name, {}) | values for name, values in sections.items()}
    return Config.model_validate(tree)


def synthetic_items(
    count: int, prefix: int, *branches: int, vocabulary: int, unscored: int = 0
) -> list[Any]:
    """Items of random ids, each with `branches` of these lengths behind a common prefix."""
    import numpy as np

    from saro_jax.data.tokenise import Branch, Item

    rng = np.random.default_rng(0)

    def ids(n: int) -> Any:
        return rng.integers(3, vocabulary, n).astype(np.int32)

    def parts() -> tuple[Branch, ...]:
        return tuple(Branch(ids(n), np.arange(n) >= unscored, False) for n in branches)

    return [
        Item(f"i{k}", f"synthetic:{k + 1}", "synthetic", 1.0, ids(prefix), parts())
        for k in range(count)
    ]


def time_steps(
    hf: dict[str, Any], config: Any, stage: str, items: list[Any], shape: Any, steps: int
) -> dict[str, Any]:
    """Optimizer steps on random weights of the shape `hf`, all `items` in each of them.

    Seconds of a step (median of `steps`, after two) and of the first with its compilation; tokens
    of a step: of all branches (`sequence`), without padding (`real`), padded, scored; `keys` that
    the real tokens attend to; and the devices' peak memory where they tell it.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from saro_jax.data.packing import pack
    from saro_jax.models import decoder
    from saro_jax.models.architecture import from_hf
    from saro_jax.parallel import mesh as meshes
    from saro_jax.parallel import sharding
    from saro_jax.training import loop, optimizer, step, trainable

    arch, mesh = from_hf(hf), meshes.make_mesh()
    blocks = list(pack(items, range(len(items)), **shape._asdict()))
    dtype = jnp.dtype(config.model.param_dtype)

    def draw(key):
        return jax.tree.map(lambda x: x.astype(dtype), decoder.init_params(arch, key))

    layout = sharding.shardings(mesh, step.abstract_params(arch, dtype))
    params = jax.jit(draw, out_shardings=layout)(jax.random.key(0))
    params, frozen = trainable.start(arch, config, params, mesh)
    transform = optimizer.make(config.optimizer, steps + 2, config.lora)
    state = step.init_state(transform, params, mesh)
    del params
    programs = step.programs(arch, config, stage, transform)
    seconds = []
    with jax.set_mesh(mesh):
        for _ in range(steps + 2):
            start = time.perf_counter()
            gradients = loop.Gradients(programs, state.params, frozen)
            sums = loop.run_blocks(mesh, stage, blocks, None, gradients.add)
            state, norm = programs.update(state, gradients.sum)
            norm["grad_norm"].block_until_ready()
            seconds.append(time.perf_counter() - start)
    loss = float(sum(float(block["loss"]) for block in sums))
    if not np.isfinite(loss):
        raise ValueError(f"{stage} on random weights: the loss is {loss}")
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds": statistics.median(seconds[2:]),
        "first_seconds": seconds[0],
        "sequence": sum(loop.sequence_tokens(item) for item in items),
        "real": sum(int((block.segment > 0).sum()) for block in blocks),
        "padded": sum(block.tokens.size for block in blocks),
        "scored": sum(int(block.valid.sum()) for block in blocks),
        # In every layout a token attends to the tokens before it in its own sequence.
        "keys": sum(int(((block.position + 1) * (block.segment > 0)).sum()) for block in blocks),
        "blocks": len(blocks),
        "peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9,
    }


def training_flops(hf: dict[str, Any], counted: dict[str, Any], frozen: bool = False) -> float:
    """FLOPs the model needs for a step: no recomputation, no padding.

    Every real token: 6 x the layers' matrices (2 forward, 2 for its gradient, 2 for the matrix's).
    Every scored token: 6 x the head. Attention: 2 products forward and 4 backward of 2 x heads x
    head_dim FLOPs for each key that a token attends to. frozen (LoRA): no gradient of the
    matrices, so 4 in place of 6; the adapters' own FLOPs, about 1 %, are not counted.
    """
    body, head = matrix_parameters(hf)
    N = hf["num_attention_heads"]
    H = hf.get("head_dim", hf["hidden_size"] // N)
    products = (4 if frozen else 6) * (body * counted["real"] + head * counted["scored"])
    return products + 12 * hf["num_hidden_layers"] * N * H * counted["keys"]


if __name__ == "__main__":
    print(json.dumps(ceilings()))
