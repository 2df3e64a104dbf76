"""What a model said: the reasoning inside `<think>` blocks, and the answer that the user sees."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

OPEN, CLOSE = "<think>", "</think>"
TAGS = re.compile(f"({re.escape(OPEN)}|{re.escape(CLOSE)})")
# A paragraph and the space through its blank line; or its part up to the end of the reasoning.
STEP = re.compile(
    rf"\s*(?:{re.escape(CLOSE)}|\S.*?(?:\n[^\S\n]*\n\s*|{re.escape(CLOSE)}|\Z))|\s+\Z", re.DOTALL
)
DECISION = re.compile(r"\**decision:\**\s*(\w+)\W*", re.IGNORECASE)

Status = Literal[
    "ok",  # one block, not empty, then an answer
    "empty_think",  # one block without text
    "no_think",  # no tag at all
    "missing_open",  # the first tag closes
    "leading_text",  # visible text before the block
    "multi",  # several blocks
    "malformed",  # tags that do not pair otherwise
    "unclosed",  # finished inside a block
    "truncated",  # cut off inside a block
    "truncated_answer",  # like ok, but the answer was cut off
    "empty_answer",  # nothing for the user to see
]
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True)
class Reasoning:
    """A response taken apart. Everything outside the blocks is answer: the user would see it."""

    reasoning: str
    answer: str
    status: Status


def parse(text: str, *, finished: bool = True, prefilled_open: bool = False) -> Reasoning:
    """Takes a response apart; total: any text has a status.

    finished: the model ended its turn (it was not cut off at a token limit). prefilled_open: the
    generation prompt wrote the opening tag, so the text begins inside the block; a model that
    writes the tag again is taken at its word. Parts are stripped and joined by newlines. Of several
    statuses the first of this order holds: unclosed or truncated, empty_answer, malformed, multi,
    missing_open or leading_text, empty_think or no_think, truncated_answer, ok.
    """
    if prefilled_open and not text.lstrip().startswith(OPEN):
        text = OPEN + text
    first, *rest = TAGS.split(text)
    outside, inside = [first], []  # texts, in order
    is_open, missing_open, malformed = False, False, False
    for number, (tag, part) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
        if tag == CLOSE and number == 0:
            missing_open = True
            inside, outside = [first], [part]
        elif tag == OPEN:
            malformed |= is_open
            is_open = True
            inside.append(part)
        else:
            malformed |= not is_open
            is_open = False
            outside.append(part)
    answer = _joined(outside)
    reasoning = _joined(inside)
    status: Status = "ok"
    if is_open:
        status = "unclosed" if finished else "truncated"
    elif not answer:
        status = "empty_answer"
    elif malformed or (missing_open and len(inside) > 1):
        status = "malformed"
    elif len(inside) > 1:
        status = "multi"
    elif missing_open:
        status = "missing_open"
    elif not inside:
        status = "no_think"
    elif first.strip():
        status = "leading_text"
    elif not reasoning:
        status = "empty_think"
    elif not finished:
        status = "truncated_answer"
    return Reasoning(reasoning, answer, status)


def spans(text: str) -> list[tuple[int, int]]:
    """Characters (first, after the last) of each reasoning block of a response, tags included.

    As `parse` reads them: a first tag that closes ends a block that the text began in, a block that
    nothing closes reaches the end.
    """
    found: list[tuple[int, int]] = []
    opened: int | None = None
    for number, tag in enumerate(TAGS.finditer(text)):
        if tag.group() == OPEN:
            opened = tag.start() if opened is None else opened
        elif opened is not None or number == 0:
            found.append((opened or 0, tag.end()))
            opened = None
    if opened is not None:
        found.append((opened, len(text)))
    return found


def steps(text: str) -> list[str]:
    """The steps of a continuation, which joined are the text again.

    A step is a paragraph with the blank line after it, or what `</think>` ends; spaces before it
    are its own.
    """
    return STEP.findall(text)


def decision(reasoning: str) -> str | None:
    """The mode of the reasoning's last line, "Decision: mode", in lower case; None without one."""
    lines = reasoning.strip().splitlines()
    match = DECISION.fullmatch(lines[-1].strip()) if lines else None
    return match.group(1).lower() if match else None


def _joined(parts: list[str]) -> str:
    return "\n".join(stripped for part in parts if (stripped := part.strip()))
