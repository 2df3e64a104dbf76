"""The memory of a training step: a formula, the device's, and what would save most."""

import os
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saro_jax.config import Config
from saro_jax.data.packing import Shape
from saro_jax.generation.engine import prompts_at_once
from saro_jax.generation.programs import sizes
from saro_jax.models import decoder
from saro_jax.models.architecture import Architecture
from saro_jax.objectives.logprobs import CHUNK
from saro_jax.parallel import mesh as meshes
from saro_jax.training import trainable
from saro_jax.training.finding import Finding

GIB = 2**30


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: float
    moments: float
    gradients: float
    activations: float
    head: float
    answers: float
    process: float

    @property
    def total(self) -> float:
        return sum(self)


class Answering(NamedTuple):
    """What a run with `train.answers` decodes: answers at a time, over all devices, and the tokens
    of the longest, its prompt included."""

    slots: int
    tokens: int


def estimate(
    config: Config,
    stage: str,
    arch: Architecture,
    shape: Shape,
    mesh: Mesh | None = None,
    answering: Answering | None = None,
) -> Memory:
    """Peak bytes of training on one device, by a formula.

    weights      of the trained and the frozen leaves in their dtypes; the trained ones twice with
                 a resident reference
    moments      8 n (AdamW), n = trained parameters; float32
                 with optimizer.offload (not on a CPU, which is the host) they come for the update
                 only, when there are no activations: what does not fit in their place counts
    gradients    4 n, the float32 sum of the step, which the backward pass adds to; with bfloat16
                 weights 8 n: the block's own too, and their float32 copy
    activations  t tokens of a block: what the remat policy keeps of each of L layers, and one
                 layer's working set in float32
    head         three float32 chunks of logits, the output matrix in the compute dtype, and its
                 float32 gradient twice
    answers      what answering needs (`_answering`) above gradients, activations and head, in the
                 place of which it comes
    process      on a CPU 0.5 GiB of Python, libraries and compiled programs
    Parameters are divided by mesh.fsdp x mesh.sequence x mesh.tensor, t by the shards of rows and
    of their tokens. Fragmentation is
    left out. docs/doctor.md compares with the compiler's figures and with measurements.
    """
    learning, frozen = (jax.tree.leaves(tree) for tree in trainable.abstract(arch, config))
    trained = sum(leaf.size for leaf in learning)
    width, compute = (jnp.dtype(d).itemsize for d in (config.model.param_dtype, config.model.dtype))
    parts = meshes.weight_shards(mesh) if mesh is not None else 1
    shards = meshes.row_shards(mesh) * mesh.shape["sequence"] if mesh is not None else 1
    tokens = shape.rows * shape.row_length / shards
    copies = 2 if stage == "srpo" and config.srpo.reference == "resident" else 1
    D, F, V = arch.hidden_size, arch.intermediate_size, arch.vocab_size
    N, K = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    cpu = jax.default_backend() == "cpu"
    unnamed = 4 if cpu else compute  # XLA's CPU code widens what models/remat.py does not store
    kept = {
        "full": D * compute,
        "attention": (D + N) * compute + 4 * arch.num_heads,
        "dots": (D + 2 * N + 2 * K + 2 * F) * compute + 4 * arch.num_heads,
        "none": (4 * D + 2 * N + 2 * K + 2 * F) * unnamed + (4 * F + 2 * D) * 4,
    }[config.model.remat]
    working = (4 * D + 2 * N + 2 * K + 4 * F) * 4
    read_only = sum(leaf.size * leaf.dtype.itemsize for leaf in frozen)
    chunk = min(CHUNK, max(1, int(tokens)))
    moments = (8 if config.optimizer.name == "adamw" else 0) * trained / parts
    activations = tokens * (arch.num_layers * kept + working)
    head = 3 * chunk * V * 4 + V * D * (compute + 8) / parts
    gradients = trained * (4 if width == 4 else 8) / parts
    if config.optimizer.offload and not cpu:
        moments = max(0.0, moments - activations - head)
    answers = 0.0
    if answering is not None:
        steps = gradients + activations + head + (moments if config.optimizer.offload else 0)
        answers = max(0.0, _answering(config, arch, mesh, answering) - steps)
    return Memory(
        weights=(copies * trained * width + read_only) / parts,
        moments=moments,
        gradients=gradients,
        activations=activations,
        head=head,
        answers=answers,
        process=GIB / 2 if cpu else 0,
    )


def _answering(
    config: Config, arch: Architecture, mesh: Mesh | None, answering: Answering
) -> float:
    """Bytes on one device beside weights and moments while the model answers.

    The matrices in the compute dtype, where they are not (adapters are added to all of them at
    most), and on one CPU device once more, layer by layer; keys and values, twice while they grow;
    a prefill's working set and the logits of all slots, in float32 twice.
    """
    parts = meshes.weight_shards(mesh) if mesh is not None else 1
    rows = meshes.row_shards(mesh) if mesh is not None else 1
    compute = jnp.dtype(config.model.dtype).itemsize
    cpu = jax.default_backend() == "cpu"
    cast = config.model.param_dtype != config.model.dtype or config.lora.rank > 0
    copies = int(cast) + int(cpu and (mesh is None or mesh.size == 1))
    N, K = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    slots, tokens = answering.slots / rows, sizes(answering.tokens)
    tensor = mesh.shape["tensor"] if mesh is not None else 1
    heads = tensor if arch.num_kv_heads % tensor == 0 else 1
    cache = 2 * arch.num_layers * K * slots * tokens * (4 if cpu else compute) / heads
    prompts = prompts_at_once(answering.slots, mesh, jax.default_backend()) / rows
    working = (4 * arch.hidden_size + 2 * N + 2 * K + 4 * arch.intermediate_size) * 4
    prefill = prompts * tokens * working
    logits = 2 * 4 * slots * arch.vocab_size
    return copies * compute * parameters(arch) / parts + 2 * cache + max(prefill, logits)


def memory(
    config: Config,
    stage: str,
    arch: Architecture,
    shape: Shape,
    mesh: Mesh | None,
    available: int,
    answering: Answering | None = None,
) -> list[Finding]:
    """The estimate against `available` bytes of the device, with the largest saving."""
    need = estimate(config, stage, arch, shape, mesh, answering)
    parts = ", ".join(
        f"{name} {value / GIB:.2f}" for name, value in need._asdict().items() if value > 0
    )
    found = (
        f"needs about {need.total / GIB:.2f} GiB of {available / GIB:.1f} GiB on each device "
        f"({parts})"
    )
    share = need.total / available
    if share <= 0.85:
        return [Finding("ok", "memory", found)]
    remedy = _savings(config, stage, arch, shape, mesh, answering, need)
    return [Finding("error" if share > 1 else "warning", "memory", found, remedy)]


def _savings(config: Config, stage, arch, shape: Shape, mesh, answering, need: Memory) -> str:
    """What would lower the estimate, the largest saving first."""
    total = need.total
    changes: list[tuple[str, Config, Shape]] = []

    def changed(**update: str) -> Config:
        return config.model_copy(update={"model": config.model.model_copy(update=update)})

    if config.model.param_dtype != "bfloat16":
        changes.append(("model.param_dtype=bfloat16", changed(param_dtype="bfloat16"), shape))
    if config.model.remat != "full":
        changes.append(("model.remat=full", changed(remat="full"), shape))
    shards = meshes.row_shards(mesh) if mesh is not None else 1
    if shape.rows > shards:
        option = f"train.micro_rows={shards}"
        changes.append((option, config, shape._replace(rows=shards)))
    half = max(config.data.max_length, shape.row_length // 2)
    if half < shape.row_length:
        option = f"data.row_length={half}"
        changes.append((option, config, shape._replace(row_length=half)))
    saved = [
        (total - estimate(new, stage, arch, some, mesh, answering).total, option)
        for option, new, some in changes
    ]
    saved.append((need.answers, "train.answers=null"))
    if not config.lora.rank:
        width = jnp.dtype(config.model.param_dtype).itemsize
        saved.append(
            (0.98 * parameters(arch) * (width + (12 if width == 4 else 14)), "LoRA (lora.rank=16)")
        )
    named = [
        f"{option} saves {save / GIB:.2g} GiB"
        for save, option in sorted(saved, reverse=True)
        if save > 0.02 * total
    ]
    return ", ".join([*named, "more devices (mesh.fsdp)"])


def device_memory() -> int:
    """Bytes of the first device here; on a CPU those of the machine or of its container."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def peak_memory() -> int:
    """The most bytes the first device here held so far; on a CPU, the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    # Linux counts KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parameters(arch: Architecture) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract_params(arch)))
