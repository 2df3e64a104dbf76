"""What a compiled program does: a walk of its optimised HLO that runs loops as often as they run.

XLA's own cost analysis counts the body of a loop once, which for a model whose layers are a scan is
wrong by the number of layers. Here every computation is walked in order with its trip count: matrix
products in floating-point operations, traffic of the main memory in bytes, collectives by kind. The
figures are of one device, whose program the text is.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

BITS = {
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 64),
    **dict.fromkeys(("f32", "s32", "u32"), 32),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 16),
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s4", "u4"), 4),
    "c128": 128,
    "token": 0,
}
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
_SHAPE = re.compile(r"\b(pred|token|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_NAMES = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COMMENT = re.compile(r"/\*.*?\*/")


class Array(NamedTuple):
    """One array of a shape, as the text writes it."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * BITS.get(self.dtype, 8) // 8

    @property
    def hbm_bytes(self) -> int:
        """0 for what lies in the fast memory of a TPU, whose number in a layout is not 0."""
        return 0 if re.search(r"S\([1-9]\)", self.layout) else self.bytes


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands in the brackets, for constants and parameters
    attributes: str
    root: bool

    @property
    def arrays(self) -> list[Array]:
        return arrays(self.shape)

    @property
    def scope(self) -> str:
        """Where in the Python code it comes from: the name stack of JAX."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def computation(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Module:
    """A parsed program."""

    computations: dict[str, Computation]
    entry: str

    def root(self, computation: str) -> Instruction:
        return next(one for one in self.computations[computation].values() if one.root)


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


# ---- reading the text ----------------------------------------------------------------------------


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, which may be a tuple."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(shape):
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Array(dtype, sizes, layout or ""))
    return found


def parse(text: str) -> Module:
    """Read `compiled.as_text()`; `ValueError` where there is no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current, last = None, None, None
    for line in text.splitlines():
        if line.endswith("{") and (found := _HEADER.match(line)):
            current = computations.setdefault(found.group(2), {})
            entry = found.group(2) if found.group(1) else entry
        elif line == "}":
            current = None
        elif current is not None and line.startswith("  ") and " = " in line:
            last = _instruction(line)
            current[last.name] = last
        elif current is not None and last is not None:  # a kernel's metadata may hold line breaks
            last = last._replace(attributes=last.attributes + line)
            current[last.name] = last
    if entry is None:
        raise ValueError("no entry computation in the HLO text")
    return Module(computations, entry)


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`; text in quotes is passed over."""
    depth, i = 0, start
    while i < len(text):
        c = text[i]
        if c == '"':
            i += 1
            while i < len(text) and text[i] != '"':
                i += 2 if text[i] == "\\" else 1
        elif c in "({":
            depth += 1
        elif c in ")}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return len(text) - 1


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    root = left.startswith("ROOT ")
    name = left.removeprefix("ROOT ").lstrip("%")
    if right.startswith("("):
        end = _closing(right, 0) + 1
    else:
        end = right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    bracket = rest.index("(")
    close = _closing(rest, bracket)
    inside = rest[bracket + 1 : close]
    operands = tuple(_NAMES.findall(_COMMENT.sub("", inside)))
    return Instruction(name, shape, rest[:bracket], operands, inside, rest[close + 1 :], root)


# ---- how often a loop runs -----------------------------------------------------------------------


class _Scope(NamedTuple):
    """What the parameters of a computation stand for: operands in the computation that calls it."""

    computation: str
    operands: tuple[str, ...]
    outer: "_Scope | None"
    bound: Mapping[int, int]  # elements of parameter 0 with a value of their own


def _value(module: Module, at: str, name: str, scope: _Scope | None, depth: int = 0) -> int | None:
    """The integer that a value is, where constants decide it."""
    one = module.computations[at].get(name)
    if one is None or depth > 200:
        return None

    def value(operand: str, where: str = at, outer: _Scope | None = scope) -> int | None:
        return _value(module, where, operand, outer, depth + 1)

    if one.opcode == "constant":
        found = re.fullmatch(r"-?\d+", one.literal.strip())
        return int(found.group()) if found else None
    if one.opcode == "parameter":
        number = int(one.literal)
        if scope is None or number >= len(scope.operands):
            return None
        return value(scope.operands[number], scope.computation, scope.outer)
    if one.opcode == "get-tuple-element":
        index = _tuple_index(one)
        return _element(module, at, one.operands[0], index, scope, depth)
    if one.opcode == "fusion":
        called = one.computation("calls")
        if called is None:
            return None
        inner = _Scope(at, one.operands, scope, {})
        return value(module.root(called).name, called, inner)
    if one.opcode in ("copy", "convert", "bitcast", "copy-done", "copy-start", "reshape"):
        return value(one.operands[0])
    if one.opcode in ("add", "subtract", "multiply", "maximum", "minimum", "divide"):
        a, b = (value(operand) for operand in one.operands)
        if a is None or b is None:
            return None
        if one.opcode == "divide":
            return a // b if b else None
        return {"add": a + b, "subtract": a - b, "multiply": a * b}.get(
            one.opcode, max(a, b) if one.opcode == "maximum" else min(a, b)
        )
    return None


def _element(module, at: str, name: str, index: int, scope, depth: int) -> int | None:
    """Element `index` of a tuple; of a loop's state, the one before the loop."""
    one = module.computations[at].get(name)
    if one is None or depth > 200:
        return None
    if one.opcode == "tuple":
        return _value(module, at, one.operands[index], scope, depth + 1)
    if one.opcode == "parameter" and scope is not None:
        if index in scope.bound:
            return scope.bound[index]
        number = int(one.literal)
        if number >= len(scope.operands):
            return None
        return _element(
            module, scope.computation, scope.operands[number], index, scope.outer, depth + 1
        )
    if one.opcode in ("while", "opt-barrier", "copy"):
        return _element(module, at, one.operands[0], index, scope, depth + 1)
    return None


def _tuple_index(one: Instruction) -> int:
    """Which element a get-tuple-element takes."""
    found = re.search(r"index=(\d+)", one.attributes)
    if found is None:
        raise ValueError(f"get-tuple-element without an index: {one.attributes!r}")
    return int(found.group(1))


def _counter(module: Module, at: str, name: str, via: tuple[str, ...] | None = None) -> int | None:
    """Which element of parameter 0 a value is, through copies; `via`: a fusion's operands."""
    one = module.computations[at].get(name)
    while one is not None and one.opcode in ("copy", "convert", "bitcast"):
        one = module.computations[at].get(one.operands[0])
    if one is None or one.opcode != "get-tuple-element":
        return None
    return _tuple_index(one)


def trip_count(module: Module, at: str, loop: Instruction, scope: _Scope | None) -> int | None:
    """How often a `while` runs; None where data decide.

    From the backend's note where it leaves one, else from the constants: where the counter starts,
    what the condition compares it with, and what the body adds to it.
    """
    noted = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if noted:
        return int(noted.group(1))
    condition, body = loop.computation("condition"), loop.computation("body")
    if condition is None or body is None:
        return None
    inner = _Scope(at, loop.operands, scope, {})
    where, compare, outer = condition, module.root(condition), inner
    while compare.opcode in ("fusion", "copy", "bitcast"):
        if compare.opcode == "fusion":
            called = compare.computation("calls")
            if called is None:
                return None
            outer = _Scope(where, compare.operands, outer, {})
            where, compare = called, module.root(called)
        else:
            compare = module.computations[where][compare.operands[0]]
    if compare.opcode != "compare":
        return None
    direction = re.search(r"direction=(\w+)", compare.attributes)

    def counter(name: str) -> int | None:
        one = module.computations[where][name]
        if one.opcode == "parameter" and where != condition:
            return _counter(module, condition, outer.operands[int(one.literal)])
        return _counter(module, where, name)

    for left, right, flip in ((*compare.operands, False), (*compare.operands[::-1], True)):
        index = counter(left)
        if index is None:
            continue
        limit = _value(module, where, right, outer)
        start = _element(module, at, loop.operands[0], index, scope, 0)
        if limit is None or start is None:
            continue
        root = module.root(body)
        if root.opcode != "tuple":
            continue
        step_scope = _Scope(at, loop.operands, scope, {index: start})
        after = _value(module, body, root.operands[index], step_scope)
        if after is None or after == start:
            continue
        sign = direction.group(1) if direction else "LT"
        if flip:
            sign = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(sign, sign)
        last = limit + {"LE": 1, "GE": -1}.get(sign, 0)
        return max(0, math.ceil((last - start) / (after - start)))
    return None


# ---- what one instruction costs ------------------------------------------------------------------


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


# ---- the walk ------------------------------------------------------------------------------------

KernelFlops = Callable[[str, list[Array]], float | None]


class Visit(NamedTuple):
    """One instruction on the walk, in the order of the schedule, with what it costs once."""

    computation: str
    instruction: Instruction
    scope: _Scope | None
    trips: int = 1  # of a loop
    known: bool = True


def visits(
    module: Module, at: str, scope: _Scope | None, loops: Mapping[str, int]
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


def inner(visit: Visit) -> list[tuple[str, _Scope]]:
    """The computations that an instruction runs, with what their parameters stand for."""
    one, at = visit.instruction, visit.computation
    scope = _Scope(at, one.operands, visit.scope, {})
    if one.opcode == "while":
        body = one.computation("body")
        return [(body, scope)] if body else []
    if one.opcode == "call":
        called = one.computation("to_apply")
        return [(called, scope)] if called else []
    if one.opcode == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
        names = _NAMES.findall(listed.group(1)) if listed else []
        names += [
            n for key in ("true_computation", "false_computation") if (n := one.computation(key))
        ]
        return [
            (name, _Scope(at, one.operands[n + 1 : n + 2], visit.scope, {}))
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

    def walk(at: str, scope: _Scope | None) -> Totals:
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


def cycles(one: Instruction) -> int:
    """The compiler's own estimate for an instruction, 0 where it left none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
    return int(found.group(1)) if found else 0


def operand_bytes(module: Module, at: str, names: Sequence[str]) -> int:
    here = module.computations[at]
    return sum(array.bytes for name in names if name in here for array in here[name].arrays)
