"""Rows: training examples and preference pairs, of whatever columns, in one form."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from saro_jax.data.sources import raw_records
from saro_jax.text.chat import ROLES, Message

StageKind = Literal["sft", "preference", "unpaired", "samples"]
Turns = tuple[Message, ...]

# (prompt column, answer column) of public sets, in the order they are looked for.
ANSWER_COLUMNS = (
    ("prompt", "completion"),
    ("question", "response"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("query", "response"),
    ("instruction", "response"),
    ("problem", "solution"),
)
SFT_FORMS = (
    "messages",
    "prompt + reasoning + answer",
    *(f"{prompt} + {answer}" for prompt, answer in ANSWER_COLUMNS),
)


@dataclass(frozen=True)
class SFTRow:
    """One training example: the assistant turns of `completion` are learned, `prompt` is given."""

    id: str
    where: str
    kind: str
    weight: float
    prompt: Turns
    completion: Turns


@dataclass(frozen=True)
class PreferenceRow:
    """One preference pair: two continuations of the same conversation.

    `prefix` is the unfinished assistant turn that both continue (empty for outcome pairs); it
    stands before the first text of `chosen` and of `rejected`. Where prompt, chosen and rejected
    are strings they are raw text, rendered without a chat template. `noise` is the probability that
    the preference is the wrong way round; None where the row does not say.
    """

    id: str
    where: str
    kind: str
    weight: float
    prompt: Turns | str
    prefix: str
    chosen: Turns | str
    rejected: Turns | str
    noise: float | None = None


@dataclass(frozen=True)
class UnpairedRow:
    """One response with a verdict: `label` is whether it is desirable.

    `prefix` is the unfinished assistant turn that `completion` continues, empty for a whole one.
    """

    id: str
    where: str
    kind: str
    weight: float
    prompt: Turns
    prefix: str
    completion: Turns
    label: bool
    noise: float | None = None


@dataclass(frozen=True)
class SamplesRow:
    """Several responses to one prompt, such as n samples of it; only for scoring.

    `prefix` is the unfinished assistant turn that all of them continue, empty for whole ones.
    """

    id: str
    where: str
    kind: str
    weight: float
    prompt: Turns
    prefix: str
    completions: tuple[Turns, ...]


Row = SFTRow | PreferenceRow | UnpairedRow | SamplesRow
# Reasons of rejects, up to the colon, that mean: rows for another loss.
PAIRED, UNPAIRED = "paired row", "unpaired row"


@dataclass(frozen=True)
class Reject:
    """A row that is not used; `reason` is "category: detail", `id` empty where none was read."""

    where: str
    id: str
    reason: str


def read(
    sources: str | Sequence[str], stage_kind: StageKind, split: str = "train"
) -> tuple[list[Any], list[Reject]]:
    """Reads all rows of the sources, in order and of one class by stage_kind, and the rejects.

    A source is a .jsonl (or .jsonl.zst), .json, .parquet or .csv file, a folder of such files
    (those named after the split if there are any, else all but manifests and rejects),
    "quickstart:NAME" of the package, or a hub id, "id" or "id:config". `split` also picks the hub
    split; a single file ignores it.

    SFT rows are recognised by their columns, see SFT_FORMS. Preference rows have `chosen` and
    `rejected`, with `prompt` or sharing their first turns (or first words, then raw text), and may
    have `prefix` and `noise`. Unpaired rows have `prompt`, `completion` and `label` (true, false),
    and may have `prefix`. All may have `id`, `kind` and `weight`; further columns are ignored.
    Without an id a row gets a hash of its content, numbered where the same content comes again.

    Raises ValueError, in one line, for a source that cannot be read or has no rows.
    """
    parse = PARSERS[stage_kind]
    rows: list[Any] = []
    rejects: list[Reject] = []
    seen: dict[str, str] = {}
    for source in [sources] if isinstance(sources, str) else sources:
        before = len(rows) + len(rejects)
        for where, record in raw_records(source, split):
            row_id = ""
            try:
                if isinstance(record, str):
                    raise ValueError(record)
                record = {key: value for key, value in record.items() if value is not None}
                row_id = _explicit_id(record)
                if row_id in seen and row_id:
                    raise ValueError(f"duplicate id: {row_id!r}, first at {seen[row_id]}")
                row = parse(record, where, row_id)
            except ValueError as error:
                rejects.append(Reject(where, row_id, str(error)))
                continue
            if not row_id:
                row = replace(row, id=_unused(_content_hash(row), seen))
            seen[row.id] = where
            rows.append(row)
        if len(rows) + len(rejects) == before:
            raise ValueError(f"{source}: no rows")
    return rows, rejects


def detect_kind(sources: str | Sequence[str], split: str = "train") -> StageKind:
    """What the first readable row is for: "preference" if it has `chosen` and `rejected`.

    "samples" if it has `completions`, else "sft".
    """
    for source in [sources] if isinstance(sources, str) else sources:
        for _, record in raw_records(source, split):
            if not isinstance(record, str):
                if {"chosen", "rejected"} <= set(record):
                    return "preference"
                return "samples" if "completions" in record else "sft"
    return "sft"


def write_rejects(path: str | Path, rejects: Sequence[Reject]) -> None:
    """Writes JSON lines {where, id, reason}; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        for reject in rejects:
            record = {"where": reject.where, "id": reject.id, "reason": reject.reason}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def check_share(rejects: Sequence[Reject], total: int, max_share: float) -> None:
    """Raises ValueError where more than max_share of `total` rows, rejects included, are bad."""
    if len(rejects) <= max_share * total:
        return
    category, count = most_frequent(rejects)[0]
    first = next(reject for reject in rejects if reject.reason.split(":")[0] == category)
    raise ValueError(
        f"{len(rejects)} of {total} rows rejected, data.max_reject_share={max_share:g} allows "
        f"{math.floor(max_share * total)}; {count} of them: {category}, first {first.where}: "
        f"{first.reason}"
    )


def most_frequent(rejects: Sequence[Reject]) -> list[tuple[str, int]]:
    """(category, count) of the rejects' reasons, the most frequent first."""
    return Counter(reject.reason.split(":")[0] for reject in rejects).most_common()


# Records to rows: ValueError("category: detail") rejects one.


def _sft_row(record: dict[str, Any], where: str, row_id: str) -> SFTRow:
    prompt, completion = _sft_turns(record)
    _check_prompt(prompt)
    if completion[0].role != "assistant" or completion[-1].role != "assistant":
        outer = f"{completion[0].role} ... {completion[-1].role}"
        raise ValueError(f"wrong turns: the answer is {outer}, must begin and end with assistant")
    return SFTRow(row_id, where, _kind(record, "sft"), _weight(record), prompt, completion)


def _sft_turns(record: dict[str, Any]) -> tuple[Turns, Turns]:
    if "messages" in record:
        messages = _turns(record["messages"], "messages", "user")
        roles = [message.role for message in messages]
        if "assistant" not in roles:
            raise ValueError("wrong turns: messages have no assistant turn")
        first = roles.index("assistant")
        return messages[:first], messages[first:]
    if {"prompt", "reasoning", "answer"} <= set(record):
        reasoning, answer = _text(record, "reasoning"), _text(record, "answer")
        text = f"<think>\n{reasoning}\n</think>\n\n{answer}"
        return _turns(record["prompt"], "prompt", "user"), (Message("assistant", text),)
    for prompt, answer in ANSWER_COLUMNS:
        if prompt in record and answer in record:
            return (
                _turns(record[prompt], prompt, "user"),
                _turns(record[answer], answer, "assistant"),
            )
    raise ValueError(f"missing columns: found {_names(record)}, allowed {'; '.join(SFT_FORMS)}")


def _preference_row(record: dict[str, Any], where: str, row_id: str) -> PreferenceRow:
    if {"completion", "label"} <= set(record) and not {"chosen", "rejected"} & set(record):
        raise ValueError(f"{UNPAIRED}: has completion and label, not chosen and rejected")
    for column in ("chosen", "rejected"):
        if column not in record:
            raise ValueError(f"missing column: {column!r}, found {_names(record)}")
    prefix = _prefix(record)
    prompt, chosen, rejected = _preference_turns(record)
    if isinstance(prompt, str) and prefix:
        raise ValueError("missing column: 'prompt', needed by a row with a prefix")
    if chosen == rejected:
        raise ValueError("chosen equals rejected: nothing to prefer")
    kind = _kind(record, "process" if prefix else "outcome")
    weight, noise = _weight(record), _noise(record)
    return PreferenceRow(row_id, where, kind, weight, prompt, prefix, chosen, rejected, noise)


def _unpaired_row(record: dict[str, Any], where: str, row_id: str) -> UnpairedRow:
    if {"chosen", "rejected"} <= set(record):
        raise ValueError(f"{PAIRED}: has chosen and rejected, not completion and label")
    for column in ("prompt", "completion", "label"):
        if column not in record:
            raise ValueError(f"missing column: {column!r}, found {_names(record)}")
    prompt = _turns(record["prompt"], "prompt", "user")
    completion = _turns(record["completion"], "completion", "assistant")
    _check_prompt(prompt)
    if completion[0].role != "assistant" or completion[-1].role != "assistant":
        outer = f"{completion[0].role} ... {completion[-1].role}"
        raise ValueError(f"wrong turns: completion is {outer}, must begin and end with assistant")
    prefix, label = _prefix(record), _label(record)
    kind = _kind(record, "process" if prefix else "outcome")
    weight, noise = _weight(record), _noise(record)
    return UnpairedRow(row_id, where, kind, weight, prompt, prefix, completion, label, noise)


def _samples_row(record: dict[str, Any], where: str, row_id: str) -> SamplesRow:
    for column in ("prompt", "completions"):
        if column not in record:
            raise ValueError(f"missing column: {column!r}, found {_names(record)}")
    prompt = _turns(record["prompt"], "prompt", "user")
    _check_prompt(prompt)
    given = record["completions"]
    if not isinstance(given, list) or not given:
        raise ValueError("wrong type: completions must be a list of one response or more")
    completions = tuple(_turns(one, "completions", "assistant") for one in given)
    for turns in completions:
        if turns[0].role != "assistant" or turns[-1].role != "assistant":
            outer = f"{turns[0].role} ... {turns[-1].role}"
            raise ValueError(
                f"wrong turns: a completion is {outer}, must begin and end with assistant"
            )
    kind, prefix = _kind(record, "samples"), _prefix(record)
    return SamplesRow(row_id, where, kind, _weight(record), prompt, prefix, completions)


PARSERS = {
    "sft": _sft_row,
    "preference": _preference_row,
    "unpaired": _unpaired_row,
    "samples": _samples_row,
}


def _prefix(record: dict[str, Any]) -> str:
    prefix = record.get("prefix", "")
    if not isinstance(prefix, str):
        raise ValueError(f"wrong type: prefix is {type(prefix).__name__}, must be a string")
    _check_unicode(prefix, "prefix")
    return prefix


def _preference_turns(
    record: dict[str, Any],
) -> tuple[Turns, Turns, Turns] | tuple[str, str, str]:
    prompt, chosen, rejected = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    if type(chosen) is not type(rejected):
        raise ValueError(
            f"wrong type: chosen is {type(chosen).__name__}, rejected is {type(rejected).__name__}"
        )
    if prompt is None and isinstance(chosen, str):
        return _split_texts(_text(record, "chosen"), _text(record, "rejected"))
    chosen_turns = _turns(chosen, "chosen", "assistant")
    rejected_turns = _turns(rejected, "rejected", "assistant")
    if prompt is not None and chosen_turns[0].role == rejected_turns[0].role == "assistant":
        prompt_turns = _turns(prompt, "prompt", "user")
    else:
        # Some sets have the prompt as a string and again as the first turns of both conversations.
        same = [a == b for a, b in zip(chosen_turns, rejected_turns, strict=False)]
        shared = same.index(False) if False in same else len(same)
        prompt_turns = chosen_turns[:shared]
        chosen_turns, rejected_turns = chosen_turns[shared:], rejected_turns[shared:]
        if not chosen_turns and not rejected_turns:
            raise ValueError("chosen equals rejected: nothing to prefer")
    _check_prompt(prompt_turns)
    for name, turns in (("chosen", chosen_turns), ("rejected", rejected_turns)):
        if not turns or turns[0].role != "assistant" or turns[-1].role != "assistant":
            found = turns[0].role if turns else "nothing"
            raise ValueError(
                f"wrong turns: {name} goes on with {found} after the shared turns, must begin and "
                "end with assistant"
            )
    return prompt_turns, chosen_turns, rejected_turns


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The shared start of two texts, and their ends with the space before them, as in TRL."""
    if chosen == rejected:
        raise ValueError("chosen equals rejected: nothing to prefer")
    same = (a == b for a, b in zip(chosen, rejected, strict=False))
    cut = next((i for i, equal in enumerate(same) if not equal), min(len(chosen), len(rejected)))
    if cut and chosen[cut - 1] == " ":
        cut -= 1
    if not chosen[:cut].strip():
        raise ValueError(
            "no shared start: chosen and rejected begin differently, and no prompt is given"
        )
    if not chosen[cut:].strip() or not rejected[cut:].strip():
        raise ValueError("empty text: one of chosen and rejected is the start of the other")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _turns(value: Any, column: str, role: str) -> Turns:
    """Messages of a column; a string is one turn of `role`."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ValueError(
            f"wrong type: {column} is {type(value).__name__}, must be string or messages"
        )
    if not value:
        raise ValueError(f"empty text: {column} has no messages")
    return tuple(_message(message, f"{column}[{i}]") for i, message in enumerate(value))


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"wrong type: {name} is {type(value).__name__}, must be {{role, content}}")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise ValueError(f"unknown role: {role!r} in {name}, allowed {', '.join(ROLES)}")
    if value.get("tool_calls"):
        raise ValueError(f"wrong turns: {name} calls tools, which are not supported")
    if not isinstance(content, str):
        raise ValueError(
            f"wrong type: the content of {name} is {type(content).__name__}, must be a string"
        )
    # An empty system turn says something: it replaces the template's default one.
    if role != "system" and not content.strip():
        raise ValueError(f"empty text: {name}")
    _check_unicode(content, name)
    return Message(role, content)


def _text(record: dict[str, Any], column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(f"wrong type: {column} is {type(value).__name__}, must be a string")
    if not value.strip():
        raise ValueError(f"empty text: {column}")
    _check_unicode(value, column)
    return value


def _check_unicode(text: str, name: str) -> None:
    # JSON may escape half of a surrogate pair; tokenizers and files refuse it much later.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not Unicode: lone surrogate in {name}") from error


def _check_prompt(prompt: Turns) -> None:
    if not prompt or prompt[-1].role != "user":
        found = prompt[-1].role if prompt else "nothing"
        raise ValueError(f"wrong turns: the prompt ends with {found}, must end with user")


def _explicit_id(record: dict[str, Any]) -> str:
    value = record.get("id", "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"wrong type: id is {type(value).__name__}, must be string or integer")
    return str(value)


def _kind(record: dict[str, Any], default: str) -> str:
    value = record.get("kind", default)
    if not isinstance(value, str) or not value:
        raise ValueError(f"wrong type: kind is {value!r}, must be a non-empty string")
    return value


def _weight(record: dict[str, Any]) -> float:
    value = record.get("weight", 1.0)
    weight = _number(value)
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"bad weight: {value!r}, must be a finite number of at least 0")
    return weight


def _noise(record: dict[str, Any]) -> float | None:
    value = record.get("noise")
    if value is None:
        return None
    noise = _number(value)
    if not 0 <= noise < 0.5:
        raise ValueError(f"bad noise: {value!r}, must be a number from 0 to below 0.5")
    return noise


def _label(record: dict[str, Any]) -> bool:
    value = record["label"]
    # CSV has strings only.
    words = {"true": True, "false": False, "1": True, "0": False}
    label = words.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if label is None:
        raise ValueError(f"bad label: {value!r}, must be true or false")
    return label


def _number(value: Any) -> float:
    """A number, NaN for what is none; CSV has strings only."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _content_hash(row: Row) -> str:
    if isinstance(row, SFTRow):
        parts = ["sft", row.prompt, row.completion]
    elif isinstance(row, UnpairedRow):
        parts = ["unpaired", row.prompt, row.prefix, row.completion, str(row.label)]
    elif isinstance(row, SamplesRow):
        parts = ["samples", row.prompt, row.prefix, *row.completions]
    else:
        parts = ["preference", row.prompt, row.prefix, row.chosen, row.rejected]
    plain = [
        part if isinstance(part, str) else [[turn.role, turn.content] for turn in part]
        for part in parts
    ]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def _unused(row_id: str, seen: dict[str, str]) -> str:
    number, candidate = 1, row_id
    while candidate in seen:
        number += 1
        candidate = f"{row_id}-{number}"
    return candidate


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "none"
