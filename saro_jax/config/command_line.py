"""Owns the command line of every stage: its flags beside the tree, overrides, --help."""

from __future__ import annotations

import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saro_jax.config.recipe import option
from saro_jax.config.tree import Config, leaves
from saro_jax.config.values import as_typed, nearest, type_name


@dataclass(frozen=True)
class Flag:
    """A flag of a stage beside the tree: `--name=value`, or `--name` alone for a switch."""

    name: str
    help: str
    default: Any = None
    parse: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    required: bool = False
    switch: bool = False
    many: bool = False  # may be given several times; the values are a tuple

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


CONFIG = Flag("config", "recipe: a YAML file or the name of one in configs/", "quickstart")
OUT = Flag("out", "output folder", parse=Path, required=True)


def parse_command_line(
    prog: str,
    doc: str | None,
    argv: Sequence[str] | None,
    flags: Sequence[Flag],
    tree: bool = True,
    places: str = "",
) -> Namespace:
    """Parse a stage's flags; what is left must be overrides of the tree, kept as `.overrides`.

    `argv=None` is what the process was called with. `--a=b` and `--a b` are the same. `tree=False`
    is for a stage that reads no Config. `places` is the name of the arguments without dashes, where
    a stage takes such; they are kept as `.places`. `--help` prints `doc`, the flags and all fields,
    and exits. Raises a one-line ValueError that names the flag; values of overrides are checked by
    `load`.
    """
    known = {flag.name: flag for flag in flags}
    values: dict[str, Any] = {}
    overrides: list[str] = []
    rest = list(sys.argv[1:] if argv is None else argv)
    named: list[str] = []
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            print(_stage_help(f"{prog} {places}..." if places else prog, doc or "", flags, tree))
            raise SystemExit(0)
        if places and not token.startswith("-"):
            named.append(token)
            continue
        if not token.startswith("--") or token == "--":
            raise ValueError(f"unexpected argument {token!r}; options are given as --name=value")
        name, equals, text = token[2:].partition("=")
        flag = known.get(name)
        if flag is None and not tree:
            raise ValueError(f"--{name}: unknown option{nearest(name, list(known), '--')}")
        if flag is None:
            option(name, known)
        if flag is not None and flag.switch:
            if equals and text not in ("true", "false"):
                raise ValueError(f"--{name}={text}: expected true or false, got {text!r}")
            values[flag.key] = text != "false"
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name}: needs a value: --{name}=VALUE")
            text = rest.pop(0)
        if flag is None:
            overrides.append(f"--{name}={text}")
        elif flag.many:
            values[flag.key] = (*values.get(flag.key, ()), _flag_value(flag, text))
        elif flag.key in values:
            raise ValueError(f"--{name}={text}: given twice")
        else:
            values[flag.key] = _flag_value(flag, text)
    for flag in flags:
        if flag.required and flag.key not in values:
            raise ValueError(f"--{flag.name}: required: {flag.help}")
        values.setdefault(flag.key, False if flag.switch else () if flag.many else flag.default)
    return Namespace(**values, overrides=overrides, places=named)


def help_text() -> str:
    """Every setting of the tree with its type, default and meaning, grouped by section."""
    lines: list[str] = []
    group = ""
    for name, field in leaves().items():
        section = name.rpartition(".")[0]
        if section != group:
            about = Config.model_fields[section].description if section else "beside the sections"
            lines += ["", f"{section or 'other'}: {about}"]
            group = section
        default = "required" if field.is_required() else f"default {as_typed(field.default)}"
        lines += _entry(f"--{name}={type_name(field)}", f"{field.description} [{default}]")
    lines += [
        "",
        "--stages.rw.KEY=VALUE and --stages.srpo.KEY=VALUE set a key for one stage only.",
    ]
    return "\n".join(lines[1:])


def _entry(head: str, meaning: str) -> list[str]:
    indent = " " * 6
    body = textwrap.wrap(meaning, 96, initial_indent=indent, subsequent_indent=indent)
    return [f"  {head}", *body]


def _stage_help(prog: str, doc: str, flags: Sequence[Flag], tree: bool) -> str:
    settings = " [--section.key=VALUE ...]" if tree else ""
    lines = [f"usage: {prog} [--flag=VALUE ...]{settings}", "", doc.strip(), "", "flags:"]
    for flag in flags:
        value = "|".join(flag.choices) or "VALUE"
        head = f"--{flag.name}" if flag.switch else f"--{flag.name}={value}"
        default = "required" if flag.required else f"default {as_typed(flag.default)}"
        if flag.many:
            default = f"{'required, ' * flag.required}can be given several times"
        lines += _entry(head, flag.help if flag.switch else f"{flag.help} [{default}]")
    lines += _entry("--help", "print this and exit")
    if tree:
        lines += ["", "settings (each can stand in the recipe or on the command line):", ""]
        lines.append(help_text())
    return "\n".join(lines)


def _flag_value(flag: Flag, text: str) -> Any:
    place = f"--{flag.name}={text}"
    if flag.choices and text not in flag.choices:
        raise ValueError(f"{place}: expected {' or '.join(flag.choices)}, got {text!r}")
    if not text:
        raise ValueError(f"{place}: needs a value: --{flag.name}=VALUE")
    try:
        return flag.parse(text)
    except ValueError as error:
        words: dict[Any, str] = {int: "an integer", float: "a number"}
        reason = f"expected {words[flag.parse]}" if flag.parse in words else str(error)
        raise ValueError(f"{place}: {reason}, got {text!r}") from None
