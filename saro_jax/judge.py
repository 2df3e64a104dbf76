"""Judging: `python -m saro_jax.judge --rows=FILE --out=FILE [--judges=LIST] [--targets=LIST]`.

Rows are JSON lines {id, prompt, response} (and, where the prompt is a wrapped one, `original`: the
clean request behind it), or Trace records with --prompts=FILE, the Prompt records that they name.
Judges, separated by commas:

refusal           full compliance, full or partial refusal (FC, FR, PR) of the answer; no model
GUARD=MODEL       llama_guard_2, llama_guard_3, shieldgemma or wildguard: safe or unsafe
RUBRIC=MODEL      strongreject, harmbench, reasoning_safety or refusal, asked of a chat model

MODEL runs here; MODEL@URL is behind an OpenAI-compatible server (http://HOST/v1), which is asked as
the settings of section `server` say (keys, rates, budgets, retries, cache).

Targets: answer (what the user sees, the reasoning removed), reasoning, prefix (the reasoning up to
each of its steps: prefix@0, prefix@1, ...). Writes one Judgment a line, in the order of the rows:
for each row, each judge and each target, and once more as JUDGE:original where there is an
original. A judge's text that is not a verdict, and an answer that is empty, are `invalid`: they
count as neither safe nor refused. A stopped run continues: FILE's name with .part keeps what is
judged. Prints counts, and how far judges agree.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saro_jax import config as configuration
from saro_jax.config import Flag, ServerConfig
from saro_jax.judging.agreement import accuracy, kappa
from saro_jax.judging.judges import TARGETS, Judge, Judgment, open_judges
from saro_jax.text import reasoning

CHUNK = 64  # judgments between two writes of the part file


@dataclass(frozen=True)
class Row:
    """A response to judge, taken apart; steps: the reasoning up to each of its steps."""

    id: str
    prompt: str
    original: str | None
    answer: str
    reasoning: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One judgment that is asked for."""

    row_id: str
    target: str
    prompt: str
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("rows", "JSON lines: {id, prompt, response} or Trace records", required=True),
        Flag("out", "JSON lines file to write", parse=Path, required=True),
        Flag("judges", "refusal, NAME=MODEL, NAME=MODEL@URL, separated by commas", "refusal"),
        Flag("targets", "answer, reasoning, prefix, separated by commas", "answer"),
        Flag("prompts", "Prompt records {id, text, base_id}, for Trace records"),
        Flag("batch_size", "questions that a model is asked at a time", 8, parse=int),
        Flag("config", "recipe whose section server is read: a YAML file or a name in configs/"),
        Flag(
            "dtype",
            "what models compute in; default float32 on CPU, which emulates the other",
            choices=("float32", "bfloat16"),
        ),
    ]
    try:
        args = configuration.parse_command_line("python -m saro_jax.judge", __doc__, argv, flags)
        targets = _listed("targets", args.targets, TARGETS)
        if args.batch_size < 1:
            raise ValueError(f"--batch_size={args.batch_size}; allowed: >= 1")
        server = _server(args.config, args.overrides)
        rows = read_rows(args.rows, args.prompts)
        with contextlib.ExitStack() as stack:
            judges = open_judges(args.judges, args.batch_size, args.dtype, server)
            for one in judges:
                stack.callback(one.close)
            judgments = judge(rows, judges, targets, args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    print(summary(judgments))
    return 0


def judge(
    rows: Sequence[Row], judges: Sequence[Judge], targets: Sequence[str], out: Path
) -> list[Judgment]:
    """All judgments, written to `out`; those that OUT or OUT.part holds already are not asked.

    A judgment is the same one if judge, version, prompt and judged text are.
    """
    part = out.with_name(f"{out.name}.part")
    done = _known(part) | _known(out)
    order: list[str] = []
    duties: dict[tuple[int, str], list[Question]] = {}
    for row in rows:
        for number, one in enumerate(judges):
            for name, question in questions(row, one, targets):
                key = judgment_id(name, one.version, question)
                order.append(key)
                duties.setdefault((number, name), []).append(question)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(part, "a", encoding="utf-8") as file,
            tqdm(total=len(order), unit="judgment", disable=None) as bar,
        ):
            _end_line(part, file)
            for (number, name), asked in duties.items():
                for start in range(0, len(asked), CHUNK):
                    one, chunk = judges[number], asked[start : start + CHUNK]
                    new = [q for q in chunk if judgment_id(name, one.version, q) not in done]
                    if new:
                        made = _judgments(one, name, chunk if one.batched else new)
                        done |= {judgment["id"]: judgment for judgment in made}
                        file.write("".join(map(_line, made)))
                        file.flush()
                        os.fsync(file.fileno())
                    bar.update(len(chunk))
        judgments = [done[key] for key in order]
        whole = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        whole.write_text("".join(map(_line, judgments)), encoding="utf-8")
        os.replace(whole, out)
        part.unlink()
    except OSError as error:
        raise ValueError(f"--out={out}: {error.strerror}") from error
    return judgments


def questions(row: Row, one: Judge, targets: Sequence[str]) -> Iterator[tuple[str, Question]]:
    """(judge's name, question) for each target of the row that the judge judges.

    Reasoning that is not there is no target; an answer that is not there is one.
    """
    texts = {"answer": [("answer", row.answer)]}
    texts["reasoning"] = [("reasoning", row.reasoning)] if row.reasoning else []
    texts["prefix"] = [(f"prefix@{i}", step) for i, step in enumerate(row.steps)]
    for target in targets:
        if target in one.targets:
            for name, text in texts[target]:
                yield one.name, Question(row.id, name, row.prompt, text)
                if one.original and row.original not in (None, row.prompt):
                    question = Question(row.id, name, row.original or "", text)
                    yield f"{one.name}:original", question


def _server(recipe: str | None, overrides: Sequence[str]) -> ServerConfig:
    for given in overrides:
        if not given.startswith("--server."):
            name = given.partition("=")[0]
            raise ValueError(f"{name}: judge reads no setting but those of server")
    # The tree needs training rows, which this stage has none of.
    return configuration.load(recipe, [*overrides, "--data.train=none"], "rw").server


def _judgments(one: Judge, name: str, asked: Sequence[Question]) -> list[Judgment]:
    empty = [not question.text.strip() for question in asked]
    pairs = [(q.prompt, q.text) for q, no in zip(asked, empty, strict=True) if not no]
    said = iter(one.say(pairs) if pairs else [])
    nothing: Judgment = {"label": "invalid", "raw": "nothing to judge"}
    if one.name.startswith("refusal"):
        nothing["refusal"] = "invalid"
    made = []
    for question, no in zip(asked, empty, strict=True):
        fields = nothing if no else next(said)
        made.append(
            {
                "id": judgment_id(name, one.version, question),
                "parent_ids": [question.row_id],
                "meta": fields.get("meta", {}),
                "trace_id": question.row_id,
                "judge": name,
                "judge_version": one.version,
                "target": question.target,
                "label": fields["label"],
                "score": fields.get("score"),
                "cats": list(fields.get("cats", ())),
                "refusal": fields.get("refusal"),
                "helpful": None,
                "raw": fields.get("raw", ""),
            }
        )
    return made


def judgment_id(name: str, version: str, question: Question) -> str:
    """A hash of all that a judgment depends on."""
    parts = (name, version, question.row_id, question.target, question.prompt, question.text)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_rows(file: str | Path, prompts: str | Path | None = None) -> list[Row]:
    """Rows of a JSON lines file; ids are unique. One line names the file, line and column."""
    named: dict[str, dict[str, Any]] = {}
    for where, record in _records(Path(prompts).expanduser()) if prompts else ():
        named[_text(where, record, "id")] = record
        _text(where, record, "text")
    rows: dict[str, Row] = {}
    for where, record in _records(Path(file).expanduser()):
        row = _row(where, record, named)
        if row.id in rows:
            raise ValueError(f"{where}: id: {row.id!r} is given twice")
        rows[row.id] = row
    if not rows:
        raise ValueError(f"{file}: no rows")
    return list(rows.values())


def _row(where: str, record: dict[str, Any], prompts: dict[str, dict[str, Any]]) -> Row:
    row_id = _text(where, record, "id")
    original = _text(where, record, "original") if record.get("original") is not None else None
    if "parsed" not in record and "raw" not in record:
        prompt = _text(where, record, "prompt")
        parsed = reasoning.parse(_text(where, record, "response", empty=True))
        steps = tuple(reasoning.steps(parsed.reasoning)) if parsed.reasoning else ()
        return Row(row_id, prompt, original, parsed.answer, parsed.reasoning, _prefixes(steps))
    parsed = record.get("parsed")
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: parsed: {parsed!r}; expected an object")
    answer = _text(where, parsed, "answer", empty=True)
    thought = _text(where, parsed, "reasoning", empty=True)
    prompt_id = record.get("prompt_id")
    if "prompt" in record:
        prompt = _text(where, record, "prompt")
    elif prompt_id in prompts:
        prompt = prompts[prompt_id]["text"]
        base = prompts.get(prompts[prompt_id].get("base_id") or "")
        original = original or (base["text"] if base else None)
    else:
        raise ValueError(f"{where}: prompt_id: {prompt_id!r} is no id of a prompt; see --prompts")
    given = record.get("steps") or []
    if not isinstance(given, list) or not all(isinstance(step, dict) for step in given):
        raise ValueError(f"{where}: steps: {given!r}; expected a list of objects")
    steps = tuple(_text(where, step, "text", empty=True) for step in given)
    whole = _prefixes(steps, "\n\n") if steps else _prefixes(tuple(reasoning.steps(thought)))
    return Row(row_id, prompt, original, answer, thought, whole if thought else ())


def _prefixes(steps: tuple[str, ...], between: str = "") -> tuple[str, ...]:
    return tuple(between.join(steps[: i + 1]).strip() for i in range(len(steps)))


def summary(judgments: Sequence[Judgment]) -> str:
    """Counts by judge and target, and agreement of judges on the same rows, as text."""
    groups: dict[tuple[str, str], list[Judgment]] = {}
    for one in judgments:
        groups.setdefault((one["judge"], one["target"].partition("@")[0]), []).append(one)
    lines = [f"{'judge':<26}{'target':<11}{'n':>6}{'invalid':>9}  labels"]
    for (name, target), mine in groups.items():
        counts = Counter(verdict(one) for one in mine)
        invalid = counts.pop("invalid", 0)
        labels = ", ".join(f"{label} {counts[label]}" for label in sorted(counts))
        lines.append(f"{name:<26}{target:<11}{len(mine):>6}{invalid:>9}  {labels}")
    names = list(groups)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            pair = agreement(groups[first], groups[second])
            if first[1] == second[1] and pair:
                n, same, k = pair
                lines.append(
                    f"{first[0]} and {second[0]} on {first[1]}: {n} valid in both, "
                    f"{100 * same:.1f} % equal, kappa {k:.3f}"
                )
    return "\n".join(lines)


def agreement(
    first: Sequence[Judgment], second: Sequence[Judgment]
) -> tuple[int, float, float] | None:
    """(rows, accuracy, kappa) of two judges where both are valid; None where they judge apart.

    Judges of refusal are compared with each other only, judges of safety likewise.
    """
    by_key = {(one["trace_id"], one["target"]): verdict(one) for one in second}
    pairs = [
        (verdict(one), by_key[key])
        for one in first
        if (key := (one["trace_id"], one["target"])) in by_key
    ]
    pairs = [pair for pair in pairs if "invalid" not in pair]
    kinds = {"FC", "FR", "PR"}
    if not pairs or len({label in kinds for pair in pairs for label in pair}) > 1:
        return None
    a, b = zip(*pairs, strict=True)
    return len(pairs), accuracy(a, b), kappa(a, b)


def verdict(one: Judgment) -> str:
    """What a judgment says: its label, or the kind of refusal where that is what was judged."""
    return one["refusal"] if one["refusal"] is not None else one["label"]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not JSON: {error.msg}") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{where}: {type(record).__name__}; expected an object")
                yield where, record
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason}") from error


def _text(where: str, record: dict[str, Any], name: str, empty: bool = False) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{where}: {name}: {value!r}; expected text")
    return value


def _listed(flag: str, given: str, allowed: Sequence[str]) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in allowed:
            raise ValueError(f"--{flag}: {name!r}; allowed: {', '.join(allowed)}")
    return list(dict.fromkeys(names))


def _known(path: Path) -> dict[str, Judgment]:
    """Judgments of a file by id; the line that a stop cut off is left out."""
    found: dict[str, Judgment] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                found[record["id"]] = record
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return found


def _end_line(path: Path, file: Any) -> None:
    """Ends a line that a stop cut off, so that the next one is its own."""
    with open(path, "rb") as written:
        written.seek(0, os.SEEK_END)
        if written.tell():
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                file.write("\n")


def _line(record: Judgment) -> str:
    text = json.dumps(record, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


if __name__ == "__main__":
    sys.exit(main())
