"""Does it compile and fit, what does it execute: `python -m saro_jax.compile_check --topology=NAME
--config=RECIPE --stage=rw|srpo|score|sample [--json=FILE] [--search] [--a.b=value ...]`.

Compiles the programs that training, scoring or generation run, with the real TPU compiler, on this
machine and for a TPU that it need not have: no weights, no rows, no accelerator. Exact: whether it
compiles and fits, memory, operations, collectives and their bytes. An *estimate*: every time,
tokens a second and MFU, from the compiler's schedule; nothing of it was measured on a TPU.

The model is model.path: a Hub id whose shape is packaged (configs/models), a folder with at least
a config.json, or another Hub id. Rows are taken as full of sequences of data.max_length tokens; a
pair as a prefix of half of that, shared, and two branches of the other half. Memory is of a step
alone: the runtime's own and a second program's stay out. Exit code 0 fits, 1 does not, 2 an error.
"""

import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saro_jax import config as configuration
from saro_jax.config import Config, Flag
from saro_jax.data import packing, pipeline
from saro_jax.generation import engine, programs
from saro_jax.models import decoder, flash, hub, huggingface
from saro_jax.models.architecture import Architecture, from_hf
from saro_jax.objectives.preference import SEGMENTS
from saro_jax.parallel import hlo, hlo_walk, schedule, sharding
from saro_jax.parallel import mesh as meshes
from saro_jax.parallel import topologies as tpu
from saro_jax.parallel.topologies import GIB, Topology
from saro_jax.training import optimizer, scoring, step, trainable

STAGES = ("rw", "srpo", "score", "sample")
REMAT = ("full", "attention", "dots", "none")


class Work(NamedTuple):
    """What one packed row holds, and what its attention has to do."""

    tokens: float  # computed, each once
    sequence_tokens: float  # of every sequence, a shared prefix counted in each
    area: float  # (query, key) pairs that see each other


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("topology", "a TPU by any name: v5p-32, v5e-16, v6e:2x4, 2xv5e-16", required=True),
        Flag("stage", "whose programs to compile", choices=STAGES, required=True),
        Flag("config", "recipe: a YAML file or the name of one in configs/", "quickstart"),
        Flag("json", "file for the report as JSON", parse=Path),
        Flag(
            "search", "compile a small grid of remat, micro_rows and mesh, and rank it", switch=True
        ),
        Flag("blocks", "blocks of a step; default: what the recipe's rows fill at most", parse=int),
        Flag("batch", "sample: prompts at a time", 64, parse=int),
        Flag("prompt", "sample: tokens of the longest prompt", 1024, parse=int),
        Flag("new", "sample: tokens of a response", 512, parse=int),
    ]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.compile_check",
            __doc__ or "",
            sys.argv[1:] if argv is None else argv,
            flags,
        )
        topology = tpu.find(args.topology)
        config = _config(args.config, args.overrides, args.stage)
        devices = tpu.devices(topology)
        sizes = {name: getattr(args, name) for name in ("batch", "prompt", "new")}
        for name, value in (*sizes.items(), ("blocks", args.blocks)):
            if value is not None and value < 1:
                raise ValueError(f"--{name}={value}: expected an integer >= 1")
        if args.search:
            found = search(config, args.stage, topology, devices, args.blocks, sizes)
            text = render_search(found)
        else:
            found = check(prepare(config, args.stage, topology, devices, args.blocks, sizes))
            text = render(found)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text, flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if found["fits"] else 1


def _config(recipe: str, overrides: Sequence[str], stage: str) -> Config:
    """The config of a stage; where srpo starts from the rw run's export, the rw stage's model."""
    owner = "srpo" if stage in ("srpo", "score") else "rw"
    config = configuration.load(recipe, overrides, owner)
    if config.model.path is None:
        path = configuration.load(recipe, overrides, "rw").model.path or hub.QUICKSTART
        model = config.model.model_copy(update={"path": path, "revision": None})
        config = config.model_copy(update={"model": model})
    return config


# ---- what is compiled ----------------------------------------------------------------------------


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
    """A row full of sequences of `longest` tokens, or of pairs (see the head of this file)."""
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
        {"dtype": dtype},
        math.ceil(batch / at_once),
        {"prefill/while": programs.prefill_parts(length)},
    )
    decode = Program(
        "decode",
        programs.burst,
        (
            arch,
            programs.Weights(params, params),
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


# ---- hand counts ---------------------------------------------------------------------------------


def matrix_sizes(arch: Architecture) -> dict[str, int]:
    """Elements of the matrices that a token is multiplied with: of all layers by name, the head."""
    D, F, H = arch.hidden_size, arch.intermediate_size, arch.head_dim
    N, K, L = arch.num_heads * H, arch.num_kv_heads * H, arch.num_layers
    return {
        "q": L * D * N,
        "k": L * D * K,
        "v": L * D * K,
        "o": L * N * D,
        "gate": L * D * F,
        "up": L * D * F,
        "down": L * F * D,
        "head": arch.vocab_size * D,
    }


def _attention_flops(arch: Architecture, area: float) -> float:
    """Of one product of queries and keys, or of probabilities and values, in all layers."""
    return 2.0 * area * arch.num_heads * arch.head_dim * arch.num_layers


def model_flops(arch: Architecture, config: Config, work: Work, *, train: bool) -> float:
    """What the model needs at least: 6 N T and causal attention (2 N T and no backward pass else).

    N without the embedding table, which is looked up. Frozen matrices need no gradient: 4 N T.
    Adapters and other small products are left out.
    """
    size = sum(matrix_sizes(arch).values())
    attention = _attention_flops(arch, work.area)
    if not train:
        return 2.0 * size * work.tokens + 2 * attention
    return (4.0 * size + 2.0 * _trained_size(arch, config)) * work.tokens + 6 * attention


def _trained_size(arch: Architecture, config: Config) -> int:
    trained = trainable.trained_names(arch, config)
    sizes = matrix_sizes(arch)
    names = {"head": "head"} if trainable.trains_head(arch, config) else {}
    for name in trained:
        found = re.search(r"layers/.*/([a-z]+)_proj/weight$", name)
        if found:
            names[found.group(1)] = found.group(1)
    return sum(sizes[name] for name in names)


def executed_products(arch: Architecture, config: Config, tokens: float) -> float:
    """Matrix products of a training step by hand, attention left out.

    6 N T and 2 N T of the forward pass once more, less what is not computed again: the logits
    always are; of a layer, by model.remat, nothing (none), o (dots), or all but down, whose result
    nothing in the layer reads (attention, full). Frozen matrices need no gradient.
    """
    sizes = matrix_sizes(arch)
    again = {
        "none": ("head",),
        "dots": ("o", "head"),
        "attention": ("q", "k", "v", "o", "gate", "up", "head"),
        "full": ("q", "k", "v", "o", "gate", "up", "head"),
    }[config.model.remat]
    size = sum(sizes.values())
    passes = 4.0 * size + 2.0 * _trained_size(arch, config) + 2.0 * sum(sizes[x] for x in again)
    return passes * tokens


def kernel_flops(setup: Setup, name: str, given: Sequence[hlo.Array]) -> float | None:
    """Operations of one call of a fused attention kernel, from what rows are taken to hold.

    The kernels compute whole blocks: half a block of keys a query more than it sees.
    """
    products = {"forward_kernel": 2, "backward_kernel": 5}
    found = next((n for kernel, n in products.items() if kernel in name), None)
    queries = next((a.dims for a in given if len(a.dims) == 5), None)
    if found is None or queries is None:
        return None
    B, K, G, T, H = queries
    block = flash.default_blocks(T, G).key
    return 2.0 * found * B * K * G * H * (setup.area * T / setup.row_length + T * block / 2)


# ---- compiling -----------------------------------------------------------------------------------


def check(setup: Setup) -> dict[str, Any]:
    """Compile the programs of `setup`; the report, JSON-able. Memory in bytes of one device."""
    chip, devices = setup.topology.chip, setup.topology.devices
    report: dict[str, Any] = {
        "topology": setup.topology.name,
        "devices": f"{setup.topology.description()}",
        "stage": setup.stage,
        "model": str(setup.config.model.path),
        "settings": {
            "model.dtype": setup.config.model.dtype,
            "model.param_dtype": setup.config.model.param_dtype,
            "model.remat": setup.config.model.remat if setup.stage in ("rw", "srpo") else "none",
            "model.attention": setup.config.model.attention,
            "train.micro_rows": setup.config.train.micro_rows,
            "lora.rank": setup.config.lora.rank,
            **{f"mesh.{axis}": size for axis, size in setup.mesh.shape.items() if size > 1},
        },
        "rows": setup.rows,
        "hbm_limit_bytes": chip.hbm,
        "fits": True,
        "programs": [],
        "versions": configuration.provenance() | {"libtpu": _libtpu_version()},
    }
    sums = hlo_walk.Totals()
    times = schedule.Times(busy={"compute": 0.0, "memory": 0.0, "network": 0.0})
    for program in setup.programs:
        entry, compiled = _compile(setup, program)
        report["programs"].append(entry)
        if compiled is None:
            report["fits"] = False
            continue
        module = hlo.parse(compiled.as_text())
        options: dict[str, Any] = {
            "loops": {**program.loops, **_xla_attention(setup)},
            "kernels": partial(kernel_flops, setup),
            "slice_devices": devices // setup.topology.slices,
        }
        totals = hlo_walk.totals(module, **options)
        part = schedule.estimate(module, chip, **options)
        hlo_walk.add(sums, totals, program.times)
        for name in ("total", "products", "kernels", "memory", "exposed", "wire"):
            value = getattr(times, name) + program.times * getattr(part, name)
            setattr(times, name, value)
        for name, value in part.busy.items():
            times.busy[name] += program.times * value
        entry |= {
            "product_flops": totals.flops,
            "attention_kernel_flops": totals.kernel_flops,
            "collectives": totals.by_kind(),
            "loops_counted_once": totals.unknown_loops,
            "estimate_seconds": part.total,
        }
    if not report["fits"]:
        return report
    peak = max(program["peak_bytes"] for program in report["programs"])
    known = sum(setup.parts.values())
    report |= {
        "peak_bytes": peak,
        "free_bytes": chip.hbm - peak,
        "split_bytes": dict(setup.parts) | {"activations and temporaries": max(0.0, peak - known)},
        "model_flops": setup.model_flops / devices,
        "executed_flops": sums.flops + sums.kernel_flops,
        "executed_product_flops": sums.flops,
        "executed_kernel_flops": sums.kernel_flops,
        "kernel_calls": sums.kernels,
        "collectives": sums.by_kind(),
        "compile_seconds": sum(program["compile_seconds"] for program in report["programs"]),
        "estimate_step_seconds": times.total,
        "estimate_seconds_by_part": {
            "matrix products": times.products,
            "attention kernels": times.kernels,
            "memory-bound": times.memory,
            "exposed collectives": times.exposed,
        },
        "estimate_roofline_seconds": times.busy,
        "estimate_binding": times.binding(),
        "estimate_tokens_per_second_per_chip": setup.work.tokens
        / times.total
        / (setup.topology.chips * setup.topology.slices),
        "tokens_per_step": setup.work.tokens,
        "sequence_tokens_per_step": setup.work.sequence_tokens,
        "estimate_mfu": setup.model_flops / devices / times.total / chip.flops,
    }
    if setup.stage in ("rw", "srpo"):
        hand = executed_products(setup.arch, setup.config, setup.work.tokens) / devices
        report["hand_count_product_flops"] = hand
    return report


def _xla_attention(setup: Setup) -> dict[str, int]:
    """Trips of the loops over key blocks where no kernel computes attention: half of the blocks."""
    blocks = math.ceil(setup.row_length / 64)
    share = setup.area / (setup.row_length * (setup.row_length + 1) / 2)
    return {"attention": max(1, round(share * (blocks + 1) / 2))}


def _libtpu_version() -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def _compile(setup: Setup, program: Program) -> tuple[dict[str, Any], Any]:
    """(what is known of the program, the executable or None where memory runs out)."""
    entry: dict[str, Any] = {"name": program.name, "times_a_step": program.times}
    start = time.monotonic()
    with jax.set_mesh(setup.mesh):
        lowered = program.jitted.lower(*program.arguments, **program.keywords)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            if "RESOURCE_EXHAUSTED" not in message:
                raise ValueError(
                    f"{program.name} does not compile for {setup.topology.name}: "
                    f"{message.strip().splitlines()[0]}"
                ) from None
            needed, allowed = memory_in(message)
            entry |= {
                "compile_seconds": time.monotonic() - start,
                "error": next(iter(message.strip().splitlines())),
                "needed_bytes": needed,
                "over_bytes": needed - (allowed or setup.topology.chip.hbm) if needed else None,
            }
            return entry, None
    memory = compiled.memory_analysis()
    padded = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    entry |= {
        "compile_seconds": time.monotonic() - start,
        "peak_bytes": memory.peak_memory_in_bytes,
        "padded_bytes": padded,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    return entry, compiled


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


def memory_in(message: str) -> tuple[float | None, float | None]:
    """(needed, allowed) bytes in the compiler's out-of-memory error; None where it says neither."""
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (
        rf"\({size}\) exceeds available HBM \({size}\)",
        rf"[Uu]sed {size} of {size} hbm",
        rf"{size}\) exceeds .*?{size}\)",
    ):
        if found := re.search(pattern, message):
            a, unit, b, other = found.groups()
            return float(a) * _UNITS[unit], float(b) * _UNITS[other]
    return None, None


# ---- search --------------------------------------------------------------------------------------


def search(
    config: Config,
    stage: str,
    topology: Topology,
    devices: Sequence[Any],
    blocks: int | None,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """Compile remat, then rows of a device, then meshes, each with the best so far; rank them.

    At most nine compiles. A variant that the model's sizes do not allow is in the table as such.
    """
    if stage not in ("rw", "srpo"):
        raise ValueError(f"--search: for stage rw or srpo, got {stage}")
    count, tried = len(devices), {}

    def attempt(remat: Any, rows: int, tensor: int) -> float:
        """Estimated tokens a second, -1 where it does not fit."""
        name = remat, rows, tensor
        if name not in tried:
            changed = config.model_copy(
                update={
                    "model": config.model.model_copy(update={"remat": remat}),
                    "mesh": config.mesh.model_copy(
                        update={"data": 1, "fsdp": count // tensor, "tensor": tensor}
                    ),
                    "train": config.train.model_copy(update={"micro_rows": rows * count // tensor}),
                }
            )
            try:
                found = check(prepare(changed, stage, topology, devices, blocks or 1, sizes))
            except ValueError as error:
                found = {"fits": False, "error": str(error)}
            tried[name] = found
            print(_line(name, found), flush=True)
        found = tried[name]
        return found["estimate_tokens_per_second_per_chip"] if found["fits"] else -1.0

    print(_TABLE, flush=True)
    remat = max(REMAT, key=lambda one: attempt(one, 1, 1))
    rows = max((1, 2, 4), key=lambda n: attempt(remat, n, 1))
    if rows > 1 and remat != "full":  # more rows may leave room only for another policy
        attempt("full", rows, 1)
    for tensor in (2, 4):
        if count % tensor == 0 and count > tensor:
            attempt(remat, rows * tensor, tensor)
    fitting = {name: found for name, found in tried.items() if found["fits"]}
    ranked = sorted(fitting, key=lambda n: -fitting[n]["estimate_tokens_per_second_per_chip"])
    best = ranked[0] if ranked else None
    return {
        "topology": topology.name,
        "stage": stage,
        "fits": best is not None,
        "best": None
        if best is None
        else {
            "model.remat": best[0],
            "train.micro_rows": best[1] * count // best[2],
            "mesh.fsdp": count // best[2],
            "mesh.tensor": best[2],
        },
        "tried": [
            {"model.remat": name[0], "rows_a_shard": name[1], "mesh.tensor": name[2], **found}
            for name, found in tried.items()
        ],
    }


_TABLE = (
    "| model.remat | rows a shard | mesh.tensor | peak GiB | executed TFLOP | "
    "estimate: step ms | estimate: tokens/s a chip | estimate: MFU | compile s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def _line(name: tuple[str, int, int], found: Mapping[str, Any]) -> str:
    head = " | ".join(map(str, name))
    if not found["fits"]:
        return f"| {head} | {found.get('error') or _misfit(found)} | | | | | |"
    return (
        f"| {head} | {found['peak_bytes'] / GIB:.2f} | {found['executed_flops'] / 1e12:.1f} | "
        f"{found['estimate_step_seconds'] * 1e3:.0f} | "
        f"{found['estimate_tokens_per_second_per_chip']:.0f} | {found['estimate_mfu']:.2f} | "
        f"{found['compile_seconds']:.0f} |"
    )


# ---- printing ------------------------------------------------------------------------------------


def _misfit(report: Mapping[str, Any]) -> str:
    bad = next(program for program in report["programs"] if "error" in program)
    if bad["needed_bytes"] is None:
        return f"does not fit: {bad['error']}"
    return (
        f"does not fit: {bad['name']} needs {bad['needed_bytes'] / GIB:.2f} GiB, "
        f"{bad['over_bytes'] / GIB:.2f} GiB too many"
    )


def render(report: Mapping[str, Any]) -> str:
    """The report as lines of text."""
    limit = report["hbm_limit_bytes"]
    settings = " ".join(f"{name}={value}" for name, value in report["settings"].items())
    lines = [
        f"{report['stage']} of {report['model']} on {report['devices']}",
        f"  settings      {settings}",
        f"  a step        {report['rows']}",
    ]
    for program in report["programs"]:
        if "error" in program:
            lines.append(f"  {program['name']:13} {program['error']}")
        else:
            lines.append(
                f"  {program['name']:13} compiled in {program['compile_seconds']:.1f} s, peak "
                f"{program['peak_bytes'] / GIB:.2f} GiB ({program['padded_bytes'] / GIB:.2f} with "
                f"padding), {program['times_a_step']} x a step"
            )
    if not report["fits"]:
        lines.append(f"  {_misfit(report)} ({limit / GIB:.2f} GiB a device)")
        return "\n".join(lines)
    split = ", ".join(f"{name} {value / GIB:.2f}" for name, value in report["split_bytes"].items())
    lines += [
        f"  fits          {report['peak_bytes'] / GIB:.2f} of {limit / GIB:.2f} GiB a device, "
        f"{report['free_bytes'] / GIB:.2f} left",
        f"  memory, GiB   {split}",
        f"  model         {report['model_flops'] / 1e12:.1f} TFLOP a device and step",
        f"  executed      {report['executed_flops'] / 1e12:.1f} TFLOP: products "
        f"{report['executed_product_flops'] / 1e12:.1f}"
        + (
            f" (by hand {report['hand_count_product_flops'] / 1e12:.1f})"
            if "hand_count_product_flops" in report
            else ""
        )
        + f", attention kernels {report['executed_kernel_flops'] / 1e12:.1f}",
    ]
    for name, part in report["collectives"].items():
        lines.append(f"  {name:28} {part['bytes'] / 1e9:8.2f} GB in {part['count']:.0f}")
    parts = ", ".join(
        f"{name} {value * 1e3:.0f}" for name, value in report["estimate_seconds_by_part"].items()
    )
    roofs = ", ".join(
        f"{name} {value * 1e3:.0f}" for name, value in report["estimate_roofline_seconds"].items()
    )
    tokens = f"{report['tokens_per_step']:.0f} tokens computed"
    if report["sequence_tokens_per_step"] != report["tokens_per_step"]:
        kind = "new" if report["stage"] == "sample" else "of all sequences (shared prefix in each)"
        tokens += f", {report['sequence_tokens_per_step']:.0f} {kind}"
    once = [name for program in report["programs"] for name in program["loops_counted_once"]]
    lines += [
        f"  estimate      {report['estimate_step_seconds'] * 1e3:.0f} ms a step ({tokens}), "
        f"{report['estimate_tokens_per_second_per_chip']:.0f} tokens/s a chip, MFU "
        f"{report['estimate_mfu']:.2f}",
        f"  estimate, ms  {parts}",
        f"  estimate, ms  alone: {roofs}; {report['estimate_binding']} binds",
        "  An estimate is the compiler's schedule at the chip's rates, never measured on a TPU.",
    ]
    if once:
        lines.append(f"  counted once, for data decide how often they run: {', '.join(set(once))}")
    return "\n".join(lines)


def render_search(found: Mapping[str, Any]) -> str:
    """The outcome of a search in one line; its table was printed on the way."""
    if found["best"] is None:
        return f"nothing that was tried fits {found['topology']}"
    best = " ".join(f"--{name}={value}" for name, value in found["best"].items())
    return f"best by estimated tokens/s of what fits {found['topology']}: {best}"


if __name__ == "__main__":
    sys.exit(main())
