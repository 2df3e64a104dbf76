"""What a model said: the reasoning and the answer that the user sees, the reasoning's steps.

A response carries its reasoning in one of STYLES; inside the project it is always `think_xml`, and
`to_think` and `render` go there and back.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

OPEN, CLOSE = "<think>", "</think>"
TAGS = re.compile(f"({re.escape(OPEN)}|{re.escape(CLOSE)})")
# A paragraph and the space through its blank line; or its part up to the end of the reasoning.
STEP = re.compile(
    rf"\s*(?:{re.escape(CLOSE)}|\S.*?(?:\n[^\S\n]*\n\s*|{re.escape(CLOSE)}|\Z))|\s+\Z", re.DOTALL
)
DECISION = re.compile(r"\**decision:\**\s*(\w+)\W*", re.IGNORECASE)

Style = Literal[
    "think_xml",  # <think> ... </think> answer
    "headed",  # Reasoning: ... Answer: ...
    "stair_tags",  # <|Reasoning_step|> Title: ... <|/Reasoning_step|> <|Output|> Final Answer: ...
]
STYLES: tuple[str, ...] = get_args(Style)

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


# ---- other surfaces ------------------------------------------------------------------------------

_HEAD = r"^[^\S\n]*(?:#+[^\S\n]*)?\**{}\**[^\S\n]*:\**[^\S\n]*\n?"
REASONING_HEAD = re.compile(_HEAD.format("(?:reasoning|thinking)"), re.IGNORECASE | re.MULTILINE)
ANSWER_HEAD = re.compile(
    _HEAD.format("(?:final[^\\S\\n]+)?(?:answer|response)"), re.IGNORECASE | re.MULTILINE
)
STAIR_STEP = re.compile(
    r"<\|Reasoning_step\|>\s*(.*?)\s*(?:<\|/Reasoning_step\|>|(?=<\|)|\Z)", re.DOTALL
)
STAIR_OUTPUT = re.compile(r"<\|Output\|>\s*(?:Final Answer:\s*)?")
STAIR_END = "<|/Output|>"


def to_think(text: str, style: Style) -> str:
    """A response of another style with the tags of think_xml, for `parse`; total.

    What the style does not mark stays where it is: text before the reasoning is before the block,
    a missing answer heading or output leaves the block open, and a response without any mark comes
    back as it is.
    """
    if style == "headed":
        opened = REASONING_HEAD.search(text)
        if opened is None:
            return text
        before, rest = text[: opened.start()], text[opened.end() :]
        closed = ANSWER_HEAD.search(rest)
        if closed is None:
            return f"{before}{OPEN}\n{rest}"
        inside, answer = rest[: closed.start()].strip(), rest[closed.end() :]
        return f"{before}{OPEN}\n{inside}\n{CLOSE}\n\n{answer}"
    if style == "stair_tags":
        found = list(STAIR_STEP.finditer(text))
        output = STAIR_OUTPUT.search(text)
        first = found[0] if found else output
        if first is None:
            return text
        start = first.start()
        inside = "\n\n".join(match[1] for match in found)
        if output is None:
            return f"{text[:start]}{OPEN}\n{inside}"
        answer = text[output.end() :].replace(STAIR_END, "").strip()
        return f"{text[:start]}{OPEN}\n{inside}\n{CLOSE}\n\n{answer}"
    return text


def render(reasoning: str, answer: str, style: Style = "think_xml") -> str:
    """A response of a style; in think_xml `parse` gives both parts back, stripped."""
    reasoning, answer = reasoning.strip(), answer.strip()
    if style == "headed":
        return f"Reasoning:\n{reasoning}\n\nAnswer:\n{answer}"
    if style == "stair_tags":
        parts = [
            f"<|Reasoning_step|>\n{step.text.strip()}\n<|/Reasoning_step|>"
            for step in segment(reasoning)
        ]
        return "\n".join([*parts, f"<|Output|>\nFinal Answer: {answer}\n{STAIR_END}"])
    return f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{answer}"


# ---- steps of a reasoning ------------------------------------------------------------------------

MAX_STEPS, LONG_STEP, SHORT_STEP = 24, 80, 4  # words, for the latter two
FENCE = re.compile(r"^[^\S\n]*(```|~~~)", re.MULTILINE)
LIST_ITEM = re.compile(r"[^\S\n]*(?:[-*+•]|\(?\d{1,3}[.)]|\(?[a-z][.)])[^\S\n]+\S")
PARAGRAPH = re.compile(r".*?(?:\n[^\S\n]*\n\s*|\Z)", re.DOTALL)
SENTENCE = re.compile(r".*?(?:[.!?…][\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])|\Z)", re.DOTALL)

StepKind = Literal["understand", "risk", "rule_cite", "reflect", "plan", "decide", "solve"]
STEP_KINDS: tuple[str, ...] = get_args(StepKind)


@dataclass(frozen=True)
class Step:
    """One step: characters [start, end) of the reasoning, space after it included."""

    start: int
    end: int
    text: str
    kind: StepKind


def segment(reasoning: str) -> list[Step]:
    """The steps of a reasoning (without its tags), which joined are the reasoning again.

    Paragraphs; fenced code and lists stay whole; paragraphs of more than 80 words are cut at ends
    of sentences; pieces of fewer than 4 words join the next (a closing decision stands alone); at
    most 24, the shortest neighbours joined. SaRO's training cuts pairs by `steps` instead, which
    knows nothing but blank lines.
    """
    pieces: list[str] = []
    for block in _blocks(reasoning):
        whole = FENCE.search(block) or LIST_ITEM.match(block) or _words(block) <= LONG_STEP
        pieces += [block] if whole else _sentences(block)
    merged = _merged(pieces)
    while len(merged) > MAX_STEPS:
        sizes = [_words(a) + _words(b) for a, b in itertools.pairwise(merged)]
        at = sizes.index(min(sizes))
        merged[at : at + 2] = [merged[at] + merged[at + 1]]
    found: list[Step] = []
    start = 0
    for text in merged:
        end = start + len(text)
        kind = _kind(text, [step.text for step in found], end == len(reasoning))
        found.append(Step(start, end, text, kind))
        start = end
    return found


def _blocks(text: str) -> list[str]:
    """Paragraphs with the blank lines after them; code fences and lists in one piece."""
    blocks: list[str] = []
    fenced = False
    for paragraph in PARAGRAPH.findall(text):
        if not paragraph:
            continue
        goes_on = fenced
        fenced ^= len(FENCE.findall(paragraph)) % 2 == 1
        in_list = bool(blocks) and LIST_ITEM.match(paragraph) and _ends_in_list(blocks[-1])
        if blocks and (goes_on or in_list or not blocks[-1].strip()):
            blocks[-1] += paragraph
        else:
            blocks.append(paragraph)
    return blocks


def _ends_in_list(block: str) -> bool:
    lines = block.strip().splitlines()
    return bool(lines) and LIST_ITEM.match(lines[-1]) is not None


def _sentences(block: str) -> list[str]:
    """Sentences put together again up to LONG_STEP words."""
    pieces: list[str] = []
    for sentence in SENTENCE.findall(block):
        if pieces and _words(pieces[-1]) + _words(sentence) <= LONG_STEP:
            pieces[-1] += sentence
        elif sentence:
            pieces.append(sentence)
    return pieces


def _merged(pieces: Sequence[str]) -> list[str]:
    merged: list[str] = []
    short = ""
    for number, piece in enumerate(pieces):
        piece = short + piece
        short = ""
        last = number == len(pieces) - 1
        if _words(piece) >= SHORT_STEP or (last and decision(piece) is not None):
            merged.append(piece)
        elif not last:
            short = piece
        elif merged:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _words(text: str) -> int:
    return len(text.split())


# ---- what a step does ----------------------------------------------------------------------------

RULE = re.compile(r"\b(?:[A-Z]+[0-9]+\.R[0-9]+|G[0-9]+)\b")
# At the start of a sentence only: inside one, and looser words, they mean nothing.
STRICT_MARKER = re.compile(
    r"(?:^|[.!?…]\s+|\n\s*)[\"'“(*-]*\s*"
    r"(?:wait|hold on|hang on|actually,|on second thought|stepping back|looking again|"
    r"let me (?:re-?check|re-?consider|re-?read|re-?think|check (?:that|this|it) again|check)|"
    r"let me take (?:that|this) back)(?![\w-])",
    re.IGNORECASE,
)
# A judgement on a thought before: which, or that it was wrong.
REASSESSMENT = re.compile(
    r"\b(?:step \d+|(?:the|my|that) (?:previous|last|earlier|first) (?:step|thought|reading|point|"
    r"idea|conclusion|assumption|instinct)|at face value|i (?:just |had |have |was |too quickly )*"
    r"(?:assum(?:ed|ing)|missed|overlook(?:ed|ing)|misread|misjudged|skipped|ignored|mistook|"
    r"let|treated|took|about to|going to|too quick|wrong|said|accepted|concluded|reacted)|"
    r"(?:that|this|it) (?:was|is|would be) (?:wrong|a mistake|too (?:quick|hasty|cautious|easy|"
    r"literal)|not right|only (?:the|a) (?:frame|wrapper|surface))|does not hold|doesn't hold|"
    r"(?:is|was|are|were) not what it (?:looked|seemed|sounded) like|not as (?:harmless|dangerous) "
    r"as|on a (?:closer|second) look|i should not have|i shouldn't have|i need to correct)\b",
    re.IGNORECASE,
)
FORBIDS = re.compile(
    r"\b(?:harm(?:s|ful|ing)?|hurts?|danger(?:ous)?|illegal|unlawful|crim(?:e|inal)|victims?|abuse|"
    r"violat\w+|unsafe|refuse|declin\w+|forbids?|forbidden|rules? (?:it|this|that) out|not allowed|"
    r"(?:must|should|will|can)(?: ?not|n't) (?:help|assist|provide|give|write|comply)|won't|"
    r"can't (?:help|assist|provide|give|write))\b",
    re.IGNORECASE,
)
ALLOWS = re.compile(
    r"\b(?:harmless|benign|innocent|safe to (?:answer|help)|no (?:rule|policy|category) applies|"
    r"nothing (?:wrong|harmful)|(?:nobody|no one) (?:is|would be) (?:hurt|"
    r"harmed|at risk)|(?:can|will|should|may|happily|gladly) (?:\w+ )?(?:answer|help|comply|"
    r"explain|write|give)|is (?:fine|allowed|welcome)|allows|just (?:a|an) (?:story|game|question|"
    r"exercise)|decision:\W*comply)\b",
    re.IGNORECASE,
)
NEGATED = re.compile(
    r"\b(?:no|not|never|without(?: any)?|nothing|n't|harmless|isn't|avoid(?:s|ing)?|prevent\w*)\s+"
    r"(?:\w+ )?(?:harm\w*|danger\w*|illegal|unlawful|crim\w+|unsafe|abuse|hurt\w*)\b",
    re.IGNORECASE,
)
PLANS = re.compile(
    r"\b(?:i(?:'ll| will| can| could| should| want to| am going to)|let me|let's|the answer "
    r"(?:should|will)|my answer|instead|offer|first,? i|the plan)\b",
    re.IGNORECASE,
)
UNDERSTANDS = re.compile(
    r"\b(?:the (?:user|person|request|question|prompt|message|task)|someone|they|this|it) "
    r"(?:\w+ ){0,2}(?:asks?|wants?|is asking|is about|requests?|needs?|looks? for|means?|seems? to|"
    r"would like)\b|"
    r"\b(?:underneath|stripped of|behind the|in other words|the frame|what is (?:really )?asked)\b",
    re.IGNORECASE,
)

Stance = Literal["allows", "forbids"]
Reflection = Literal["marked", "unmarked"]


def stance(text: str) -> Stance | None:
    """Which way a step leans, by its words; None where it leans neither way or both."""
    mode = decision(text)
    if mode is not None:
        return "allows" if mode.startswith("comply") else "forbids"
    text = NEGATED.sub(" harmless ", text)
    forbids, allows = len(FORBIDS.findall(text)), len(ALLOWS.findall(text))
    if forbids == allows:
        return None
    return "forbids" if forbids > allows else "allows"


def has_marker(text: str) -> bool:
    """Whether a sentence of the text opens with a strict marker ("Wait", "Let me recheck")."""
    return STRICT_MARKER.search(text) is not None


def reflection(step: str, before: Sequence[str]) -> Reflection | None:
    """Whether a step takes back a thought before it: with a strict marker, or without one.

    marked: a strict marker, and a change of stance or a judgement on what was thought. unmarked:
    both of the latter. A marker alone is not enough, nor is a first step. By words only: a prior,
    to be checked by a model where it matters.
    """
    if not before:
        return None
    judges = REASSESSMENT.search(step) is not None
    earlier = next((found for one in reversed(before) if (found := stance(one))), None)
    # Where both views are named, what stands last is the new one.
    now = stance(step) or stance(re.split(r"\b(?:but|yet)\b|;", step)[-1])
    changes = now is not None and earlier is not None and now != earlier
    if has_marker(step):
        return "marked" if judges or changes else None
    return "unmarked" if judges and changes else None


def cited_rules(text: str) -> list[str]:
    """The ids of rules that a text names, such as P3.R1 or G2, in the order of first mention."""
    return list(dict.fromkeys(RULE.findall(text)))


def without_decision(reasoning: str) -> str:
    """The reasoning without its last line where that is the decision."""
    if decision(reasoning) is None:
        return reasoning
    return "\n".join(reasoning.rstrip().splitlines()[:-1]).rstrip()


def _kind(text: str, before: Sequence[str], last: bool) -> StepKind:
    """What a step does, by its words."""
    if last and decision(text) is not None:
        return "decide"
    if reflection(text, before):
        return "reflect"
    if RULE.search(text) or re.search(r"\bno (?:rule|policy|category) applies\b", text, re.I):
        return "rule_cite"
    if not before and UNDERSTANDS.search(text):
        return "understand"
    if FORBIDS.search(NEGATED.sub("", text)):
        return "risk"
    if UNDERSTANDS.search(text):
        return "understand"
    return "plan" if PLANS.search(text) else "solve"
