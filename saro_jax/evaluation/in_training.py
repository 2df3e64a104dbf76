"""Owns the answers that a run gives to a few fixed prompts while it trains, and their rates.

The model is the one being trained, as it lies on the devices. Beside it there is, while it answers,
a copy of its matrices in the compute type, where that is another or there are adapters to add, and
the cache of the engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from saro_jax.evaluation.quick import (
    OUTCOMES,
    Prompt,
    Transcript,
    prompt_ids,
    read_prompts,
    summarise,
    transcribe,
    write_transcripts,
)
from saro_jax.generation.engine import generate
from saro_jax.models import lora
from saro_jax.models.architecture import Architecture
from saro_jax.models.decoder import Params
from saro_jax.models.lora import Adapters
from saro_jax.parallel.mesh import row_shards
from saro_jax.text import chat
from saro_jax.training.memory import Answering

SLOTS = 16  # answers decoded at a time by each row shard


@dataclass(frozen=True)
class Questions:
    """Fixed prompts, as text and as the ids that a model is given; `tokens` of an answer at most.

    The answers do not depend on how many of them are decoded at a time.
    """

    prompts: list[Prompt]
    ids: list[np.ndarray]
    tokens: int


def read(source: str, tokens: int, arch: Architecture, tokenizer: Any) -> Questions:
    """The prompts of `train.answers`; ValueError for one that the model has no room for."""
    prompts = read_prompts(source, "train.answers")
    ids = prompt_ids(tokenizer, prompts)
    for prompt, one in zip(prompts, ids, strict=True):
        if len(one) + tokens > arch.max_position_embeddings:
            raise ValueError(
                f"train.answers={source}: prompt {prompt.id}: {len(one)} tokens and "
                f"train.answers_tokens={tokens} exceed the model's {arch.max_position_embeddings} "
                "positions"
            )
    return Questions(prompts, ids, tokens)


def answering(questions: Questions, mesh: Mesh) -> Answering:
    """What `answer` decodes, for the estimate of memory."""
    longest = max(len(one) for one in questions.ids)
    return Answering(SLOTS * row_shards(mesh), longest + questions.tokens)


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
    completions = generate(
        arch,
        params,
        questions.ids,
        max_new_tokens=questions.tokens,
        batch_size=SLOTS * row_shards(mesh),
        stop_ids={chat.end_of_turn(tokenizer), *arch.eos_token_ids},
        dtype=dtype,
        mesh=mesh if mesh.size > 1 else None,
        progress=progress,
        review=lambda *_: look(),
    )
    prefill = chat.generation_prefill(tokenizer)
    return [
        transcribe(tokenizer, prompt, completion, prefill)
        for prompt, completion in zip(questions.prompts, completions, strict=True)
    ]


def metrics(transcripts: Sequence[Transcript]) -> dict[str, float]:
    """answers/KIND/refused, complied, incomplete, well_formed (shares) and mean_tokens."""
    found = {}
    for kind, row in summarise(transcripts).items():
        for name in (*OUTCOMES, "well_formed"):
            found[f"answers/{kind}/{name}"] = float(row[name]["share"])
        found[f"answers/{kind}/mean_tokens"] = float(row["mean_tokens"])
    return found


def line(step: int, transcripts: Sequence[Transcript]) -> str:
    """What a person sees of it: of each kind the share of what is wanted."""
    parts = [
        f"{kind} {row[row['wanted']]['share']:.0%} {row['wanted']}"
        for kind, row in summarise(transcripts).items()
    ]
    return f"answers at step {step}: {', '.join(parts)}"


def write(out: Path, step: int, transcripts: Sequence[Transcript]) -> None:
    """The transcripts of a step to out/answers/STEP.jsonl, whole or not at all."""
    write_transcripts(out / "answers" / f"{step}.jsonl", transcripts)
