"""What one instruction of a compiled program costs: operations, bytes, collectives."""

import math
import re
from typing import NamedTuple

import numpy as np

from saro_jax.parallel.hlo import Instruction, Module

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "add-dependency",
}


class Collective(NamedTuple):
    """Executions of one collective on one device.

    bytes: of one execution, the gathered output, the input that is reduced, or what is sent.
    devices: of the group. overlapped: started and awaited apart, with other work between.
    slices: whether the group reaches over several slices.
    """

    kind: str
    bytes: int
    count: float
    devices: int
    overlapped: bool
    slices: bool
    scope: str


def product_flops(module: Module, at: str, one: Instruction) -> float:
    """Floating-point operations of a dot or convolution: two for each multiply-add that counts."""
    here = module.computations[at]
    out = one.arrays[0].dims
    left, right = (here[name].arrays[0].dims for name in one.operands[:2])
    if one.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        axes = [int(d) for d in found.group(1).split(",") if d] if found else []
        return 2.0 * math.prod(out) * math.prod(left[d] for d in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    assert labels is not None, one.attributes[:200]
    l_labels, r_labels, o_labels = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    options = dict(part.split("=") for part in window.group(1).split()) if window else {}
    spatial = sorted(label for label in o_labels if label.isdigit())

    def option(name: str, default: str) -> list[str]:
        return options[name].split("x") if name in options else [default] * len(spatial)

    taps = 1.0
    for n, label in enumerate(spatial):
        size, length = right[r_labels.index(label)], left[l_labels.index(label)]
        stride, low = int(option("stride", "1")[n]), int(option("pad", "0_0")[n].split("_")[0])
        spread, base = int(option("rhs_dilate", "1")[n]), int(option("lhs_dilate", "1")[n])
        o = np.arange(out[o_labels.index(label)])[:, None]
        # Which taps meet an element and not padding: batched products are written as padded ones.
        reach = o * stride + np.arange(size)[None] * spread - low
        taps *= int(((reach >= 0) & (reach <= (length - 1) * base) & (reach % base == 0)).sum())
    batch, feature = out[o_labels.index("b")], out[o_labels.index("f")]
    return 2.0 * batch * feature * taps * right[r_labels.index("i")]


def fused_flops(module: Module, at: str) -> float:
    """Of all products inside a fusion, nested ones too."""
    total = 0.0
    for one in module.computations[at].values():
        if one.opcode in ("dot", "convolution"):
            total += product_flops(module, at, one)
        elif one.opcode in ("fusion", "call"):
            inner = one.computation("calls") or one.computation("to_apply")
            total += fused_flops(module, inner) if inner else 0.0
    return total


def _shape_bytes(one: Instruction) -> int:
    return sum(array.hbm_bytes for array in one.arrays)


def hbm_bytes(module: Module, at: str, one: Instruction) -> float:
    """Bytes that one execution reads from and writes to the main memory.

    What a fusion only cuts a slice from counts by the slice, what it updates in place by the
    update.
    """
    here = module.computations[at]

    def of(name: str) -> int:
        return _shape_bytes(here[name]) if name in here else 0

    if one.opcode in FREE or one.opcode.endswith("-done"):
        return 0.0
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _shape_bytes(one)
    if one.opcode == "dynamic-update-slice":
        return 2.0 * of(one.operands[1])
    if one.opcode == "scatter":
        return 3.0 * of(one.operands[-1])
    called = one.computation("calls") if one.opcode == "fusion" else None
    if called is None:
        return float(_shape_bytes(one) + sum(map(of, one.operands)))
    total = 0.0
    for number, name in enumerate(one.operands):
        if size := of(name):
            total += _read(module, called, number, size)
    root = module.root(called)
    results = root.operands if root.opcode == "tuple" else (root.name,)
    for array, name in zip(one.arrays, results, strict=False):
        total += min(array.hbm_bytes, _written(module, called, name))
    return total


_VIEWS = ("bitcast", "copy", "reshape", "transpose")


def _read(module: Module, at: str, number: int, size: float) -> float:
    """Bytes that a fusion reads of its parameter of `size` bytes."""
    inside = module.computations[at]
    users: dict[str, list[Instruction]] = {}
    for user in inside.values():
        for name in set(user.operands):
            users.setdefault(name, []).append(user)

    def of(name: str) -> float:
        parts = 0.0
        for user in users.get(name, []):
            first = user.operands[0] == name
            if user.opcode in _VIEWS:
                parts += of(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
                parts += sum(array.bytes for array in user.arrays)
            elif user.opcode in ("dynamic-update-slice", "scatter") and first:
                continue  # in place
            elif user.opcode == "fusion" and (called := user.computation("calls")):
                for n, operand in enumerate(user.operands):
                    parts += _read(module, called, n, size) if operand == name else 0.0
            else:
                return size
        return min(parts, size)

    parameters = (x.name for x in inside.values() if x.opcode == "parameter")
    name = next((n for n in parameters if inside[n].literal == str(number)), None)
    return size if name is None else of(name)


def _written(module: Module, at: str, name: str) -> float:
    """Bytes that a fusion writes of a result: all (infinite) or what it updates in place."""
    inside = module.computations[at]
    value = inside[name]
    if value.opcode in _VIEWS:
        return _written(module, at, value.operands[0])
    if value.opcode == "dynamic-update-slice":
        return float(sum(array.bytes for array in inside[value.operands[1]].arrays))
    if value.opcode == "scatter":  # reads what it adds to
        return 2.0 * sum(array.bytes for array in inside[value.operands[-1]].arrays)
    if value.opcode == "fusion" and (called := value.computation("calls")):
        root = module.root(called)
        return float("inf") if root.opcode == "tuple" else _written(module, called, root.name)
    return float("inf")


def group_of(one: Instruction, slice_devices: int) -> tuple[int, bool]:
    """(devices of a group, whether a group reaches over several slices) of a collective."""
    text = one.attributes
    groups: np.ndarray | None = None
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        groups = np.array(re.findall(r"(\d+),(\d+)", found.group(1) + "}"), int)
        crosses = len(groups) and bool(
            (groups // slice_devices != groups[:, :1] // slice_devices).any()
        )
        return 2, bool(crosses)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*?)\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
        chosen = re.findall(r"'([^']+)'", found.group(2))
        names = list(sizes)
        ids = np.arange(math.prod(map(int, sizes.values()))).reshape(
            [int(size) for size in sizes.values()]
        )
        rest = [n for n, name in enumerate(names) if name not in chosen]
        last = [names.index(name) for name in chosen if name in names]
        groups = ids.transpose(*rest, *last).reshape(-1, math.prod(ids.shape[n] for n in last))
    elif found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, ids, order = (
            [int(x) for x in part.split(",")] if part else None for part in found.groups()
        )
        assert shape is not None and ids is not None
        values = np.arange(math.prod(ids)).reshape(ids)
        groups = (values.transpose(order) if order else values).reshape(shape)
    elif found := re.search(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", text):
        rows = re.findall(r"\{([\d,]+)\}", found.group(1))
        groups = np.array([[int(x) for x in row.split(",")] for row in rows])
    if groups is None or not groups.size:
        return 1, False
    crosses = (groups // slice_devices != groups[:, :1] // slice_devices).any()
    return groups.shape[-1], bool(crosses)


def collective_of(
    module: Module, at: str, one: Instruction, slice_devices: int = 1 << 30
) -> Collective | None:
    """The collective that an instruction is or starts, counted once; None if it is none."""
    overlapped = one.opcode.endswith("-start")
    kind = one.opcode.removesuffix("-start")
    if kind == "async":
        called = one.computation("calls")
        inner = called and next(
            (x for x in module.computations[called].values() if x.opcode in COLLECTIVES), None
        )
        if not called or not inner:
            return None
        found = collective_of(module, called, inner, slice_devices)
        return found and found._replace(overlapped=overlapped)
    if kind not in COLLECTIVES:
        return None
    here = module.computations[at]
    sent = sum(a.bytes for name in one.operands if name in here for a in here[name].arrays)
    devices, slices = group_of(one, slice_devices)
    size = sent
    if kind == "all-gather":
        size = sent * devices
    return Collective(kind, size, 1.0, devices, overlapped, slices, one.scope)


def fused_collectives(module: Module, one: Instruction, slice_devices: int) -> list[Collective]:
    """Collectives inside a fusion, as a TPU writes a reduce-scatter or one that computes meanwhile.

    A collective that goes on during several fusions stands in each: only its start counts.
    """
    called = one.computation("calls")
    if one.opcode != "fusion" or called is None:
        return []
    inside = module.computations[called]
    found = [
        collective
        for x in inside.values()
        if (collective := collective_of(module, called, x, slice_devices))
    ]
    if not found:
        return []
    targets = {x.target for x in inside.values()}
    if "async_collective" in called or any("AsyncCollective" in t for t in targets):
        if not any("AsyncCollectiveStart" in t for t in targets):
            return []
        return [x._replace(overlapped=True) for x in found]
    if "all-reduce-scatter" in called or "all-reduce-scatter" in one.name:
        return [x._replace(kind="reduce-scatter") if x.kind == "all-reduce" else x for x in found]
    return found
