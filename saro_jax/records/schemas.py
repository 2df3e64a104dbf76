"""The schemas of what travels between the stages, and a record as a line of JSON."""

import difflib
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from saro_jax.records.ids import to_json

Kind = Literal["harmful", "jailbreak", "benign", "borderline"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Split = Literal["train", "dev", "test"]
Mode = Literal["comply", "comply_care", "safe_complete", "refuse"]
MODES: tuple[Mode, ...] = get_args(Mode)
Decision = Literal["comply", "comply_care", "safe_complete", "refuse", "none"]
Refusal = Literal["FC", "FR", "PR", "invalid"]
Text = Annotated[str, StringConstraints(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


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
    decision: Decision = "none"
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
