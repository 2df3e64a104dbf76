"""Owns the comparison of a training step on eight devices with the same on a single device.

Run as a program it needs eight devices, which `run` gives it:
`python sharded.py '[["difference", "llama", "fsdp", "rw", "shared", 0], ...]'`, a function of this
file and its arguments a case; it prints each result as a line of JSON.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny
from jax.sharding import NamedSharding

from saro_jax.config import Config
from saro_jax.data.packing import Shape, pack
from saro_jax.generation import engine, sampling
from saro_jax.models.architecture import Architecture, from_hf
from saro_jax.parallel import mesh as meshes
from saro_jax.parallel import sharding
from saro_jax.training import loop, step, trainable

WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24} | WINDOWS
# `tiny`'s model as each family; 8 heads, so that mesh.tensor x mesh.sequence may be 8.
WIDE = {"num_attention_heads": 8, "vocab_size": 304}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 24, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "attention_bias": False},
    # A vocabulary that divides by mesh.tensor and by no product with more.
    "gemma2": {"model_type": "gemma2", "vocab_size": 300, "final_logit_softcapping": 20.0} | GEMMA,
    "gemma3": {"model_type": "gemma3_text", "rope_local_base_freq": 1e3} | GEMMA,
    # Three key heads for twelve query heads, and a vocabulary that divides by no mesh.tensor.
    "uneven": {"model_type": "qwen3", "vocab_size": 303, "attention_bias": False}
    | {"num_attention_heads": 12, "num_key_value_heads": 3},
}
MESHES: dict[str, dict[str, Any]] = {
    "fsdp": {"fsdp": 8},
    "data-fsdp-tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp-tensor": {"fsdp": 2, "tensor": 4},  # more shards than key heads
    "sequence": {"fsdp": 2, "sequence": 4},
    "fsdp-sequence-tensor": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "slice-data-sequence": {"slice": 2, "data": 2, "fsdp": 1, "sequence": 2},
}
ROWS, LENGTH = 8, 128


def architecture(family: str) -> Architecture:
    return from_hf(tiny.CONFIG | WIDE | FAMILIES[family])


def config(loss: str, rank: int = 0) -> Config:
    parts: dict[str, Any] = {
        "data": {"train": "x"},
        "model": {"dtype": "float32", "remat": "attention"},
        "lora": {"rank": rank} | ({"targets": "all"} if rank else {}),
    }
    return Config.model_validate(parts | ({} if loss == "rw" else {"srpo": {"loss": loss}}))


def start(family: str, mesh: Any, settings: Config) -> tuple[Any, Any]:
    """Trained and frozen parameters, where the table puts them."""
    arch = architecture(family)
    places = sharding.shardings(mesh, step.abstract_params(arch, jnp.float32))
    params = jax.device_put(tiny.params(0, arch), places)
    trained, frozen = trainable.start(arch, settings, params, mesh)
    if settings.lora.rank:  # a B that is not 0, nor the same for all tokens: A has a gradient
        trained = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.shape[-1])), trained)
    return trained, frozen


def one_step(
    family: str, mesh: Any, loss: str, layout: str, rank: int
) -> tuple[dict[str, float], Any]:
    """Means and gradients of one block of packed rows on a mesh."""
    settings, stage = config(loss, rank), "rw" if loss == "rw" else "srpo"
    items = tiny.items("sft" if stage == "rw" else "preference")
    (block,) = pack(items, range(len(items)), **Shape(LENGTH, ROWS, layout)._asdict())
    trained, frozen = start(family, mesh, settings)
    programs = step.programs(architecture(family), settings, stage, optax.identity())
    reference = tiny.segments(np.full((8, 2), -40.0, np.float32)) if stage == "srpo" else None
    with jax.set_mesh(mesh):
        gradients = loop.Gradients(programs, trained, frozen)
        sums = loop.run_blocks(mesh, stage, [block], reference, gradients.add)
    return loop.summarise(stage, jax.device_get(sums)), gradients.sum


@cache
def alone(family: str, loss: str, layout: str, rank: int) -> tuple[dict[str, float], Any]:
    """`one_step` on a single device."""
    return one_step(family, meshes.make_mesh(devices=jax.devices()[:1]), loss, layout, rank)


def difference(family: str, mesh: str, loss: str, layout: str, rank: int) -> float:
    """Largest relative difference of loss, metrics and gradients (of a leaf's largest entry)."""
    want_means, want = alone(family, loss, layout, rank)
    means, got = one_step(family, meshes.make_mesh(**MESHES[mesh]), loss, layout, rank)
    worst = max(abs(means[k] - v) / max(abs(v), 1e-2) for k, v in want_means.items())
    for a, b in zip(*map(jax.tree.leaves, (want, got)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.isfinite(b).all() and np.abs(a).max() > 0
        worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
    return worst


def compiled(family: str, mesh: Any, loss: str, rows: int, length: int) -> dict[str, Any]:
    """The compiled programs of a step of one block, by name."""
    arch, settings = architecture(family), config(loss)
    stage = "rw" if loss == "rw" else "srpo"
    branches = (40, 30) if stage == "srpo" else (60,)
    items = [tiny.item(i, 20, *branches) for i in range(rows)]
    block = next(pack(items, range(rows), row_length=length, rows=rows, layout="shared"))
    trained, _ = start(family, mesh, settings)
    optimizer = optax.adam(1e-3)
    state = step.init_state(optimizer, trained, mesh)
    programs = step.programs(arch, settings, stage, optimizer)
    with jax.set_mesh(mesh):
        zeros = programs.zeros.lower(trained).compile()
        gradients = zeros(trained)

        def accumulate(*block):
            draw = np.zeros(2, np.int32)
            return programs.accumulate.lower(trained, gradients, *block, {}, draw).compile()

        (found,) = loop.run_blocks(mesh, stage, [block], None, accumulate)
        update = programs.update.lower(state, gradients).compile()
    return {"zeros": zeros, "accumulate": found, "update": update}


def misplaced(family: str, mesh: str, loss: str) -> list[str]:
    """What the compiled programs of a step do not cut as the table says.

    Gradients, parameters and moments by the programs' results; activations by every array that the
    program of the gradients computes: none has more entries than what is kept of all layers, or
    than the logits, of one device's own tokens. And by memory: what a single device needs beside
    the results, divided by the parts that rows and tokens are cut into, and at most a third more.
    """
    rows, length = 16, 256
    single = meshes.make_mesh(devices=jax.devices()[:1])
    many = meshes.make_mesh(**MESHES[mesh])
    found = compiled(family, many, loss, rows, length)
    one = compiled(family, single, loss, rows, length)["accumulate"]
    arch, wrong = architecture(family), []
    tree = step.abstract_params(arch, jnp.float32)
    moments = jax.eval_shape(optax.adam(1e-3).init, tree)
    gradients, _ = found["accumulate"].output_shardings
    state, _ = found["update"].output_shardings
    for what, shapes, places in (
        ("zeros", tree, found["zeros"].output_shardings),
        ("gradients", tree, gradients),
        ("parameters", tree, state.params),
        ("moments", moments, state.optimizer),
    ):
        leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
        for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True):
            name = sharding.path_name(path)
            table = sharding.spec(name, leaf.shape, many.shape)
            if not place.is_equivalent_to(NamedSharding(many, table), leaf.ndim):
                wrong.append(f"{what} {name} {leaf.shape}: {place}, not {table}")
    text = found["accumulate"].as_text()
    cut, tensor = meshes.row_shards(many) * many.shape["sequence"], many.shape["tensor"]
    heads = arch.num_heads * arch.head_dim // tensor
    vocabulary = arch.vocab_size // (1 if arch.vocab_size % tensor else tensor)
    widest = max(arch.num_layers * max(arch.hidden_size, heads), vocabulary)
    for shape in sorted(set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))):
        if np.prod([int(size) for size in shape.split(",")]) > rows * length // cut * widest:
            wrong.append(f"an array of shape [{shape}] is not cut")
    programs = (found["accumulate"], one)
    needs, whole = (program.memory_analysis().temp_size_in_bytes for program in programs)
    if needs > whole / cut * 4 / 3:
        wrong.append(f"{needs} bytes of temporaries, {whole} on a single device")
    return wrong


def sampled(family: str, mesh: str) -> list[Any]:
    """[whether the tokens are those of one device, largest difference of log-probs, what is whole].

    Whole is what of the cache every device of the rows' axes would hold.
    """
    arch = architecture(family)
    params = tiny.params(0, arch)
    rng = np.random.default_rng(0)
    jobs = [
        engine.Job(
            rng.integers(3, arch.vocab_size, n).astype(np.int32),
            20 - i,
            sampling.Sampling(float(i % 2), 0.9, 50 * (i % 3)),
            seed=i,
            numbers=range(1 + i % 3),
        )
        for i, n in enumerate((5, 70, 1, 33, 12, 64, 9))
    ]
    many = meshes.make_mesh(**MESHES[mesh])
    single = engine.Engine(arch, params, slots=8, stop_ids=[2], unroll=False)
    params = jax.device_put(params, sharding.shardings(many, params))
    several = engine.Engine(arch, params, slots=8, stop_ids=[2], mesh=many)
    (want, got) = ({id(job): found for job, found in one.run(jobs)} for one in (single, several))
    pairs = [p for job in jobs for p in zip(want[id(job)], got[id(job)], strict=True)]
    same = all(np.array_equal(a.ids, b.ids) for a, b in pairs)
    worst = max(float(np.abs(a.logps - b.logps).max()) for a, b in pairs) if same else 1.0
    shard = several._cache.k.sharding.shard_shape(several._cache.k.shape)
    return [same, worst, shard[1] * meshes.row_shards(many) != several.slots]


def run(cases: list[tuple[Any, ...]]) -> list[Any]:
    """The results of the cases, all computed by one child process with eight devices."""
    child = run_child([str(Path(__file__)), json.dumps(cases)])
    return [json.loads(line) for line in child.stdout.splitlines()]


def run_child(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A Python process with eight CPU devices that finds the tests' modules."""
    child = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    # The partitioner says so where it has to gather activations whole.
    assert "Involuntary full rematerialization" not in child.stderr, child.stderr[:2000]
    return child


if __name__ == "__main__":
    for function, *arguments in json.loads(sys.argv[1]):
        print(json.dumps(globals()[function](*arguments)), flush=True)
