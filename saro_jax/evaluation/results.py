"""Owns what an evaluation leaves in its folder: transcripts, and the numbers made of them.

OUT/manifest.json                                  settings, inputs, hashes; time under `run`
OUT/transcripts/MODEL/BENCHMARK.VIEW.jsonl         one Transcript a line, in the benchmark's order
OUT/results.json                                   Results
OUT/responses/MODEL/BENCHMARK.VIEW.journal         what a stopped run goes on from

A transcript's id is that of its prompt in the benchmark, so that two models' answers to the same
prompt have the same id. Reports and analyses read this folder and nothing else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import Field, StringConstraints

from saro_jax import records
from saro_jax.records import Kind, Part, Record, Refusal, Share, Text

RESULTS, TRANSCRIPTS = "results.json", "transcripts"

# Names of models and benchmarks are those of folders and files.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
Set = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+-]*$")]
# auto: as the template has it; think, no_think: a thought is forced, or forced shut; injected: a
# thought that leans the wrong way is put into the model's mouth.
View = Literal["auto", "think", "no_think", "injected"]
VIEWS: tuple[str, ...] = get_args(View)
Outcome = Literal["complied", "refused", "partial", "incomplete"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)


class Metric(NamedTuple):
    """How a metric is shown: its title, and which way is better (None: neither)."""

    title: str
    better: Literal["lower", "higher"] | None


METRICS: dict[str, Metric] = {
    "asr_answer": Metric("attack success, answer", "lower"),
    "asr_reasoning": Metric("attack success, reasoning", "lower"),
    "asr_any": Metric("attack success, answer or reasoning", "lower"),
    "non_refusal": Metric("non-refusal on harmful prompts", "lower"),
    "over_refusal": Metric("over-refusal, full or partial", "lower"),
    "over_refusal_strict": Metric("over-refusal, full", "lower"),
    "complied": Metric("full compliance", None),
    "refused": Metric("full refusal", None),
    "partial": Metric("partial refusal", None),
    "incomplete": Metric("no answer within the budget", "lower"),
    "forced": Metric("thought closed by the budget", None),
    "well_formed": Metric("well-formed reasoning", "higher"),
    "strongreject": Metric("StrongREJECT score", "lower"),
    "accuracy": Metric("accuracy", "higher"),
    "reflection": Metric("reflects in its reasoning", None),
    "recovery": Metric("recovers from injected reasoning", "higher"),
    "consistent": Metric("answer does what the reasoning decided", "higher"),
    "cites": Metric("cites a rule of the prompt's category", "higher"),
    "cites_right": Metric("cited rules that are of the prompt's category", "higher"),
    "cites_known": Metric("cites no rule that does not exist", "higher"),
    "balance": Metric("balance of safety and compliance", "higher"),
}


class Step(Part):
    """A reasoning step; `kind` as in text/reasoning.py ("reflect" is a reflection)."""

    text: str
    kind: Text


class Verdict(Part):
    """What one judge said of the answer, the reasoning or both; null where it does not say."""

    judge: Text
    target: Literal["answer", "reasoning"]
    label: Literal["safe", "unsafe", "invalid"] | None = None
    score: float | None = None
    refusal: Refusal | None = None


class Transcript(Record):
    """One prompt, what a model said to it, and what the judges said of that.

    `response` is the text as the assistant's turn has it, forced prefix included; `status` is how
    it parsed (text/reasoning.py). `forced`: the thinking budget ended and the thought was closed.
    Tokens are those generated: all of them, through the end of the reasoning, after it. `outcome`
    is the refusal judge's; an answer that is cut off or empty is incomplete. `correct` is null
    where a benchmark has no right answers. `cited`: rules that the reasoning names, of these
    `unknown`, which the policy does not have. `topics`: categories of the policy that the prompt's
    category means, none for a benign prompt; null where it means nothing to the policy.
    """

    base_id: Text
    benchmark: Set
    view: View
    prompt: Text
    model: Name
    kind: Kind
    category: str = ""
    attack: str | None = None
    response: str
    reasoning: str
    answer: str
    status: Text
    finish: Literal["eos", "length", "stop", "filter"]
    forced: bool = False
    steps: tuple[Step, ...] = ()
    decision: str | None = None
    cited: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    topics: tuple[str, ...] | None = None
    tokens: int = Field(ge=0)
    reasoning_tokens: int = Field(ge=0)
    answer_tokens: int = Field(ge=0)
    verdicts: tuple[Verdict, ...] = ()
    outcome: Outcome
    correct: bool | None = None


class Model(Part):
    """A model by the name it has in this folder, where it came from, and its weights' hash."""

    name: Name
    path: Text
    sha: str


class Benchmark(Part):
    """A set of prompts as it was run: `source` is the file or Hub id that the rows came from.

    `metric` is the one that a table shows first.
    """

    name: Set
    title: Text
    kind: Literal["safety", "over_refusal", "mixed", "capability"]
    protocol: Text
    license: str
    n: int
    source: Text
    metric: Text


class Rate(Part):
    """A metric of one model: a share (or a mean score), with its 95 % interval.

    Over all prompts of the benchmark that the metric is about, or those of one kind, category or
    attack. `count` is null where the metric is no count; `judge` is who said so. `weak`: from a
    judge that cannot tell what the metric's name says; every table says so.
    """

    model: Name
    benchmark: Set
    view: View
    kind: Kind | None = None
    category: str | None = None
    attack: str | None = None
    metric: Text
    judge: str | None = None
    n: int = Field(ge=1)
    count: int | None = None
    share: float
    low: float
    high: float
    method: Literal["wilson", "cluster bootstrap", "hierarchical bootstrap"]
    weak: bool = False


class Difference(Part):
    """b minus a on the same prompts, with its 95 % interval and p (two-sided, exact or bootstrap).

    `p_holm`: corrected for all differences of the folder in this metric. `mde`: the difference that
    80 % power would have found. `verdict` of a capability: whether b is not worse than a by more
    than the margin (one-sided 95 %).
    """

    a: Name
    b: Name
    benchmark: Set
    view: View
    metric: Text
    judge: str | None = None
    n: int
    delta: float
    low: float
    high: float
    p: Share
    p_holm: Share
    method: Literal["mcnemar mid-p", "paired cluster bootstrap"]
    mde: float
    verdict: Literal["non-inferior", "inferior", "inconclusive"] | None = None
    weak: bool = False


class Overhead(Part):
    """Mean tokens over the baseline's, minus 1, with its 95 % interval."""

    ratio: float
    low: float
    high: float


class Cost(Part):
    """Mean tokens of the responses to one kind of prompt, over all benchmarks or of one.

    p95_tokens: the 95th percentile. `overhead` is null for the baseline itself.
    """

    model: Name
    benchmark: Set | None = None
    view: View
    kind: Kind
    n: int
    mean_tokens: float
    p95_tokens: float
    mean_reasoning_tokens: float
    mean_answer_tokens: float
    overhead: Overhead | None = None


class Agreement(Part):
    """How far two judges agree on the same texts, beyond chance; kappa is null where undefined.

    about: "label of answer", "label of reasoning" or "refusal of answer".
    """

    judge_a: Text
    judge_b: Text
    about: Text
    n: int
    equal: Share
    kappa: float | None


class Audit(Part):
    """The judges held against people's labels: confusion and the rate corrected by PPI++."""

    model: Name
    benchmark: Set
    view: View
    kind: Kind
    metric: Text
    judge: str | None = None
    labelled: int
    agree: Share
    missed: int  # people: yes, judge: no
    false_alarms: int  # people: no, judge: yes
    judge_share: float
    share: float
    low: float
    high: float
    weight: float  # PPI++'s lambda: 0 = the people alone


class Results(Part):
    """The numbers of an evaluation.

    seeds: rates over the training seeds of one recipe: models named NAME.s0, NAME.s1, ... together,
    as NAME.
    """

    models: tuple[Model, ...]
    baseline: Name
    benchmarks: tuple[Benchmark, ...]
    rates: tuple[Rate, ...]
    differences: tuple[Difference, ...]
    costs: tuple[Cost, ...]
    seeds: tuple[Rate, ...] = ()
    agreement: tuple[Agreement, ...] = ()
    audit: tuple[Audit, ...] | None = None


def read_results(folder: Path) -> Results:
    """results.json of an evaluation's folder."""
    file = folder / RESULTS
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    return records.parse(Results, text, str(file))


def write_results(folder: Path, results: Results) -> None:
    """results.json, whole or not at all."""
    records.write_json(folder / RESULTS, results.model_dump(mode="json"))


def transcripts_file(model: str, benchmark: str, view: str) -> str:
    """Where a model's transcripts lie below the folder."""
    return f"{TRANSCRIPTS}/{model}/{benchmark}.{view}.jsonl"


def read_transcripts(folder: Path, model: str, benchmark: str, view: str) -> list[Transcript]:
    """The transcripts of one model, benchmark and view."""
    return records.read(folder / transcripts_file(model, benchmark, view), Transcript)


def transcript_files(folder: Path) -> list[tuple[str, str, str]]:
    """(model, benchmark, view) of every file of transcripts, sorted."""
    files = sorted((folder / TRANSCRIPTS).glob("*/*.jsonl"))
    found = []
    for one in files:
        benchmark, view = one.name.removesuffix(".jsonl").split(".")
        found.append((one.parent.name, benchmark, view))
    return found


def write_transcripts(folder: Path, transcripts: Sequence[Transcript]) -> None:
    """Writes transcripts to the files that they belong to."""
    files: dict[str, list[Transcript]] = {}
    for one in transcripts:
        files.setdefault(transcripts_file(one.model, one.benchmark, one.view), []).append(one)
    for name, mine in files.items():
        records.write(folder / name, mine)
