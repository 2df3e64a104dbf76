"""The text of a compiled program, optimised HLO, as computations of instructions."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

BITS = {
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 64),
    **dict.fromkeys(("f32", "s32", "u32"), 32),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 16),
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s4", "u4"), 4),
    "c128": 128,
    "token": 0,
}
_SHAPE = re.compile(r"\b(pred|token|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
NAMES = re.compile(r"%([\w.\-]+)")
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
    operands = tuple(NAMES.findall(_COMMENT.sub("", inside)))
    return Instruction(name, shape, rest[:bracket], operands, inside, rest[close + 1 :], root)


def cycles(one: Instruction) -> int:
    """The compiler's own estimate for an instruction, 0 where it left none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
    return int(found.group(1)) if found else 0


def operand_bytes(module: Module, at: str, names: Sequence[str]) -> int:
    here = module.computations[at]
    return sum(array.bytes for name in names if name in here for array in here[name].arrays)
