"""The fused attention kernels compiled for TPUs, without one: `python benchmarks/flash_tpu.py`.

Compiles value and gradient of attention alone, and the accumulation program of a two-layer Llama,
with libtpu (`pip install 'jax[tpu]'`), and prints a table: whether the TPU compiler accepts it, its
memory, and the pairs of blocks that each way computes on rows of preference pairs, which is exact
arithmetic on the plan. Nothing is run, so no speed is measured. --quick: few shapes, for the test.
"""

import importlib.util
import os
import sys
import time
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run: no chip to lock
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # quietens libtpu, changes nothing
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from saro_jax.models import flash
from saro_jax.models.architecture import from_hf
from saro_jax.models.attention import SMALL, Tokens, attend
from saro_jax.parallel import mesh as meshes

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# name: query heads, key heads, head width
HEADS = {"Llama 8B": (32, 8, 128), "SmolLM2": (9, 3, 64)}
FAR = 2**30


def mesh_of(chip: str, tensor: int = 1) -> Any:
    """A mesh over the four chips of one host."""
    devices = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices
    return meshes.make_mesh(tensor=tensor, devices=devices)


def compiled(mesh, function, *arguments):
    """(program, seconds), or (the compiler's first line, seconds)."""
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            program = jax.jit(function).lower(*arguments).compile()
    except Exception as error:  # whatever the compiler says is the finding
        return str(error).splitlines()[0][:120], time.perf_counter() - start
    return program, time.perf_counter() - start


def attention_line(chip: str, name: str, length: int, rows: int, dtype: str, kernel: Any) -> str:
    mesh = mesh_of(chip)
    N, K, H = HEADS[name]
    place = NamedSharding(mesh, P(("data", "fsdp")))
    total = rows * 4

    def struct(shape, kind) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    arrays = [struct((total, length, n, H), jnp.dtype(dtype)) for n in (N, K, K)]
    ids: Any = Tokens(*[struct((total, length), jnp.int32)] * 3)

    def loss(q, k, v, tokens):
        return attend(q, k, v, tokens, FAR, H**-0.5, kernel=kernel).astype(jnp.float32).sum()

    program: Any
    program, seconds = compiled(mesh, jax.value_and_grad(loss, (0, 1, 2)), *arrays, ids)
    shape = f"| {chip} | {name} | {rows} x {length} | {dtype} | {kernel} "
    if isinstance(program, str):
        return f"{shape}| refused: {program} | | |"
    memory = program.memory_analysis()
    calls = program.as_text().count('custom_call_target="tpu_custom_call"')
    return (
        f"{shape}| {calls} kernels, {seconds:.0f} s | {memory.temp_size_in_bytes / 2**20:.0f} | "
        f"{memory.peak_memory_in_bytes / 2**20:.0f} |"
    )


def step_line(chip: str, remat: str, kernel: str, tensor: int = 1) -> str:
    """The accumulation program of a two-layer Llama of 8B shape, SRPO on one row a chip."""
    from saro_jax.config import Config
    from saro_jax.data.packing import Rows
    from saro_jax.models import decoder
    from saro_jax.objectives.preference import SEGMENTS
    from saro_jax.parallel import sharding
    from saro_jax.training import step

    arch = from_hf(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0, "tie_word_embeddings": False,
        }
    )  # fmt: skip
    mesh = mesh_of(chip, tensor)
    config = Config.model_validate(
        {"data": {"train": "x"}, "model": {"remat": remat, "attention": kernel}}
    )
    B, T, S, slots = 4 // tensor, 4096, 2048, 4
    place = NamedSharding(mesh, P(("data", "fsdp")))

    def struct(shape, dtype, sharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    sizes = {"tokens": T, "segment": T, "branch": T, "position": T}
    sizes |= dict.fromkeys(("item", "weight", "noise", "label"), slots)
    kinds = dict.fromkeys(("weight", "noise", "label"), jnp.float32) | {"valid": jnp.bool_}
    rows = Rows(
        **{
            name: struct((B, sizes.get(name, S)), kinds.get(name, jnp.int32), place)
            for name in Rows._fields
        }
    )
    places = sharding.shardings(mesh, decoder.abstract_params(arch))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        decoder.abstract_params(arch),
        places,
    )
    programs = step.programs(arch, config, "srpo", None)  # pyright: ignore[reportArgumentType]
    whole = NamedSharding(mesh, P())
    arguments = (
        params,
        params,
        rows,
        step.Given(
            struct((B, slots, 2, SEGMENTS), jnp.float32, place),
            struct((B, slots), jnp.int32, place),
            struct((), jnp.float32, whole),
        ),
        struct((), jnp.float32, whole),
    )
    program: Any
    program, seconds = compiled(mesh, programs.accumulate, *arguments)
    shape = f"| {chip} | {remat} | {kernel} | {tensor} "
    if isinstance(program, str):
        return f"{shape}| refused: {program} | | |"
    memory, text = program.memory_analysis(), program.as_text()
    calls = text.count('custom_call_target="tpu_custom_call"')
    return (
        f"{shape}| {calls} kernels, {seconds:.0f} s | {memory.temp_size_in_bytes / 2**30:.2f} | "
        f"{memory.peak_memory_in_bytes / 2**30:.2f} |"
    )


def pairs_row(length: int, items: list[tuple[int, ...]]) -> Tokens:
    """One row of items (prefix, branch, ...), lengths in tokens."""
    found = np.zeros((3, 1, length), np.int32)
    at = 0
    for segment, (prefix, *branches) in enumerate(items, 1):
        for branch, size in enumerate((prefix, *branches)):
            here = slice(at, at + size)
            found[0, 0, here], found[1, 0, here] = segment, branch
            found[2, 0, here] = (prefix if branch else 0) + np.arange(size)
            at += size
    assert at <= length
    return Tokens(*(jnp.asarray(x) for x in found))


def area_lines() -> list[str]:
    """Scores per head that each way computes on one row: what the products cost."""
    lines = []
    for title, length, items in (
        ("1 pair, cut in the middle: 1536 + 2 x 1280", 4096, [(1536, 1280, 1280)]),
        ("4 pairs: 384 + 2 x 320 each", 4096, [(384, 320, 320)] * 4),
        ("16 pairs: 96 + 2 x 80 each", 4096, [(96, 80, 80)] * 16),
        ("1 prompt, 8 samples: 512 + 8 x 448", 4096, [(512, *[448] * 8)]),
        ("uneven: 700 + 900 + 300, 250 + 500 + 640, 420 + 200 + 180", 4096,
         [(700, 900, 300), (250, 500, 640), (420, 200, 180)]),
    ):  # fmt: skip
        tokens = pairs_row(length, items)
        exact = sum(
            p * (p + 1) // 2 + sum(b * p + b * (b + 1) // 2 for b in bs) for p, *bs in items
        )
        separate = sum((p + b) * (p + b + 1) // 2 for p, *bs in items for b in bs)
        cells = []
        for blocks in (flash.Blocks(256, 512), flash.Blocks(256, 256), flash.Blocks(128, 128)):
            steps = jax.jit(flash.plan, static_argnums=2)(tokens, jnp.asarray(FAR), blocks)
            cells.append(int(steps.count) * blocks.query * blocks.key / exact)
        block = SMALL
        start = np.zeros(length, int)
        segment = np.asarray(tokens.segment[0])
        for s in range(1, segment.max() + 1):
            start[segment == s] = np.flatnonzero(segment == s)[0]
        start[segment == 0] = np.arange(length)[segment == 0]
        first = start.reshape(-1, block).min(1) // block
        xla = (np.arange(len(first)) + 1 - first).sum() * block * block / exact
        gathered = sum(
            sum((-(-(p + b) // 512) * 512) * (-(-(p + b) // 512) * 512 + 512) / 2 for b in bs)
            for p, *bs in items
        )
        causal = length * (length + 256) / 2 / exact
        lines.append(
            f"| {title} | {exact / 1e6:.2f} | {cells[0]:.2f} | {cells[1]:.2f} | {cells[2]:.2f} | "
            f"{xla:.2f} | {separate / exact:.2f} | {gathered / exact:.2f} | {causal:.2f} |"
        )
    return lines


def main() -> None:
    if importlib.util.find_spec("libtpu") is None:
        print("benchmarks/flash_tpu.py: needs libtpu, without a TPU too: pip install 'jax[tpu]'")
        return
    say = partial(print, flush=True)
    quick = "--quick" in sys.argv[1:]
    say(f"jax {jax.__version__}, compiled only\n")
    if not quick:
        say("Scores computed, as a multiple of the visible ones (millions a head)\n")
        say(
            "| row of 4096 tokens | visible | flash 256 x 512 | 256 x 256 | 128 x 128 | xla 128 "
            "| separate rows, exact | a row a branch, 512 | causal only |\n" + "|---" * 9 + "|"
        )
        for line in area_lines():
            say(line)
        say("")
    say("| chip | heads | rows x tokens a chip | dtype | attention | accepted | temporaries, MiB | "
        "peak, MiB |\n" + "|---" * 8 + "|")  # fmt: skip
    for chip in ("v5e", "v5p"):
        say(attention_line(chip, "SmolLM2", 4096, 2, "bfloat16", "flash"))
    if quick:
        return
    for chip in CHIPS:
        for kernel in ("flash", "xla"):
            say(attention_line(chip, "Llama 8B", 4096, 2, "bfloat16", kernel))
    say(attention_line("v5e", "SmolLM2", 4096, 2, "bfloat16", "xla"))
    say(attention_line("v5e", "Llama 8B", 4096, 2, "float32", "flash"))
    for chip, length in (("v5e", 32768), ("v5p", 32768)):
        say(attention_line(chip, "Llama 8B", length, 1, "bfloat16", "flash"))
    say("\n| chip | remat | attention | mesh.tensor | two layers, accumulate | temporaries, GiB | "
        "peak, GiB |\n" + "|---" * 7 + "|")  # fmt: skip
    for remat in ("dots", "full"):
        for kernel in ("auto", "xla"):
            say(step_line("v5p", remat, kernel))
    say(step_line("v5e", "full", "auto"))
    say(step_line("v5p", "dots", "flash", tensor=2))


if __name__ == "__main__":
    main()
