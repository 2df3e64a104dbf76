"""The programs of a stage with abstract arguments: ready to compile, without weights or rows."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saro_jax import config as configuration
from saro_jax.config import Config
from saro_jax.data import packing, pipeline
from saro_jax.generation import engine, programs
from saro_jax.models import decoder, hub, huggingface
from saro_jax.models.architecture import Architecture, from_hf
from saro_jax.objectives.preference import SEGMENTS
from saro_jax.parallel import mesh as meshes
from saro_jax.parallel import sharding
from saro_jax.parallel.topologies import Topology
from saro_jax.training import optimizer, scoring, step, trainable
from saro_jax.training.flops import Work, model_flops


@dataclass(frozen=True)
class Program:
    """One jitted program, its abstract arguments, and how often a step runs it."""

    name: str
    jitted: Any
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    times: int
    loops: Mapping[str, int]


@dataclass(frozen=True)
class Setup:
    """Everything of one check but the compiling."""

    config: Config
    stage: str
    arch: Architecture
    topology: Topology
    mesh: Mesh
    programs: tuple[Program, ...]
    parts: Mapping[str, float]  # bytes of a device: parameters, optimizer, gradients, cache
    work: Work  # of all rows of a step, on all devices
    model_flops: float  # of a step, on all devices
    rows: str  # in words
    area: float  # of one row, for the attention kernels
    row_length: int


def architecture(config: Config) -> Architecture:
    """The architecture of `model.path`: a folder's, a packaged shape's, or the Hub's."""
    path = config.model.path or hub.QUICKSTART
    if Path(path).is_dir():
        return huggingface.load_architecture(path)
    wanted = hub.QUICKSTART_HUB_ID if path == hub.QUICKSTART else path
    name = wanted.rpartition("/")[2].lower().removeprefix("meta-")
    folder = configuration.recipe_path("quickstart").parent / "models"
    for file in sorted(folder.glob("*.json"), reverse=True):
        if name == file.stem or name.startswith(f"{file.stem}-"):
            return from_hf(json.loads(file.read_text()), str(file))
    return huggingface.load_architecture(hub.resolve(path, config.model.revision))


def _work(row_length: int, longest: int, stage: str, layout: str) -> Work:
    """A row full of sequences of `longest` tokens, or of pairs (see compile_check.py)."""
    if stage in ("rw", "sample"):
        whole, rest = divmod(row_length, longest)
        area = whole * longest * (longest + 1) / 2 + rest * (rest + 1) / 2
        return Work(row_length, row_length, area)
    prefix = longest // 2
    branch = longest - prefix
    own = branch * (branch + 1) / 2 + branch * prefix
    before = prefix * (prefix + 1) / 2
    copies = 1 if layout == "shared" else 2
    length, area = copies * prefix + 2 * branch, copies * before + 2 * own
    share = row_length / length  # of pairs, also where no whole one fits
    return Work(row_length, round(2 * longest * share), area * share)


def _placed(mesh: Mesh, tree: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places,
    )


def _params(mesh: Mesh, tree: Any) -> Any:
    return _placed(mesh, tree, sharding.shardings(mesh, tree))


def _device_bytes(tree: Any) -> float:
    """Bytes of a placed tree on one device."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
            if leaf.sharding.memory_kind != sharding.HOST
        )
    )


def abstract_rows(mesh: Mesh, rows: int, length: int, slots: int) -> packing.Rows:
    """A block of packed rows without data, placed as `scoring.put` places it."""
    place = sharding.rows(mesh)

    def of(width: int, dtype: Any):
        return jax.ShapeDtypeStruct((rows, width), dtype, sharding=place)

    wide = {"weight": jnp.float32, "noise": jnp.float32, "label": jnp.float32, "item": jnp.int32}
    return packing.Rows(
        *(
            of(slots, wide[name])
            if name in wide
            else of(length, jnp.bool_ if name == "valid" else jnp.int32)
            for name in packing.Rows._fields
        )
    )


def prepare(
    config: Config,
    stage: str,
    topology: Topology,
    devices: Sequence[Any],
    blocks: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Setup:
    """The programs of a stage on abstract arrays; a ValueError where the config cannot run."""
    arch = architecture(config)
    mesh = meshes.make_mesh(**config.mesh.model_dump(), devices=devices)
    decoder.check_mesh(arch, mesh)
    if stage == "sample":
        return _sample(
            config, arch, topology, mesh, sizes or {"batch": 64, "prompt": 1024, "new": 512}
        )
    kind = "sft" if stage == "rw" else "unpaired" if config.srpo.loss == "kto" else "preference"
    length = pipeline.row_length(config.data, kind, mesh.shape["sequence"])
    shards, rows = meshes.row_shards(mesh), config.train.micro_rows
    if rows % shards:
        raise ValueError(
            f"train.micro_rows={rows}: must be a multiple of the {shards} shards that the mesh of "
            f"{topology.name} cuts rows into (mesh.data x mesh.fsdp)"
        )
    decoder.check_length(arch, config.data.max_length)
    layout = config.srpo.layout if stage != "rw" else "shared"
    one = _work(length, config.data.max_length, "rw" if kind != "preference" else stage, layout)
    if stage == "score":
        count, programs, parts = 1, *_score(config, arch, mesh, length)
    else:
        count = blocks or _blocks(config, stage, length, one)
        programs, parts = _train(config, stage, arch, mesh, length, count)
    computed = count * rows
    work = Work(*(value * computed for value in one))
    return Setup(
        config,
        stage,
        arch,
        topology,
        mesh,
        programs,
        parts,
        work,
        model_flops(arch, config, work, train=stage != "score"),
        f"{count} block{'s' * (count > 1)} of {rows} rows of {length} tokens "
        f"({rows * length // shards} a device)",
        one.area,
        length,
    )


def _blocks(config: Config, stage: str, length: int, one: Work) -> int:
    """Blocks that a step's rows fill where every sequence has data.max_length tokens."""
    own = config.data.max_length if stage == "rw" else config.data.max_length * 1.5
    return max(1, math.ceil(config.train.batch_rows * own / (length * config.train.micro_rows)))


def _scalar(mesh: Mesh, dtype: Any, shape: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _train(config: Config, stage: str, arch, mesh: Mesh, length: int, blocks: int):
    """Programs of a training step, and the bytes that it holds on a device."""
    rows_of, slots = config.train.micro_rows, packing.slots(length)
    trained, frozen = trainable.abstract(arch, config)
    trained = _params(mesh, trained)
    # Names of the full tree, for the table of rules to know the place of a leaf.
    frozen = _params(mesh, frozen)
    transform = optimizer.make(config.optimizer, 1000, config.lora)
    moments = _params(mesh, jax.eval_shape(transform.init, trained))
    if config.optimizer.offload:
        places = jax.tree.map(lambda leaf: leaf.sharding, moments)
        moments = _placed(mesh, moments, sharding.on_host(places, moments))
    resident = stage == "srpo" and config.srpo.reference == "resident"
    count: Any = _scalar(mesh, jnp.int32)
    state = step.State(count, trained, moments, trained if resident else ())
    gradients = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), trained
    )
    rows = abstract_rows(mesh, rows_of, length, slots)
    place = sharding.rows(mesh)
    unpaired = stage == "srpo" and config.srpo.loss == "kto"
    branches = 1 if unpaired else 2
    arrays: tuple[Any, ...] = (
        jax.ShapeDtypeStruct((rows_of, slots, branches, SEGMENTS), jnp.float32, sharding=place),
        jax.ShapeDtypeStruct((rows_of, slots), jnp.int32, sharding=place),
        _scalar(mesh, jnp.float32),
    )
    given = step.Given(*arrays)
    total, draw = _scalar(mesh, jnp.float32), _scalar(mesh, jnp.int32, (2,))
    made = step.programs(arch, config, stage, transform, 0)
    found = []
    if resident:
        score = _holding(made.score)
        beside = (state, gradients) if blocks > 1 else (state,)
        found.append(Program("score", score, (trained, frozen, rows, beside), {}, blocks, {}))
    if blocks == 1:
        arguments = (state, rows, given, total, frozen, draw)
        found.append(Program("whole", made.whole, arguments, {}, 1, {}))
    else:
        # The moments lie beside it: handed over unread, so that the compiler counts them.
        accumulate = _holding(made.accumulate, donate=1)
        arguments = (
            trained,
            gradients,
            rows,
            given,
            total,
            frozen,
            draw,
            (moments, state.reference),
        )
        found.append(Program("accumulate", accumulate, arguments, {}, blocks, {}))
        update = _holding(made.update, donate=0)
        found.append(Program("update", update, (state, gradients, frozen), {}, 1, {}))
    parts = {
        "parameters": _device_bytes((trained, frozen, state.reference)),
        "optimizer": _device_bytes(moments),
        "gradients": _device_bytes(gradients),
    }
    return tuple(found), parts


def _holding(run, donate: int | None = None):
    """`run` with one argument more, which lies in memory and is not read."""

    def held(*arguments):
        return run(*arguments[:-1])

    held.__name__ = getattr(run, "__name__", "held")
    return jax.jit(held, donate_argnums=() if donate is None else donate, keep_unused=True)


def _score(config: Config, arch, mesh: Mesh, length: int):
    """The program of `score` and of the reference log-probs."""
    dtype = jnp.dtype(config.model.dtype)
    params = _params(mesh, decoder.abstract_params(arch, dtype))
    rows = abstract_rows(mesh, config.train.micro_rows, length, packing.slots(length))
    branches = 1 if config.srpo.loss == "kto" else 2
    run = scoring.score_program(
        arch, dtype=dtype, remat="none", branches=branches, attention=config.model.attention
    )
    program = Program("score", run, (params, rows), {}, 1, {})
    return (program,), {"parameters": _device_bytes(params)}


def _sample(
    config: Config, arch, topology: Topology, mesh: Mesh, sizes: Mapping[str, int]
) -> Setup:
    """The two programs of generation, with parameters and cache laid out over the mesh."""
    batch, prompt, new = sizes["batch"], sizes["prompt"], sizes["new"]
    if prompt + new > arch.max_position_embeddings:
        raise ValueError(
            f"--prompt={prompt} and --new={new} exceed the model's "
            f"{arch.max_position_embeddings} positions"
        )
    dtype = jnp.dtype(config.model.dtype)
    params = _params(mesh, decoder.abstract_params(arch, dtype))
    batch, at_once = engine.rounded(batch, mesh), engine.prompts_at_once(batch, mesh, "tpu")
    slots, length = programs.sizes(prompt + new), programs.sizes(prompt - 1)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, programs.partition(arch.num_kv_heads, batch, 5))
    cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(lambda: decoder.empty_cache(arch, batch, slots, dtype)),
    )
    state = jax.tree.map(lambda x: _scalar(mesh, x.dtype, x.shape), programs.idle(batch))
    prefill = Program(
        "prefill",
        programs.prefill,
        (arch, params, _scalar(mesh, jnp.int32, (at_once, length))),
        {"dtype": dtype, "held": dtype},
        math.ceil(batch / at_once),
        {"prefill/while": programs.prefill_parts(length)},
    )
    decode = Program(
        "decode",
        programs.burst,
        (
            arch,
            params,
            cache,
            state,
            _scalar(mesh, jnp.bool_, (arch.vocab_size,)),
            _scalar(mesh, jnp.int32),
        ),
        {"dtype": dtype},
        math.ceil(new / programs.BURST),
        {"while": programs.BURST},
    )
    area = batch * (prompt + new) * (prompt + new + 1) / 2
    work = Work(batch * (prompt + new), batch * new, area)
    return Setup(
        config,
        "sample",
        arch,
        topology,
        mesh,
        (prefill, decode),
        {"parameters": _device_bytes(params), "cache": _device_bytes(cache)},
        work,
        model_flops(arch, config, work, train=False),
        f"{batch} prompts of {prompt} tokens, {new} new tokens each, {slots} cache slots",
        0.0,
        slots,
    )
