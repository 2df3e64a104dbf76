"""Prompt templates: text files of named parts with slots, filled strictly.

A file of prompts/ opens with a line that says what it is for. Lines like `--- system ---` open the
messages; `{{name}}` is a slot. A value is put in as it is: slots and marks inside it are text.
"""

import re
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "prompts"
PART = re.compile(r"^--- (\w+) ---\n", re.MULTILINE)
SLOT = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
ROLES = ("system", "user", "assistant")


def names() -> list[str]:
    """The packaged templates, such as t1_reason_safe."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def render(template: str | Path, slots: Mapping[str, str]) -> list[dict[str, str]]:
    """The messages {role, content} of a packaged template or of a file, all slots filled.

    One-line ValueError for a slot that the template lacks, one without a value, a slot that is no
    name, or a file without messages.
    """
    path = _path(template)
    messages = _messages(path)
    wanted = {name for _, text in messages for name in SLOT.findall(text)}
    for name in sorted(wanted):
        if not re.fullmatch(r"[a-z_]+", name):
            raise ValueError(f"{path}: {{{{{name}}}}} is no slot: a name is of a-z and _")
        if name not in slots:
            raise ValueError(f"{path}: no value for the slot {name!r}")
    for name in slots:
        if name not in wanted:
            raise ValueError(
                f"{path}: has no slot {name!r}; its slots are {', '.join(sorted(wanted))}"
            )
    return [
        {"role": role, "content": SLOT.sub(lambda match: slots[match[1]], text).strip()}
        for role, text in messages
    ]


def slots(template: str | Path) -> list[str]:
    """The slots of a template, in the order of their first use."""
    found = [name for _, text in _messages(_path(template)) for name in SLOT.findall(text)]
    return list(dict.fromkeys(found))


def _path(template: str | Path) -> Path:
    path = Path(template)
    if path.suffix != ".txt":
        if str(template) not in names():
            raise ValueError(
                f"{template}: no such template; the packaged ones are {', '.join(names())}"
            )
        path = FOLDER / f"{template}.txt"
    return path


def _messages(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    _, *parts = PART.split(text)
    if not parts:
        raise ValueError(f"{path}: no messages: a line like '--- user ---' opens one")
    messages = list(zip(parts[::2], parts[1::2], strict=True))
    for role, _ in messages:
        if role not in ROLES:
            raise ValueError(f"{path}: unknown role {role!r}, allowed: {', '.join(ROLES)}")
    return messages
