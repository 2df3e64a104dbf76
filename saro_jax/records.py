"""Records: what travels between the stages, the files that hold it, and where it all came from.

A stage leaves a folder: shards (JSON lines, `.jsonl` or `.jsonl.zst`), `rejects/` with what was
dropped and why, and `manifest.json`, which is written last: a folder without one is unfinished.
Work that costs something goes through a `Journal` first, which survives being killed at any byte.

`python -m saro_jax.records --file=pairs.jsonl --id=ID` prints what a record goes back to: prompts,
models with their hashes, policy versions, stages.
"""

import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from saro_jax.config import Flag, parse_command_line, provenance

Kind = Literal["harmful", "jailbreak", "benign", "borderline"]
KINDS: tuple[str, ...] = get_args(Kind)
Split = Literal["train", "dev", "test"]
Mode = Literal["comply", "comply_care", "safe_complete", "refuse"]
MODES: tuple[str, ...] = get_args(Mode)
Refusal = Literal["FC", "FR", "PR", "invalid"]
Text = Annotated[str, StringConstraints(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
MANIFEST, REJECTS = "manifest.json", "rejects"


# ---- the records ---------------------------------------------------------------------------------


class Part(BaseModel):
    """A frozen piece of a record that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Record(Part):
    """What every record has: an id, the ids of the records it was made from, and room for notes."""

    id: Text
    parent_ids: tuple[str, ...] = ()
    meta: dict[str, Any] = Field(default_factory=dict)


class Attack(Part):
    """The jailbreak wrapper around a request."""

    name: Text
    template_id: Text


class Prompt(Record):
    """A request; `base_id` is the clean request behind a wrapper, or that of a contrast twin."""

    text: Text
    source: Text
    source_id: str = ""
    license: str = ""
    split: Split = "train"
    kind: Kind
    base_id: str | None = None
    attack: Attack | None = None
    categories: tuple[str, ...] = ()
    label_conf: Share = 1.0
    lang: str = "en"
    policy_version: str = ""


class Sampler(Part):
    """How a response was drawn; `seed` is that of this one response.

    stop: texts that end it. think_tokens: after so many an unfinished thought is closed (budget
    forcing); max_new_tokens bounds thought and answer together.
    """

    temperature: float = Field(default=0.8, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=1024, ge=1)
    think_tokens: int | None = Field(default=None, ge=1)
    stop: tuple[Text, ...] = ()


class Parsed(Part):
    """A response taken apart, see text/reasoning.py."""

    reasoning: str
    answer: str
    status: Text


class TraceStep(Part):
    """One reasoning step: characters (and tokens, where a tokenizer counted) of the reasoning."""

    i: int = Field(ge=0)
    start_char: int = Field(ge=0)
    end_char: int = Field(ge=0)
    start_tok: int | None = None
    end_tok: int | None = None
    text: str
    kind: Text


class TokenCounts(Part):
    """Tokens of a trace; null where nothing counted them."""

    prompt: int | None = None
    reason: int | None = None
    answer: int | None = None


class Trace(Record):
    """A response with its reasoning; token offsets hold for the tokenizer of that hash only."""

    prompt_id: Text
    model: Text
    sampler: Sampler
    raw: str
    parsed: Parsed
    steps: tuple[TraceStep, ...] = ()
    decision: Literal["comply", "comply_care", "safe_complete", "refuse", "none"] = "none"
    n_tok: TokenCounts = TokenCounts()
    tokenizer_sha: str | None = None
    finish: Literal["eos", "length", "stop"]
    origin: Literal["teacher", "self", "template", "repair", "injected"]


class Judgment(Record):
    """One judge's verdict on the answer, the reasoning or a prefix ("prefix@3") of a trace."""

    trace_id: Text
    judge: Text
    judge_version: str = ""
    target: Annotated[str, StringConstraints(pattern=r"^(answer|reasoning|prefix@\d+)$")]
    # None: a judge of refusal alone says nothing about safety.
    label: Literal["safe", "unsafe", "invalid"] | None = None
    score: Share | None = None
    cats: tuple[str, ...] = ()
    refusal: Refusal | None = None
    helpful: int | None = Field(default=None, ge=1, le=5)
    raw: str = ""


class RITD(Record):
    """A row of the warmup; `train --stage=rw` reads it as it is."""

    kind: Kind
    prompt: Text
    reasoning: str
    answer: Text
    decision: Mode
    mode: Literal["none", "brief", "full"] = "full"
    cats: tuple[str, ...] = ()
    cited_rules: tuple[str, ...] = ()
    judgments: dict[str, Any] = Field(default_factory=dict)
    weight: float = Field(default=1.0, ge=0)


class BranchLengths(Part):
    """Tokens of the preferred and of the other branch."""

    w: int = Field(ge=0)
    l: int = Field(ge=0)  # noqa: E741 - the loser's key in the file format


class BranchLabels(Part):
    """What the judges said of the two branches."""

    w: dict[str, Any] = Field(default_factory=dict)
    l: dict[str, Any] = Field(default_factory=dict)  # noqa: E741


class BranchValues(Part):
    """Pass rates (0 to 1) of continuations of the two branches."""

    w: Share
    l: Share  # noqa: E741


# fmt: off
PrefKind = Literal[
    "OP1", "OP2", "OP3", "OP4", "OP5", "OP6",
    "PPA", "PPB", "PPC", "PPD", "PPE", "PPF", "PPG", "NOOP", "MODE",
]
# fmt: on


class Pref(Record):
    """A preference pair; `train --stage=srpo` reads it as it is."""

    kind: PrefKind
    prompt: Text
    prefix: str = ""
    chosen: Text
    rejected: Text
    branch_step: int | None = Field(default=None, ge=0)
    len_tok: BranchLengths | None = None
    labels: BranchLabels = BranchLabels()
    value: BranchValues | None = None
    noise: float = Field(default=0.0, ge=0, lt=0.5)
    weight: float = Field(default=1.0, ge=0)


class StepValue(Record):
    """How often continuations from the end of a step turned out well; step -1 is the prompt."""

    trace_id: Text
    step: int = Field(ge=-1)
    n_roll: int = Field(ge=0)
    n_good: int = Field(ge=0)
    v: Share
    ci: tuple[Share, Share]


class RMItem(Record):
    """For outcome reward models: a response with a target, or a pair of responses."""

    prompt: Text
    y: str | None = None
    target: float | None = None
    pair: tuple[str, str] | None = None


class PRMItem(Record):
    """For process reward models: steps, and a value after each."""

    prompt: Text
    steps: tuple[str, ...]
    v: tuple[Share, ...]


R = TypeVar("R", bound=Record)
M = TypeVar("M", bound=BaseModel)


def parse(cls: type[M], line: str | bytes, where: str) -> M:
    """The record of one JSON line.

    ValueError in one line: `where`, the field, what was found and what is allowed.
    """
    try:
        return cls.model_validate_json(line, strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {_complaint(cls, error)}") from None


def dump(record: Record) -> str:
    """The record as one line of JSON without its end; the same record gives the same bytes."""
    return to_json(record.model_dump(mode="json"))


def to_json(value: Any) -> str:
    """JSON in one line, keys in their order, as shards and journals have it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _complaint(cls: type[BaseModel], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return f"not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    if first["type"] == "missing":
        return f"{name}: missing; a {cls.__name__} has {', '.join(_required(cls))}"
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, list(cls.model_fields), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(cls.model_fields)}"
        return f"{name}: unknown field of a {cls.__name__}; {hint}"
    got = repr(first["input"])
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{name or cls.__name__}: {message}, got {got[:60] + '...' * (len(got) > 60)}"


def _required(cls: type[BaseModel]) -> list[str]:
    return [name for name, field in cls.model_fields.items() if field.is_required()]


# ---- ids -----------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Text by which two prompts are the same: NFKC, case folded, one space between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_id(text: str) -> str:
    """The id of a prompt: that of its normalised text, 16 hex digits."""
    return hashlib.sha1(normalised(text).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def content_id(*parts: Any) -> str:
    """An id that follows from the content: 16 hex digits."""
    return sha256(to_json(list(parts)))[:16]


def sha256(data: str | bytes) -> str:
    """The hash of text or bytes, 64 hex digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- shards --------------------------------------------------------------------------------------


@contextlib.contextmanager
def written(path: Path) -> Iterator[io.BufferedWriter]:
    """A file that appears whole, flushed to disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Writes lines to `.jsonl` or, compressed, `.jsonl.zst`; returns how many."""
    _check_suffix(path)
    count = 0
    with written(path) as file, _compressed(file, path) as target:
        for line in lines:
            target.write(line.encode() + b"\n")
            count += 1
    return count


def write(path: Path, records: Iterable[Record]) -> int:
    """Writes a shard, whole or not at all; ids must be unique. Returns how many records."""
    seen: set[str] = set()

    def lines() -> Iterator[str]:
        for record in records:
            if record.id in seen:
                raise ValueError(f"{path}: two records have the id {record.id!r}")
            seen.add(record.id)
            yield dump(record)

    return write_lines(path, lines())


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Iterable[bytes]]:
    """The lines of a file, which may be compressed as `.zst`."""
    with open(path, "rb") as file:
        yield io.BytesIO(_decompressed(path, file)) if path.suffix == ".zst" else file


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(file:line, bytes) of each line of a shard that is not blank."""
    _check_suffix(path)
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def read(path: Path, cls: type[R]) -> list[R]:
    """All records of a shard.

    One-line ValueError with file:line and field for a record that is wrong or has an earlier id.
    """
    found: dict[str, str] = {}
    records = []
    for where, line in read_lines(path):
        record = parse(cls, line, where)
        if record.id in found:
            raise ValueError(
                f"{where}: id: {record.id!r} is given twice, first at {found[record.id]}"
            )
        found[record.id] = where
        records.append(record)
    return records


def _check_suffix(path: Path) -> None:
    if not re.search(r"\.jsonl(\.zst)?$", path.name):
        raise ValueError(f"{path}: a shard's name ends in .jsonl or .jsonl.zst")


def _compressed(file: io.BufferedWriter, path: Path) -> Any:
    if path.suffix != ".zst":
        return contextlib.nullcontext(file)
    import pyarrow

    # Not closed through pyarrow: the file is flushed to disk after the last frame.
    return pyarrow.CompressedOutputStream(pyarrow.PythonFile(_Unclosed(file), "w"), "zstd")


def _decompressed(path: Path, file: io.BufferedReader) -> bytes:
    import pyarrow

    try:
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd") as stream:
            return stream.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not zstandard: {str(error).splitlines()[0]}") from None


class _Unclosed(io.RawIOBase):
    def __init__(self, file: io.BufferedWriter):
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return self.file.write(data)


# ---- the journal ---------------------------------------------------------------------------------


class Journal:
    """Finished work by record id, on disk as soon as it is done.

    A line is the CRC of its JSON and the JSON, [id, value]; the first line holds the key, that is
    everything the values depend on. A torn last line, which a killed process leaves, is cut off;
    damage elsewhere is an error. Only one process at a time has a journal open.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.values = path, {}
        self._lock = threading.Lock()
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        try:
            _lock(self._file, path)
            self._load(dict(key))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file, and with it the lock, go."""
        self._file.close()

    def append(self, record_id: str, value: Any) -> None:
        """Keep a value of an id; on return it survives the process, and the machine too."""
        with self._lock:
            if record_id in self.values:
                raise ValueError(f"{self.path}: id {record_id!r} is done already")
            self._write([record_id, value])
            self.values[record_id] = json.loads(to_json(value))

    def _load(self, key: dict[str, Any]) -> None:
        self._file.seek(0)
        good, lines = 0, self._file.read().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            entry = _journal_entry(line)
            if entry is None:
                if number < len(lines):
                    raise ValueError(
                        f"{self.path}:{number}: damaged; delete this line to do its work again"
                    )
                break
            if number == 1 and entry != ["", key]:
                raise ValueError(f"{self.path}:1: a journal of other work; move it away")
            if number > 1:
                self.values[entry[0]] = entry[1]
            good += len(line)
        self._file.truncate(good)
        if not good:
            self._write(["", key])

    def _write(self, entry: list[Any]) -> None:
        text = to_json(entry).encode()
        self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._file.flush()
        os.fsync(self._file.fileno())


def _journal_entry(line: bytes) -> list[Any] | None:
    """[id, value] of a whole and undamaged line."""
    crc, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text[:-1]):
        return None
    return json.loads(text)


def _lock(file: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system; then nothing warns of a second process
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{path}: in use by another process") from None


def resume(
    journal: Journal,
    items: Mapping[str, Any],
    work: Callable[[str, Any], Any],
    concurrency: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """`work(id, item)` of every id that the journal lacks; all values, in the order of the items.

    At most `concurrency` calls run at a time, in threads, and each result is in the journal before
    the next call starts in its place. An error of `work`, and an interrupt, are raised after the
    calls that run have ended and are kept. `progress` is told how many were done, first those of
    earlier runs.
    """
    todo = iter([record_id for record_id in items if record_id not in journal.values])
    tell = progress or (lambda _: None)
    tell(sum(record_id in journal.values for record_id in items))
    failed: BaseException | None = None
    running: dict[Future[Any], str] = {}

    def keep(done: Iterable[Future[Any]]) -> None:
        nonlocal failed
        for future in done:
            record_id = running.pop(future)
            if (error := future.exception()) is not None:
                failed = failed or error
                continue
            journal.append(record_id, future.result())
            tell(1)

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:
                while failed is None and len(running) < concurrency:
                    record_id = next(todo, None)
                    if record_id is None:
                        break
                    running[pool.submit(work, record_id, items[record_id])] = record_id
                if not running:
                    break
                keep(wait(running, return_when=FIRST_COMPLETED).done)
        except BaseException:  # an interrupt: what was begun is paid for
            tell = lambda _: None  # noqa: E731
            keep(wait(running).done)
            raise
    if failed is not None:
        raise failed
    return {record_id: journal.values[record_id] for record_id in items}


# ---- rejects and manifests -----------------------------------------------------------------------


@dataclass(frozen=True)
class Reject:
    """A record that is not used: why ("category: detail"), and the record where there is one."""

    id: str
    reason: str
    where: str = ""
    record: dict[str, Any] | None = None


def drop_reasons(rejects: Iterable[Reject]) -> dict[str, int]:
    """How often each category of reasons occurs, the most frequent first, then by name."""
    counts = Counter(reject.reason.split(":")[0] for reject in rejects)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


@dataclass(frozen=True)
class Input:
    """A source as the user named it, with its rows and their hash; `path` where it is a file."""

    source: str
    rows: int
    sha256: str
    path: Path | None = None

    @staticmethod
    def of_file(path: Path) -> "Input":
        """A shard on disk."""
        return Input(str(path), sum(1 for _ in read_lines(path)), file_sha256(path), path)


@dataclass
class Stage:
    """A run of a stage: what it depends on, and what is to be written at its end.

    `config` holds only settings that the stage reads. What is in `run` (cost, and what `finish`
    adds: time, versions, commit, places of the inputs) does not take part in comparisons.
    """

    name: str
    config: dict[str, Any]
    inputs: Sequence[Input]
    seed: int
    policy_version: str = ""
    model: str = ""
    model_sha: str = ""
    run: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def key(self) -> dict[str, Any]:
        """Everything the outputs are a function of."""
        return {
            "stage": self.name,
            "config": self.config,
            "config_sha": sha256(to_json(self.config)),
            "inputs": [
                {"source": one.source, "rows": one.rows, "sha256": one.sha256}
                for one in self.inputs
            ],
            "seed": self.seed,
            "policy_version": self.policy_version,
            "model": self.model,
            "model_sha": self.model_sha,
        }


def finished(stage: Stage, out: Path) -> dict[str, Any] | None:
    """The manifest in `out` where it is of this very work and its files are whole, else None."""
    file = out / MANIFEST
    if not file.exists():
        return None
    manifest = read_manifest(file)
    if not stage.key().items() <= manifest.items():
        return None
    for name, about in manifest["outputs"].items():
        path = out / name
        if not path.is_file() or file_sha256(path) != about["sha256"]:
            return None
    return manifest


def finish(
    stage: Stage,
    out: Path,
    shards: Mapping[str, Sequence[Record]],
    rejects: Mapping[str, Sequence[Reject]],
    *,
    n_in: int,
    n_out: int,
    report: Mapping[str, Any] | None = None,
    documents: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes shards, rejects and JSON documents by name, then the manifest, which it returns.

    n_in and n_out: records that came in, and that the stage is there for. `report` is what else the
    manifest is to say of the run, the same for the same inputs.
    """
    (out / MANIFEST).unlink(missing_ok=True)  # what follows is no longer what it describes
    counts = {name: write(out / name, found) for name, found in shards.items()}
    for name, found in rejects.items():
        place = f"{REJECTS}/{name}"
        lines = (to_json({k: v for k, v in vars(one).items() if v}) for one in found)
        counts[place] = write_lines(out / place, lines)
    for name, value in (documents or {}).items():
        write_json(out / name, value)
        counts[name] = 1
    dropped = [reject for found in rejects.values() for reject in found]
    run = {
        "where": [
            None if one.path is None else os.path.relpath(one.path.resolve(), out.resolve())
            for one in stage.inputs
        ],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(stage.started)),
        "wall_s": round(time.time() - stage.started, 3),
        "cost": 0.0,
        **stage.run,
        "provenance": provenance(),
    }
    manifest = {
        **stage.key(),
        "n_in": n_in,
        "n_out": n_out,
        "drop_reasons": drop_reasons(dropped),
        "report": dict(report or {}),
        "outputs": {
            name: {"rows": count, "sha256": file_sha256(out / name)}
            for name, count in counts.items()
        },
        "run": run,
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON, whole or not at all."""
    with written(path) as file:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        file.write(text.encode() + b"\n")


def read_manifest(file: Path) -> dict[str, Any]:
    """A manifest; ValueError in one line where it is none."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no manifest: {error}") from None
    if not isinstance(manifest, dict) or not {"stage", "outputs", "inputs"} <= set(manifest):
        raise ValueError(f"{file}: no manifest: lacks stage, inputs or outputs")
    return manifest


def comparable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that is the same for the same inputs, seed, model and policy."""
    return {key: value for key, value in manifest.items() if key != "run"}


# ---- where a record came from --------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """One record on the way back: where it lies, and the manifest it was made under (or none)."""

    file: Path
    record: dict[str, Any]
    manifest: dict[str, Any] | None


def trace(record_id: str, file: Path) -> list[Origin]:
    """The record of a shard and all it was made from, nearest first, through the manifests.

    Parents are looked for in the shards that the record's stage wrote, then in its inputs and in
    what those were made from. ValueError where the record or a parent is not found, or where a
    shard is not the one that its manifest describes.
    """
    found = _find(record_id, file)
    if found is None:
        raise ValueError(f"{file}: no record with the id {record_id!r}")
    chain = [found]
    seen = {(file.resolve(), record_id)}
    for origin in chain:  # grows
        for parent in _parents(origin.record):
            candidates = _upstream(origin)
            one = next((hit for place in candidates if (hit := _find(parent, place))), None)
            if one is None:
                raise ValueError(
                    f"{origin.file}: the parent {parent!r} of {origin.record['id']!r} is in none "
                    f"of {', '.join(str(place) for place in candidates) or 'its inputs'}"
                )
            if (one.file.resolve(), parent) not in seen:
                seen.add((one.file.resolve(), parent))
                chain.append(one)
    return chain


def lineage(record_id: str, file: Path) -> dict[str, Any]:
    """What a record goes back to: {prompt, prompts, models, policy_versions, stages}.

    `prompt` is the text of the first prompt on the way back; models are those that wrote a trace
    and those that the manifests name.
    """
    chain = trace(record_id, file)
    prompts = [one.record for one in chain if {"text", "source", "kind"} <= set(one.record)]
    if not prompts:
        raise ValueError(f"{file}: {record_id!r} leads back to no prompt")
    manifests = [one.manifest for one in chain if one.manifest]
    models = [one.record["model"] for one in chain if "prompt_id" in one.record]
    return {
        "prompt": prompts[0]["text"],
        "prompts": prompts,
        "models": _unique([*models, *(m["model"] for m in manifests)]),
        "model_shas": _unique(m["model_sha"] for m in manifests),
        "policy_versions": _unique(
            [*(m["policy_version"] for m in manifests), *(p["policy_version"] for p in prompts)]
        ),
        "stages": _unique(m["stage"] for m in manifests),
    }


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _parents(record: dict[str, Any]) -> list[str]:
    named = [record.get(key) for key in ("trace_id", "prompt_id")]
    return _unique([*record.get("parent_ids", []), *(name for name in named if name)])


def _find(record_id: str, file: Path) -> Origin | None:
    if not file.is_file():
        return None
    for _, line in read_lines(file):
        if record_id.encode() in line:
            record = json.loads(line)
            if isinstance(record, dict) and record.get("id") == record_id:
                return Origin(file, record, _manifest_of(file))
    return None


def _manifest_of(file: Path) -> dict[str, Any] | None:
    """The manifest beside a shard that it wrote."""
    path = file.parent / MANIFEST
    manifest = read_manifest(path) if path.is_file() else None
    if manifest is None or file.name not in manifest["outputs"]:
        return None
    if file_sha256(file) != manifest["outputs"][file.name]["sha256"]:
        raise ValueError(f"{file}: not the file that {path} describes")
    return manifest


def _upstream(origin: Origin) -> list[Path]:
    """Shards in which parents of the record may lie: its stage's own, its inputs, and theirs."""
    places: dict[Path, None] = {}
    todo = [origin.file]
    for file in todo:  # grows
        manifest = _manifest_of(file)
        if manifest is None:
            continue
        shards = [n for n in manifest["outputs"] if not n.startswith(REJECTS)]
        places |= {file.parent / name: None for name in shards if ".jsonl" in name}
        inputs = manifest.get("run", {}).get("where", [])
        for one in (Path(os.path.normpath(file.parent / path)) for path in inputs if path):
            if one not in places and ".jsonl" in one.name:
                places[one] = None
                todo.append(one)
    return list(places)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: the lineage of one record as JSON; returns the exit code."""
    flags = [
        Flag("file", "shard that holds the record", parse=Path, required=True),
        Flag("id", "the record's id", required=True),
    ]
    try:
        given = sys.argv[1:] if argv is None else argv
        args = parse_command_line("python -m saro_jax.records", __doc__ or "", given, flags, False)
        found = lineage(args.id, args.file)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
