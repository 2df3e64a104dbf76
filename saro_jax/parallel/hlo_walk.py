"""What a compiled program does: a walk of its optimised HLO that runs loops as often as they run.

XLA's own cost analysis counts the body of a loop once, which for a model whose layers are a scan is
wrong by the number of layers. Here every computation is walked in order with its trip count: matrix
products in floating-point operations, traffic of the main memory in bytes, collectives by kind. The
figures are of one device, whose program the text is.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from saro_jax.parallel.hlo import NAMES, Array, Instruction, Module
from saro_jax.parallel.hlo_costs import (
    Collective,
    collective_of,
    fused_collectives,
    fused_flops,
    hbm_bytes,
    product_flops,
)
from saro_jax.parallel.hlo_loops import Scope, trip_count


@dataclass
class Totals:
    """What one device executes."""

    flops: float = 0.0  # of matrix products, kernels left out
    kernel_flops: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)  # executions by name
    hbm_bytes: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    unknown_loops: list[str] = field(default_factory=list)  # loops counted once

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Bytes and executions by kind, what overlaps with other work apart."""
        out: dict[str, dict[str, float]] = {}
        for one in self.collectives:
            name = f"{one.kind} ({'async' if one.overlapped else 'sync'})"
            part = out.setdefault(name, {"bytes": 0.0, "count": 0.0})
            part["bytes"] += one.bytes * one.count
            part["count"] += one.count
        return dict(sorted(out.items()))


KernelFlops = Callable[[str, list[Array]], float | None]


class Visit(NamedTuple):
    """One instruction on the walk, in the order of the schedule, with what it costs once."""

    computation: str
    instruction: Instruction
    scope: Scope | None
    trips: int = 1  # of a loop
    known: bool = True


def visits(
    module: Module, at: str, scope: Scope | None, loops: Mapping[str, int]
) -> Iterator[Visit]:
    """The instructions of one computation, loops with their trip counts."""
    for one in module.computations[at].values():
        if one.opcode != "while":
            yield Visit(at, one, scope)
            continue
        trips = trip_count(module, at, one, scope)
        if trips is None:
            trips = next((n for name, n in loops.items() if name in one.scope), None)
        yield Visit(at, one, scope, 1 if trips is None else trips, trips is not None)


def inner(visit: Visit) -> list[tuple[str, Scope]]:
    """The computations that an instruction runs, with what their parameters stand for."""
    one, at = visit.instruction, visit.computation
    scope = Scope(at, one.operands, visit.scope, {})
    if one.opcode == "while":
        body = one.computation("body")
        return [(body, scope)] if body else []
    if one.opcode == "call":
        called = one.computation("to_apply")
        return [(called, scope)] if called else []
    if one.opcode == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
        names = NAMES.findall(listed.group(1)) if listed else []
        names += [
            n for key in ("true_computation", "false_computation") if (n := one.computation(key))
        ]
        return [
            (name, Scope(at, one.operands[n + 1 : n + 2], visit.scope, {}))
            for n, name in enumerate(names)
        ]
    return []


def kernel_flops(module: Module, visit: Visit, kernels: KernelFlops | None) -> float | None:
    """Operations of a custom call that `kernels` knows; None of what is no kernel."""
    one = visit.instruction
    if one.opcode != "custom-call" or kernels is None:
        return None
    here = module.computations[visit.computation]
    given = [array for name in one.operands if name in here for array in here[name].arrays]
    return kernels(one.name, given)


def totals(
    module: Module,
    *,
    loops: Mapping[str, int] | None = None,
    kernels: KernelFlops | None = None,
    slice_devices: int = 1 << 30,
) -> Totals:
    """What the program executes on one device, each loop as often as it runs.

    loops: trips of those whose number data decide, by a part of their name stack; others are
    counted once and named in `unknown_loops`. kernels: (name, operands) -> operations of a custom
    call, or None. Of the branches of a conditional the one with most operations counts.
    slice_devices: devices of a slice, to tell which collectives leave it.
    """
    hints = loops or {}

    def walk(at: str, scope: Scope | None) -> Totals:
        sums = Totals()
        seen: set[str] = set()
        for visit in visits(module, at, scope, hints):
            one = visit.instruction
            parts = [walk(*part) for part in inner(visit)]
            if one.opcode == "conditional" and parts:
                parts = [max(parts, key=lambda part: (part.flops, part.hbm_bytes))]
            for part in parts:
                add(sums, part, visit.trips)
            if one.opcode == "while" and not visit.known:
                sums.unknown_loops.append(one.scope or one.name)
            if parts:
                continue
            sums.hbm_bytes += hbm_bytes(module, at, one)
            if one.opcode in ("dot", "convolution"):
                sums.flops += product_flops(module, at, one)
            elif one.opcode == "fusion" and (called := one.computation("calls")):
                sums.flops += fused_flops(module, called)
            kernel = kernel_flops(module, visit, kernels)
            if kernel is not None:
                sums.kernel_flops += kernel
                name = one.name.rstrip("0123456789.")
                sums.kernels[name] = sums.kernels.get(name, 0.0) + 1
            found = collective_of(module, at, one, slice_devices)
            fused = [found] if found else fused_collectives(module, one, slice_devices)
            channel = re.search(r"channel_id=(\d+)", one.attributes)
            if fused and (channel is None or channel.group(1) not in seen):
                sums.collectives += fused
                if channel:
                    seen.add(channel.group(1))
        return sums

    return walk(module.entry, None)


def add(sums: Totals, part: Totals, times: int) -> None:
    """Add `times` executions of `part` to `sums`."""
    sums.flops += times * part.flops
    sums.kernel_flops += times * part.kernel_flops
    sums.hbm_bytes += times * part.hbm_bytes
    for name, count in part.kernels.items():
        sums.kernels[name] = sums.kernels.get(name, 0.0) + times * count
    sums.collectives += [one._replace(count=one.count * times) for one in part.collectives]
    sums.unknown_loops += part.unknown_loops
