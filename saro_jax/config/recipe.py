"""Owns loading: a recipe (YAML), its stages' parts and `--a.b=value`, resolved into one Config."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from saro_jax.config.tree import STAGES, Config, leaves, sections
from saro_jax.config.values import (
    expected,
    members_of,
    names,
    nearest,
    parse,
    parse_list,
    parse_text,
    quoted,
    takes_list,
)


@dataclass(frozen=True)
class Setting:
    """One value and where it was given: `file:line`, or `--flag=value` as typed."""

    value: Any
    where: str


def load(recipe: Path | str | None, overrides: Sequence[str], stage: str) -> Config:
    """Resolve a recipe, its part for `stage` and `--a.b=value` overrides into one Config.

    `recipe` is a file or the bare name of a packaged recipe; None is the packaged quickstart. Later
    wins: the recipe, its `stages.STAGE`, overrides, overrides of `stages.STAGE`. Raises a one-line
    ValueError that names the file and line, or the flag.
    """
    if stage not in STAGES:
        raise ValueError(f"--stage={stage}: expected {' or '.join(STAGES)}, got {stage!r}")
    path = _recipe_file(recipe)
    settings: dict[str, Setting] = {}
    for parts in (_read_recipe(path), _read_overrides(overrides)):
        settings |= parts[""] | parts[stage]
    tree: dict[str, Any] = {name: {} for name in sections()}
    for name, setting in settings.items():
        section, _, key = name.rpartition(".")
        (tree[section] if section else tree)[key] = setting.value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_one_line(error, settings, _shown(path))) from None


def recipe_path(name: str) -> Path:
    """Find the packaged recipe `name` (no folder, no suffix), in a wheel or a checkout."""
    # A wheel carries configs/ inside the package; a checkout keeps it beside the package.
    package = Path(__file__).resolve().parents[1]
    folder = package / "configs"
    if not folder.is_dir():
        folder = package.parent / "configs"
    names = sorted(path.name.removesuffix(".yaml") for path in folder.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"--config={name}: unknown recipe{nearest(name, names)}")
    return folder / f"{name}.yaml"


def dump(config: Config) -> str:
    """Write the config as YAML that `load` reads back as the same Config for either stage."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=2**20)


def digest(config: Config) -> str:
    """Hash of all settings."""
    return hashlib.blake2b(dump(config).encode(), digest_size=8).hexdigest()


def _recipe_file(recipe: Path | str | None) -> Path:
    if recipe is None:
        return recipe_path("quickstart")
    path = Path(recipe)
    if not path.is_file() and path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
        return recipe_path(str(recipe))
    return path


def _shown(path: Path) -> str:
    absolute = Path(os.path.abspath(path))
    cwd = Path.cwd()
    return str(absolute.relative_to(cwd) if absolute.is_relative_to(cwd) else path)


def _one_line(error: ValidationError, settings: dict[str, Setting], recipe: str) -> str:
    """The first complaint of pydantic, after the place of the first key that it names."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{recipe}: {name} is required: {leaves()[name].description}"
    message = str(first.get("ctx", {}).get("error") or f"{name}: {first['msg']}")
    for key in re.findall(r"\b[a-z]+\.[a-z0-9_]+", message):
        if key in settings:
            return f"{settings[key].where}: {message}"
    return f"{recipe}: {message}"


def _read_recipe(path: Path) -> dict[str, dict[str, Setting]]:
    """Settings of a recipe by dotted name, for all stages ("") and for each one."""
    shown = _shown(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        names = ", ".join(sorted(p.stem for p in recipe_path("quickstart").parent.glob("*.yaml")))
        raise ValueError(f"{shown}: no such recipe; the packaged ones are {names}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{shown}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{shown}: not YAML: {' '.join(str(error).split())}") from None
    found: dict[str, dict[str, Setting]] = {part: {} for part in ("", *STAGES)}
    for key, where, node in _items(root, shown, "the recipe", [*Config.model_fields, "stages"]):
        if key != "stages":
            _read_key(found[""], Config, key, "", where, node, shown)
            continue
        for stage, _, tree in _items(node, shown, "stages", STAGES):
            for name, place, value in _items(tree, shown, f"stages.{stage}", Config.model_fields):
                _read_key(found[stage], Config, name, f"stages.{stage}.", place, value, shown)
    return found


def _read_key(
    found: dict[str, Setting],
    model: type[BaseModel],
    key: str,
    outer: str,
    where: str,
    node: yaml.Node,
    shown: str,
) -> None:
    """Put the key's setting, or those of the section that it names, into `found`."""
    section = sections().get(key)
    if section is None:
        value = _node_value(node, model.model_fields[key], f"{where}: {outer}{key}")
        found[key] = Setting(value, where)
        return
    for name, place, value in _items(node, shown, outer + key, section.model_fields):
        field = section.model_fields[name]
        parsed = _node_value(value, field, f"{place}: {outer}{key}.{name}")
        found[f"{key}.{name}"] = Setting(parsed, place)


def _items(
    node: yaml.Node | None, shown: str, section: str, allowed: Iterable[str]
) -> Iterable[tuple[str, str, yaml.Node]]:
    """The (key, file:line, value) of a mapping node, whose keys must be allowed and unique."""
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~")):
        return
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ValueError(f"{shown}:{line}: {section}: expected keys, got {_node_text(node)}")
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        key, where = key_node.value, f"{shown}:{line}"
        if not isinstance(key_node, yaml.ScalarNode) or key not in allowed:
            place = "" if section == "the recipe" else f" in {section}"
            hint = nearest_key(str(key), allowed)
            raise ValueError(f"{where}: unknown key {_node_text(key_node)}{place}{hint}")
        if key in seen:
            raise ValueError(f"{where}: key {key!r} is given twice, first in line {seen[key]}")
        seen[key] = line
        yield key, where, value


def _node_text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    if isinstance(node, yaml.SequenceNode):
        return "a list" if node.value else "an empty list"
    return "a mapping"


def _node_value(node: yaml.Node, field: FieldInfo, place: str) -> Any:
    """The typed value of a YAML node; the field's type decides, not YAML's guess.

    YAML 1.1 reads 1e-5 as text, 010 as eight and a commit such as 12345e6 as a number.
    """
    if isinstance(node, yaml.ScalarNode):
        return parse(node.value, field, place, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode) and node.value and takes_list(field):
        items = [item for item in node.value if isinstance(item, yaml.ScalarNode)]
        if len(items) == len(node.value):
            return [parse_text(item.value, place, item.style is not None) for item in items]
    raise ValueError(f"{place}: expected {expected(field)}, got {_node_text(node)}")


def _read_overrides(overrides: Sequence[str]) -> dict[str, dict[str, Setting]]:
    """Settings of `--a.b=value` by dotted name, for all stages ("") and for each one."""
    found: dict[str, dict[str, Setting]] = {part: {} for part in ("", *STAGES)}
    for override in overrides:
        flag, equals, text = override.removeprefix("--").partition("=")
        stage, name = option(flag)
        field = leaves()[name]
        if not equals:
            raise ValueError(f"--{flag}: needs a value: --{flag}=VALUE")
        where = f"--{flag}={text}"
        null = type(None) in members_of(field) and text in ("", "~", "null")
        listed = takes_list(field) and not null
        values = parse_list(text, where) if listed else parse(text, field, where)
        earlier = found[stage].get(name)
        if earlier is not None:
            if not takes_list(field):
                raise ValueError(f"{where}: given twice, first as {earlier.where}")
            values = [*names(earlier.value), *names(values)]
        found[stage][name] = Setting(values, where)
    return found


def option(flag: str, flags: Iterable[str] = ()) -> tuple[str, str]:
    """The stage ("" = all) and dotted name that `flag` (without dashes) sets."""
    stage, name = "", flag
    if flag.startswith("stages."):
        _, stage, name = [*flag.split(".", 2), "", ""][:3]
        if stage not in STAGES:
            raise ValueError(f"--{flag}: unknown stage {stage!r}; allowed: {', '.join(STAGES)}")
    if name in sections():
        key = next(iter(sections()[name].model_fields))
        raise ValueError(
            f"--{flag}: {name} is a section; set one of its keys: --{flag}.{key}=VALUE"
        )
    if name not in leaves():
        hint = nearest_key(name, [*flags, *leaves()], dashes="--")
        raise ValueError(f"--{flag}: unknown option{hint}")
    return stage, name


def nearest_key(key: str, allowed: Iterable[str], dashes: str = "") -> str:
    """The hint after an unknown key: a setting of that very name elsewhere comes first."""
    elsewhere = [name for name in leaves() if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {quoted(elsewhere[0], dashes)}?"
    return nearest(key, list(allowed), dashes)
