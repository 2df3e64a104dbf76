"""How often the loops of a compiled program run, from what their counters are compared with."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from saro_jax.parallel.hlo import (
    Instruction,
    Module,
)


class Scope(NamedTuple):
    """What the parameters of a computation stand for: operands in the computation that calls it."""

    computation: str
    operands: tuple[str, ...]
    outer: "Scope | None"
    bound: Mapping[int, int]  # elements of parameter 0 with a value of their own


def _value(module: Module, at: str, name: str, scope: Scope | None, depth: int = 0) -> int | None:
    """The integer that a value is, where constants decide it."""
    one = module.computations[at].get(name)
    if one is None or depth > 200:
        return None

    def value(operand: str, where: str = at, outer: Scope | None = scope) -> int | None:
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
        inner = Scope(at, one.operands, scope, {})
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


def trip_count(module: Module, at: str, loop: Instruction, scope: Scope | None) -> int | None:
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
    inner = Scope(at, loop.operands, scope, {})
    where, compare, outer = condition, module.root(condition), inner
    while compare.opcode in ("fusion", "copy", "bitcast"):
        if compare.opcode == "fusion":
            called = compare.computation("calls")
            if called is None:
                return None
            outer = Scope(where, compare.operands, outer, {})
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
        step_scope = Scope(at, loop.operands, scope, {index: start})
        after = _value(module, body, root.operands[index], step_scope)
        if after is None or after == start:
            continue
        sign = direction.group(1) if direction else "LT"
        if flip:
            sign = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(sign, sign)
        last = limit + {"LE": 1, "GE": -1}.get(sign, 0)
        return max(0, math.ceil((last - start) / (after - start)))
    return None
