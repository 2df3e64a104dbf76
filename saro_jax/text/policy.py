"""The safety policy: categories and rules from a YAML document, checked, rendered and versioned."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from saro_jax.records import MODES

NO_CATEGORY = "P0"
TYPES = ("hard", "soft")
CATEGORY_ID = re.compile(r"[A-Z]+[0-9]+")
RULE_ID = re.compile(r"[A-Z]+[0-9]+\.R[0-9]+")
GLOBAL_ID = re.compile(r"G[0-9]+")


@dataclass(frozen=True)
class Rule:
    """One rule: hard ones are never outweighed; `mode` is what a request under it gets."""

    id: str
    type: str
    mode: str
    text: str


@dataclass(frozen=True)
class Category:
    """What a request can be about; severity runs from 1 (low) to 4 (absolute).

    `maps` holds, for each taxonomy, its names of this category.
    """

    id: str
    name: str
    severity: int
    definition: str
    rules: tuple[Rule, ...]
    benign_lookalikes: tuple[str, ...]
    maps: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """The whole document; `version` is the author's, with a hash of the content behind it."""

    version: str
    modes: tuple[str, ...]
    global_rules: dict[str, str]
    categories: dict[str, Category]
    taxonomies: dict[str, dict[str, str]]

    def rule_ids(self) -> set[str]:
        """All ids that reasoning may cite, of the global rules too."""
        found = {rule.id for category in self.categories.values() for rule in category.rules}
        return found | set(self.global_rules)


def load(policy: str | Path | None = None) -> Policy:
    """The policy of a file, or the packaged one by its name ("saro", also what None means).

    One-line ValueError with file, line, what was found and what is allowed.
    """
    path = _file(policy)
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise ValueError(f"{path}: an empty policy")
    return _policy(_Node(root, str(path), "the policy"))


def policy_path(name: str) -> Path:
    """The packaged policy `name`, in a wheel or a checkout."""
    # A wheel carries policies/ inside the package; a checkout keeps it beside the package.
    package = Path(__file__).resolve().parents[1]
    folder = package / "policies"
    if not folder.is_dir():
        folder = package.parent / "policies"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"{name}: no such policy; the packaged ones are {', '.join(names)}")
    return folder / f"{name}.yaml"


def render(policy: Policy, categories: Iterable[str] | None = None) -> str:
    """The policy in plain text: whole, or the global rules and those of some categories.

    A category that the policy lacks is a ValueError.
    """
    chosen = list(policy.categories) if categories is None else list(dict.fromkeys(categories))
    for one in chosen:
        if one not in policy.categories:
            raise ValueError(f"unknown category {one!r}{_near(one, policy.categories)}")
    lines = ["General rules"]
    lines += [f"- {name}: {text}" for name, text in policy.global_rules.items()]
    for one in chosen:
        category = policy.categories[one]
        if categories is not None and not category.rules:
            continue
        lines += ["", f"{category.id} {category.name}", category.definition]
        for rule in category.rules:
            lines.append(f"- {rule.id} ({rule.type}, {rule.mode}): {rule.text}")
        if category.benign_lookalikes:
            lines.append("Only sounds like it: " + " / ".join(category.benign_lookalikes))
    if len(lines) == 1 + len(policy.global_rules):
        lines += ["", "No category of the policy concerns this request."]
    return "\n".join(lines)


def definitions(policy: Policy) -> str:
    """One line a category: id, name, what belongs to it; for a classifier's prompt."""
    found = policy.categories.values()
    return "\n".join(f"{one.id} {one.name}: {one.definition}" for one in found)


def from_label(policy: Policy, label: str) -> tuple[str, ...]:
    """The categories that a label means: an id of the policy, or a name of any taxonomy.

    The nearest category first: the one whose maps have the name first, in the shortest list. Case,
    "O1: " before a name and spaces do not count; codes need their taxonomy, see `from_code`. Empty
    for a label that nothing names.
    """
    if label in policy.categories:
        return (label,)
    wanted = _plain(re.sub(r"^\s*[A-Za-z]\d+\s*:\s*", "", label))
    found: dict[str, tuple[int, int]] = {}
    for category in policy.categories.values():
        lists = [[_plain(name) for name in names] for names in category.maps.values()]
        ranks = [(names.index(wanted), len(names)) for names in lists if wanted in names]
        if wanted == _plain(category.name):
            ranks.append((-1, 0))
        if ranks:
            found[category.id] = min(ranks)
    return tuple(sorted(found, key=lambda name: found[name]))


def from_code(policy: Policy, taxonomy: str, code: str) -> tuple[str, ...]:
    """The categories behind a taxonomy's code, such as "S5" of llama_guard_3, by its name.

    ValueError for a taxonomy or a code that the policy does not have.
    """
    if taxonomy not in policy.taxonomies:
        raise ValueError(f"unknown taxonomy {taxonomy!r}{_near(taxonomy, policy.taxonomies)}")
    names = policy.taxonomies[taxonomy]
    if code not in names:
        raise ValueError(f"{taxonomy} has no {code!r}{_near(code, names)}")
    return tuple(
        category.id
        for category in policy.categories.values()
        if names[code] in category.maps.get(taxonomy, ())
    )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _file(policy: str | Path | None) -> Path:
    if policy is None:
        return policy_path("saro")
    path = Path(policy).expanduser()
    if not path.is_file() and not path.suffix and len(path.parts) == 1:
        return policy_path(str(policy))
    return path


# ---- from the document's nodes, which know their lines -------------------------------------------


@dataclass(frozen=True)
class _Node:
    """A node of the document, its file, and what it is called in errors."""

    node: yaml.Node
    file: str
    name: str

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self.file}:{self.node.start_mark.line + 1}: {self.name}: {message}")

    def mapping(self, keys: Sequence[str] | None = None) -> dict[str, "_Node"]:
        """Its values by key; with `keys` just these, all of them."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.fail(f"expected keys, got {_shown(self.node)}")
        found: dict[str, _Node] = {}
        for key, value in self.node.value:
            name = str(key.value)
            place = _Node(key, self.file, self.name)
            if name in found:
                raise place.fail(f"key {name!r} is given twice")
            if keys is not None and name not in keys:
                raise place.fail(f"unknown key {name!r}{_near(name, keys)}")
            found[name] = _Node(value, self.file, f"{self.name}.{name}")
        for key in keys or ():
            if key not in found:
                raise self.fail(f"lacks {key}")
        return found

    def items(self) -> list["_Node"]:
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.fail(f"expected a list, got {_shown(self.node)}")
        return [_Node(one, self.file, self.name) for one in self.node.value]

    def text(self, pattern: re.Pattern[str] | None = None) -> str:
        if not isinstance(self.node, yaml.ScalarNode) or not self.node.value.strip():
            raise self.fail(f"expected text, got {_shown(self.node)}")
        value = " ".join(self.node.value.split())
        if pattern is not None and not pattern.fullmatch(value):
            raise self.fail(f"expected an id like {_EXAMPLES[pattern]}, got {value!r}")
        return value

    def choice(self, allowed: Iterable[str]) -> str:
        value = self.text()
        if value not in allowed:
            raise self.fail(f"expected {' or '.join(allowed)}, got {value!r}")
        return value


_EXAMPLES = {CATEGORY_ID: "P3", RULE_ID: "P3.R1", GLOBAL_ID: "G1"}
_TOP = ("version", "modes", "global_rules", "categories", "taxonomies")
_CATEGORY = ("id", "name", "severity", "definition", "rules", "benign_lookalikes", "maps")


def _policy(root: _Node) -> Policy:
    top = root.mapping(_TOP)
    semver = top["version"].text()
    if not re.fullmatch(r"\d+\.\d+\.\d+", semver):
        raise top["version"].fail(f"expected a version like 1.0.0, got {semver!r}")
    modes = tuple(one.choice(MODES) for one in top["modes"].items())
    if not modes:
        raise top["modes"].fail(f"expected some of {', '.join(MODES)}, got none")
    taxonomies = {name: _taxonomy(node) for name, node in top["taxonomies"].mapping().items()}
    global_rules: dict[str, str] = {}
    for one in top["global_rules"].items():
        parts = one.mapping(("id", "text"))
        _add(global_rules, parts["id"], parts["id"].text(GLOBAL_ID), parts["text"].text())
    categories: dict[str, Category] = {}
    rules: dict[str, Rule] = {}
    for one in top["categories"].items():
        parts = one.mapping(_CATEGORY)
        category = _category(parts, modes, taxonomies, rules)
        _add(categories, parts["id"], category.id, category)
    if not categories:
        raise top["categories"].fail("expected at least one category")
    content = _content(root.node)
    digest = sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return Policy(f"{semver}+{digest[:8]}", modes, global_rules, categories, taxonomies)


def _category(
    parts: dict[str, _Node],
    modes: Sequence[str],
    taxonomies: dict[str, dict[str, str]],
    rules: dict[str, Rule],
) -> Category:
    name = parts["id"].text(CATEGORY_ID)
    own = []
    for node in parts["rules"].items():
        keys = node.mapping(("id", "type", "mode", "text"))
        rule = Rule(
            keys["id"].text(RULE_ID),
            keys["type"].choice(TYPES),
            keys["mode"].choice(modes),
            keys["text"].text(),
        )
        if rule.id.split(".")[0] != name:
            raise keys["id"].fail(
                f"a rule of {name} is called {name}.R1 and so on, got {rule.id!r}"
            )
        _add(rules, keys["id"], rule.id, rule)
        own.append(rule)
    maps: dict[str, tuple[str, ...]] = {}
    for taxonomy, node in parts["maps"].mapping().items():
        if taxonomy not in taxonomies:
            raise node.fail(f"unknown taxonomy{_near(taxonomy, taxonomies)}")
        allowed = tuple(taxonomies[taxonomy].values())
        for one in node.items():
            if one.text() not in allowed:
                raise one.fail(f"unknown name {one.text()!r}{_near(one.text(), allowed)}")
        maps[taxonomy] = tuple(one.text() for one in node.items())
    severity = parts["severity"].choice(("1", "2", "3", "4"))
    return Category(
        name,
        parts["name"].text(),
        int(severity),
        parts["definition"].text(),
        tuple(own),
        tuple(one.text() for one in parts["benign_lookalikes"].items()),
        maps,
    )


def _taxonomy(node: _Node) -> dict[str, str]:
    """Names by code; a list has its names as codes."""
    if isinstance(node.node, yaml.SequenceNode):
        return {one.text(): one.text() for one in node.items()}
    return {code: one.text() for code, one in node.mapping().items()}


def _add(found: dict[str, Any], place: _Node, key: str, value: Any) -> None:
    if key in found:
        raise place.fail(f"{key} is given twice")
    found[key] = value


def _content(node: yaml.Node) -> Any:
    """The document as plain values, without layout and comments."""
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _content(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_content(one) for one in node.value]
    return " ".join(node.value.split())


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys"


def _near(name: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(allowed)}"
