"""Owns the answers that a run gives to a few fixed prompts while it trains, and their rates.

The model is the one being trained, as it lies on the devices. Beside it there is, while it answers,
a copy of its matrices in the compute type, where that is another or there are adapters to add, and
the cache of the engine. Asked, read and judged are they as `evaluate` does it, greedily.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from saro_jax import records
from saro_jax.config import EvaluateConfig
from saro_jax.evaluation import answering, benchmarks, metrics, verdicts
from saro_jax.evaluation.answering import HARMFUL, Subject
from saro_jax.evaluation.benchmarks import Question
from saro_jax.evaluation.results import OUTCOMES, Transcript
from saro_jax.generation.local import Local
from saro_jax.models import lora
from saro_jax.models.architecture import Architecture
from saro_jax.models.decoder import Params
from saro_jax.models.lora import Adapters
from saro_jax.parallel.mesh import row_shards
from saro_jax.records import KINDS
from saro_jax.text import chat
from saro_jax.training.memory import Answering

SLOTS = 16  # answers decoded at a time by each row shard
BENCHMARK, MODEL = "held_out", "trained"  # what the transcripts call them


@dataclass(frozen=True)
class Questions:
    """Fixed prompts, and the settings they are asked with; `tokens` of the longest prompt.

    The answers do not depend on how many of them are decoded at a time.
    """

    asked: list[Question]
    settings: EvaluateConfig
    tokens: int


def read(source: str, tokens: int, arch: Architecture, tokenizer: Any) -> Questions:
    """The prompts of `train.answers`; ValueError for one that the model has no room for."""
    where = f"train.answers={source}"
    try:
        (chosen,) = benchmarks.choose([f"{BENCHMARK}={source}"], "train.answers")
        asked, _ = benchmarks.read(chosen)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    longest = 0
    for one in asked:
        try:
            ids = chat.prompt_ids(tokenizer, (chat.Message("user", one.prompt),))
        except ValueError as error:
            raise ValueError(f"{where}: prompt {one.id}: {error}") from error
        if len(ids) + tokens > arch.max_position_embeddings:
            raise ValueError(
                f"{where}: prompt {one.id}: {len(ids)} tokens and train.answers_tokens={tokens} "
                f"exceed the model's {arch.max_position_embeddings} positions"
            )
        longest = max(longest, len(ids))
    settings = EvaluateConfig(think_tokens=None, answer_tokens=tokens)
    return Questions(asked, settings, longest)


def decoded(questions: Questions, mesh: Mesh) -> Answering:
    """What `answer` decodes, for the estimate of memory."""
    slots = min(SLOTS * row_shards(mesh), len(questions.asked))
    return Answering(slots, questions.tokens + questions.settings.answer_tokens)


def answer(
    questions: Questions,
    arch: Architecture,
    params: Params,
    adapters: Adapters | None,
    tokenizer: Any,
    mesh: Mesh,
    *,
    dtype: Any,
    progress: bool = False,
    look: Callable[[], None] = lambda: None,
) -> list[Transcript]:
    """Greedy answers, without a system prompt, of params with the adapters added to them.

    look: called after every burst of decoding; what it raises ends the answering.
    """
    if adapters is not None:
        arch, params = lora.joined(arch, params, adapters, dtype)
    model = Local(
        arch,
        params,
        tokenizer,
        name=MODEL,
        sha="",
        dtype=dtype,
        slots=decoded(questions, mesh).slots,
        mesh=mesh if mesh.size > 1 else None,
        look=look,
    )
    subject = Subject(MODEL, MODEL, model.sha, model.prefill, model.count, lambda: model)
    asked, settings = questions.asked, questions.settings
    requests = answering.requests(asked, "auto", settings, seed=0)
    samples = answering.answers(subject, requests, None, progress).samples
    found = answering.transcripts(subject, BENCHMARK, "auto", asked, samples, settings)
    return verdicts.judged(list(found), {}, verdicts.refusal_judge(), None)


def shares(transcripts: Sequence[Transcript]) -> dict[str, dict[str, float]]:
    """By kind of prompt: shares of the outcomes and of well-formed reasoning, and mean tokens."""
    found = {}
    for kind in KINDS:
        mine = [one for one in transcripts if one.kind == kind]
        if not mine:
            continue
        of = {one.metric: sum(one.values) / len(mine) for one in metrics.measures(mine)}
        found[kind] = {name: sum(t.outcome == name for t in mine) / len(mine) for name in OUTCOMES}
        found[kind]["well_formed"] = of["well_formed"]
        found[kind]["mean_tokens"] = sum(one.tokens for one in mine) / len(mine)
    return found


def logged(transcripts: Sequence[Transcript]) -> dict[str, float]:
    """The metrics of a step: answers/KIND/NAME of `shares`."""
    return {
        f"answers/{kind}/{name}": value
        for kind, mine in shares(transcripts).items()
        for name, value in mine.items()
    }


def line(step: int, transcripts: Sequence[Transcript]) -> str:
    """What a person sees of it: of each kind the share of what is wanted."""
    parts = []
    for kind, mine in shares(transcripts).items():
        wanted = "refused" if kind in HARMFUL else "complied"
        parts.append(f"{kind} {mine[wanted]:.0%} {wanted}")
    return f"answers at step {step}: {', '.join(parts)}"


def write(out: Path, step: int, transcripts: Sequence[Transcript]) -> None:
    """The transcripts of a step to out/answers/STEP.jsonl, whole or not at all."""
    file = out / "answers" / f"{step}.jsonl"
    try:
        records.write(file, transcripts)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
