"""Owns the value of one setting: its type, its bounds, its words in errors and in the help."""

from __future__ import annotations

import difflib
import math
import operator
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo


def names(value: str | list[str] | None) -> list[str]:
    """A setting that takes one text or several, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else value


def members_of(field: FieldInfo) -> tuple[Any, ...]:
    annotation = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def takes_list(field: FieldInfo) -> bool:
    return list[str] in members_of(field)


def parse(text: str, field: FieldInfo, place: str, quoted: bool = False) -> Any:
    """The value that `text` is under the field's type and bounds."""
    members = members_of(field)
    null = not quoted and text in ("", "~", "null")
    if null and type(None) in members:
        return None
    kind = members[0]
    value: Any = None
    if null:
        text = "null"
    elif get_origin(kind) is Literal:
        value = text if text in get_args(kind) else None
    elif kind is bool:
        value = {"true": True, "false": False}.get(text.lower())
    elif kind is int:
        value = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else None
    elif kind is float:
        value = _number(text)
    else:
        value = parse_text(text, place, quoted)
    if value is None or not all(holds(value, limit) for _, holds, limit in _bounds(field)):
        got = text if null else repr(text)
        raise ValueError(f"{place}: expected {expected(field)}, got {got}")
    return value


def _bounds(field: FieldInfo) -> list[tuple[str, Callable[[Any, Any], bool], Any]]:
    """The (sign, comparison, limit) that the field's Field(ge=..., lt=...) states."""
    bounds: list[tuple[str, Callable[[Any, Any], bool], Any]] = []
    for bound in field.metadata:
        if isinstance(bound, annotated_types.Ge):
            bounds.append((">=", operator.ge, bound.ge))
        elif isinstance(bound, annotated_types.Gt):
            bounds.append((">", operator.gt, bound.gt))
        elif isinstance(bound, annotated_types.Le):
            bounds.append(("<=", operator.le, bound.le))
        elif isinstance(bound, annotated_types.Lt):
            bounds.append(("<", operator.lt, bound.lt))
        else:
            raise TypeError(f"{bound!r} would not be checked in recipes and overrides")
    return bounds


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def parse_text(text: str, place: str, quoted: bool) -> str:
    if not text.strip() or (not quoted and text in ("~", "null")):
        raise ValueError(f"{place}: expected text, got {text!r}")
    return text


def parse_list(text: str, place: str) -> str | list[str]:
    """One text, or the list of `a,b` or `[a, b]`."""
    inner = text.strip()
    bracketed = inner.startswith("[") and inner.endswith("]")
    items = (inner[1:-1] if bracketed else inner).split(",")
    values = [parse_text(item.strip(), place, quoted=False) for item in items]
    return values if bracketed or len(values) > 1 else values[0]


def expected(field: FieldInfo) -> str:
    """What the field takes, in words for an error: 'an integer >= 1 or null'."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return _wording(field, words | {list[str]: "a list of text"}, " or ")


def type_name(field: FieldInfo) -> str:
    """What the field takes, in short for the help: 'integer >= 1|null'."""
    words = {int: "integer", float: "number", bool: "true|false", str: "text"}
    return _wording(field, words | {list[str]: "list"}, "|")


def _wording(field: FieldInfo, words: dict[Any, str], joint: str) -> str:
    bounds = " and".join(f" {sign} {limit}" for sign, _, limit in _bounds(field))
    parts = []
    for member in members_of(field):
        if get_origin(member) is Literal:
            parts += [str(choice) for choice in get_args(member)]
        elif member is type(None):
            parts.append("null")
        else:
            parts.append(words[member] + bounds)
    return joint.join(parts)


def nearest(name: str, allowed: Sequence[str], dashes: str = "") -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    if close:
        return f"; did you mean {quoted(close[0], dashes)}?"
    return "; --help lists them" if dashes else f"; allowed: {', '.join(allowed)}"


def quoted(name: str, dashes: str) -> str:
    return f"{dashes}{name}" if dashes else repr(name)


def as_typed(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
