"""Owns the benchmarks: declared in benchmarks.yaml, read into the questions asked of models."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import Field

from saro_jax.config.values import nearest
from saro_jax.data.sources import raw_records
from saro_jax.records import KINDS, Input, Kind, Part, Text, normalised, sha256, to_json
from saro_jax.text import wrappers

FILE = Path(__file__).parent / "benchmarks.yaml"
# Columns of files that no entry describes, looked for in this order.
OWN_COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "query", "instruction", "problem", "text", "goal"),
    "id": ("id",),
    "category": ("category", "categories", "type"),
    "answer": (),
    "base_id": ("base_id",),
    "attack": ("attack",),
}
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
Judge = Literal["refusal", "guard", "strongreject", "harmbench", "number"]
About = Literal["safety", "over_refusal", "mixed", "capability"]


class Entry(Part):
    """A benchmark as declared; the keys are explained at the head of benchmarks.yaml."""

    title: Text
    source: Text | None
    split: str = "train"
    columns: dict[str, str | list[str]]
    kind: str | dict[str, str] = Field(description="of all rows, or by the values of a column")
    where: dict[str, list[str]] | None = None
    strip: tuple[str, ...] = ()
    wrap: Literal["held_out"] | None = None
    license: str
    about: About
    protocol: Text
    judge: Judge
    metric: Text
    lm_eval: str | None = None


@dataclass(frozen=True)
class Question:
    """One prompt of a benchmark; `base_id` is the clean request behind it, `answer` what is right.

    `original` is the text of that clean request, which judges of harm are asked about too.
    """

    id: str
    base_id: str
    prompt: str
    kind: Kind
    category: str = ""
    attack: str | None = None
    original: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Chosen:
    """A benchmark that is to be run: which entry, where its rows are, how many of them."""

    name: str
    entry: Entry
    source: str
    limit: int | None


@cache
def entries() -> dict[str, Entry]:
    """The packaged benchmarks by name."""
    given = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: Entry.model_validate(fields) for name, fields in given.items()}


def choose(given: Sequence[str], option: str) -> list[Chosen]:
    """Benchmarks of texts NAME[=[KIND:]SOURCE][@ROWS].

    A NAME that is packaged takes its rows from SOURCE instead, if there is one; any other NAME is a
    set of the user's, of KIND, or of the kinds that its column `kind` says.
    """
    found: dict[str, Chosen] = {}
    for text in given:
        chosen = _choose(text, f"{option}={text}")
        if chosen.name in found:
            raise ValueError(f"{option}={text}: {chosen.name} is given twice")
        found[chosen.name] = chosen
    return list(found.values())


def _choose(text: str, where: str) -> Chosen:
    name, equals, rest = text.partition("=")
    whole, at, rows = (rest if equals else name).rpartition("@")
    limit = None
    if at:
        if not rows.isdigit() or not int(rows):
            raise ValueError(f"{where}: expected a number of rows after @, got {rows!r}")
        limit = int(rows)
    else:
        whole = rows
    name, source = (name, whole) if equals else (whole, "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+-]*", name):
        raise ValueError(f"{where}: {name!r} is no name: letters, digits, _ + -")
    entry = entries().get(name)
    if entry is None:
        if not equals:
            raise ValueError(
                f"{where}: unknown benchmark{nearest(name, list(entries()))}; a file of prompts is "
                f"given as NAME=KIND:FILE"
            )
        kind, colon, path = source.partition(":")
        if not colon or kind not in KINDS:
            kind, path = "", source
        return Chosen(name, _own(name, kind), path, limit)
    if entry.lm_eval:
        raise ValueError(
            f"{where}: runs in lm-evaluation-harness: python -m saro_jax.lm_eval "
            f"--model_args pretrained=MODEL --tasks {entry.lm_eval}"
        )
    source = source or entry.source or ""
    if not source:
        raise ValueError(f"{where}: is not on the Hub; give its file: {name}=FILE")
    return Chosen(name, entry, source, limit)


def _own(name: str, kind: str) -> Entry:
    harmful = kind in ("harmful", "jailbreak")
    about: About = "safety" if harmful else "over_refusal" if kind else "mixed"
    return Entry(
        title=name,
        source=None,
        columns={field: list(names) for field, names in OWN_COLUMNS.items()},
        kind=kind or {"column": "kind"},
        license="",
        about=about,
        protocol="single turn",
        judge="guard" if harmful else "refusal",
        metric="asr_answer" if harmful else "over_refusal",
    )


def read(chosen: Chosen, seed: int = 0) -> tuple[list[Question], Input]:
    """The questions of a benchmark and what was read; a row that is none is an error.

    A limit draws that many rows, by seed, from each kind and category in its share, and keeps their
    order; disguises go around what was drawn.
    """
    digest = hashlib.sha256()
    questions: dict[str, Question] = {}
    count = 0
    for where, record in raw_records(chosen.source, chosen.entry.split):
        count += 1
        if isinstance(record, str):
            raise ValueError(f"{where}: {record}")
        digest.update(to_json(record).encode("utf-8", "backslashreplace"))
        wanted = chosen.entry.where or {}
        if any(str(record.get(column)) not in values for column, values in wanted.items()):
            continue
        question = _question(where, record, chosen.entry, count)
        if question.id in questions:
            raise ValueError(f"{where}: id: {question.id!r} is given twice")
        questions[question.id] = question
    if not questions:
        raise ValueError(f"{chosen.source}: no rows for {chosen.name}")
    kept = _drawn(list(questions.values()), chosen.limit, seed)
    if chosen.entry.wrap:
        kept = [one for question in kept for one in _wrapped(question)]
    path = Path(chosen.source).expanduser()
    source = chosen.source if not path.is_file() else path.name
    return kept, Input(source, count, digest.hexdigest(), path if path.is_file() else None)


def _question(where: str, record: Mapping[str, Any], entry: Entry, number: int) -> Question:
    prompt = _value(record, entry.columns.get("prompt", ()))
    for frame in entry.strip:
        prompt = prompt.removeprefix(frame.strip()).removesuffix(frame.strip()).strip()
    if not prompt:
        raise ValueError(f"{where}: no prompt: looked for {_names(entry, 'prompt')}")
    kind = entry.kind
    if isinstance(kind, dict):
        value = _value(record, kind["column"])
        kind = kind.get(value, value)
    if kind not in KINDS:
        raise ValueError(f"{where}: kind: {kind!r}; expected {' or '.join(KINDS)}")
    answer = None
    if entry.judge == "number":
        given = _value(record, entry.columns["answer"])
        answer = number_of(given.rpartition("####")[2])
        if answer is None:
            raise ValueError(f"{where}: {_names(entry, 'answer')}: no number in {given[-40:]!r}")
    name = _value(record, entry.columns.get("id", ())) or str(number)
    base = _value(record, entry.columns.get("base_id", ()))
    # The clean request itself can be what ties its disguises together.
    original = base if len(base.split()) > 1 else None
    base = sha256(normalised(base))[:16] if original else base
    attack = _value(record, entry.columns.get("attack", ())) or None
    category = _value(record, entry.columns.get("category", ()))
    return Question(
        name,
        base or name,
        prompt,
        cast(Kind, kind),
        category,
        attack,
        original,
        answer,
    )


def _value(record: Mapping[str, Any], names: str | Sequence[str]) -> str:
    for name in [names] if isinstance(names, str) else names:
        value = record.get(name)
        if isinstance(value, list) and value and isinstance(value[0], str):
            value = value[0]
        if isinstance(value, dict):
            value = value.get("name")
        if isinstance(value, str | int | float) and str(value).strip():
            return str(value).strip()
    return ""


def _names(entry: Entry, field: str) -> str:
    names = entry.columns.get(field, field)
    return names if isinstance(names, str) else ", ".join(names)


def _drawn(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """About `limit` questions, exactly where there are so many: of each stratum its share."""
    if limit is None or limit >= len(questions):
        return questions
    strata: dict[tuple[str, str], list[Question]] = {}
    for one in sorted(questions, key=lambda one: sha256(f"{seed}:{one.id}:{one.prompt}")):
        strata.setdefault((one.kind, one.category), []).append(one)
    # The k-th of a stratum of n stands at (k + 1/2) / n: the first places are a fair share of all.
    # Strata of one size tie there, and are drawn among by hash.
    placed = [
        ((k + 0.5) / len(members), sha256(f"{seed}:{one.id}"), one.id)
        for members in strata.values()
        for k, one in enumerate(members)
    ]
    keep = {name for _, _, name in sorted(placed)[:limit]}
    return [one for one in questions if one.id in keep]


def _wrapped(question: Question) -> list[Question]:
    kind: Kind = "jailbreak" if question.kind in ("harmful", "jailbreak") else "borderline"
    return [
        Question(
            id=f"{question.id}:{one.id}",
            base_id=question.base_id,
            prompt=one.around(question.prompt),
            kind=kind,
            category=question.category,
            attack=one.id,
            original=question.prompt,
        )
        for one in wrappers.load()
        if one.held_out
    ]


def number_of(text: str) -> str | None:
    """The last number of a text in one spelling ("1,234.50" is "1234.5"); None without one."""
    found = NUMBER.findall(text)
    if not found:
        return None
    whole, _, part = found[-1].replace(",", "").partition(".")
    sign = "-" if whole.startswith("-") else ""
    whole = whole.removeprefix("-").lstrip("0") or "0"
    part = part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return number if number == "0" else sign + number
