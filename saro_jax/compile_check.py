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
from functools import partial
from pathlib import Path
from typing import Any

import jax

from saro_jax import config as configuration
from saro_jax.config import Config, Flag
from saro_jax.models import flash, hub
from saro_jax.parallel import hlo, hlo_walk, schedule
from saro_jax.parallel import topologies as tpu
from saro_jax.parallel.topologies import GIB, Topology
from saro_jax.training.abstract import Program, Setup, prepare
from saro_jax.training.flops import executed_products

STAGES = ("rw", "srpo", "score", "sample")
REMAT = ("full", "attention", "dots", "none")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("topology", "a TPU by any name: v5p-32, v5e-16, v6e:2x4, 2xv5e-16", required=True),
        Flag("stage", "whose programs to compile", choices=STAGES, required=True),
        configuration.CONFIG,
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
            "python -m saro_jax.compile_check", __doc__, argv, flags
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
