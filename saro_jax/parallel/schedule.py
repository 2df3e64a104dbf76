"""An *estimated* time of a compiled program: its schedule walked with a chip's rates.

Nothing here was measured on a TPU. Matrix products take the compiler's own cycles (or peak rate, or
the memory's, whichever is longest), all else its traffic of the main memory; collectives take their
bytes over one axis of the torus in both directions, and those that are started and awaited apart go
on beside what stands between. It ranks variants of one program; as a time it is optimistic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from saro_jax.parallel import hlo, hlo_costs, hlo_walk
from saro_jax.parallel.hlo import Module
from saro_jax.parallel.hlo_costs import Collective
from saro_jax.parallel.hlo_walk import KernelFlops
from saro_jax.parallel.topologies import Chip

KERNEL_SHARE = 0.45  # of the peak rate that attention kernels are assumed to reach
LATENCY = 1e-6  # seconds that a collective takes whatever its size, assumed


@dataclass
class Times:
    """Seconds of one step on one device, all of them estimates."""

    total: float = 0.0
    products: float = 0.0
    kernels: float = 0.0
    memory: float = 0.0  # operations bound by the main memory
    exposed: float = 0.0  # collectives that nothing overlaps with
    wire: float = 0.0  # all collectives, as if alone
    busy: dict[str, float] = field(default_factory=dict)  # the three roofline terms

    def binding(self) -> str:
        """The roofline term that is longest: compute, memory or network."""
        return max(self.busy, key=lambda name: self.busy[name])


def wire_seconds(one: Collective, chip: Chip) -> float:
    """Of one execution, by the usual ring."""
    n = max(1, one.devices)
    rate = chip.dcn_rate if one.slices else chip.ici_rate
    if one.kind == "collective-permute":
        return LATENCY + one.bytes / (rate if one.slices else rate / 2)  # one direction of a link
    share = (n - 1) / n
    if one.kind == "all-to-all":
        # On a ring each byte passes n / 4 links of both directions.
        return LATENCY + one.bytes * share * max(1.0, n / 8) / rate
    return LATENCY + one.bytes * share * (2 if one.kind == "all-reduce" else 1) / rate


@dataclass
class _Clock:
    now: float = 0.0
    memory_free: float = 0.0  # when asynchronous copies are through


def estimate(
    module: Module,
    chip: Chip,
    *,
    loops: Mapping[str, int] | None = None,
    kernels: KernelFlops | None = None,
    slice_devices: int = 1 << 30,
) -> Times:
    """Walk the schedule of a TPU program; arguments as for `hlo_walk.totals`."""
    hints = loops or {}
    memory_bytes = 0.0

    def walk(at: str, scope) -> tuple[Times, float, float]:
        times, clock = Times(), _Clock()
        lanes = [0.0, 0.0]  # the two directions that permutes travel in
        ring = 0.0
        ends: dict[str, float] = {}
        flops, traffic = 0.0, 0.0
        for visit in hlo_walk.visits(module, at, scope, hints):
            one = visit.instruction
            parts = [walk(*part) for part in hlo_walk.inner(visit)]
            if one.opcode == "conditional" and parts:
                parts = [max(parts, key=lambda part: part[0].total)]
            if parts:
                for part, part_flops, part_bytes in parts:
                    for name in ("products", "kernels", "memory", "exposed", "wire"):
                        value = getattr(times, name) + visit.trips * getattr(part, name)
                        setattr(times, name, value)
                    clock.now += visit.trips * part.total
                    flops += visit.trips * part_flops
                    traffic += visit.trips * part_bytes
                continue
            if one.opcode.endswith("-done"):
                end = next((ends[name] for name in one.operands if name in ends), 0.0)
                if end > clock.now:
                    if one.opcode != "copy-done":
                        times.exposed += end - clock.now
                    else:
                        times.memory += end - clock.now
                    clock.now = end
                continue
            found = hlo_costs.collective_of(module, at, one, slice_devices)
            inside = [] if found else hlo_costs.fused_collectives(module, one, slice_devices)
            if found is not None:
                seconds = wire_seconds(found, chip)
                times.wire += seconds
                if not found.overlapped:
                    start = max(clock.now, ring, *lanes)
                    times.exposed += start + seconds - clock.now
                    clock.now = ring = start + seconds
                elif found.kind == "collective-permute":
                    lane = lanes.index(min(lanes))
                    lanes[lane] = max(clock.now, lanes[lane]) + seconds
                    ends[one.name] = lanes[lane]
                else:
                    ring = max(clock.now, ring) + seconds
                    ends[one.name] = ring
                continue
            size = hlo_costs.hbm_bytes(module, at, one)
            traffic += size
            seconds = size / chip.hbm_rate
            if one.opcode in ("copy-start", "slice-start", "async-start"):
                clock.memory_free = max(clock.now, clock.memory_free) + seconds / 2
                ends[one.name] = clock.memory_free
                continue
            work = _products(module, at, one)
            kernel = hlo_walk.kernel_flops(module, visit, kernels)
            if kernel is not None:
                flops += kernel
                seconds = max(seconds, kernel / (KERNEL_SHARE * chip.flops))
                times.kernels += seconds
            elif work:
                flops += work
                seconds = max(seconds, work / chip.flops, hlo.cycles(one) / chip.clock)
                times.products += seconds
            else:
                times.memory += seconds
            for collective in inside:
                wire = wire_seconds(collective, chip)
                times.wire += wire
                if not collective.overlapped:
                    times.exposed += wire
                    seconds += wire
            clock.now += seconds
        times.total = max(clock.now, ring, *lanes, clock.memory_free)
        return times, flops, traffic

    times, flops, memory_bytes = walk(module.entry, None)
    times.busy = {
        "compute": flops / chip.flops,
        "memory": memory_bytes / chip.hbm_rate,
        "network": times.wire,
    }
    return times


def _products(module: Module, at: str, one: hlo.Instruction) -> float:
    if one.opcode in ("dot", "convolution"):
        return hlo_costs.product_flops(module, at, one)
    called = one.computation("calls")
    return hlo_costs.fused_flops(module, called) if one.opcode == "fusion" and called else 0.0
