"""Likelihood: how much more probable reasoning makes the safe answer, and shuffled reasoning."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from saro_jax.analysis.results import Likelihood
from saro_jax.data.packing import Shape, arrange, laid_out_length
from saro_jax.data.rows import PreferenceRow
from saro_jax.data.tokenise import tokenise
from saro_jax.evaluation.statistics import cluster_bootstrap
from saro_jax.parallel import mesh as meshes
from saro_jax.text import reasoning
from saro_jax.text.chat import Message
from saro_jax.training.scoring import make_scorer, score_items

CONDITIONS = ("prompt", "reasoning", "shuffled", "other")


class Scores(NamedTuple):
    """Log-probs of two continuations, summed over their tokens, and how many these are."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def per_token(self) -> float:
        """Mean log-prob of a token of the first less that of the second."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


@dataclass(frozen=True)
class Case:
    """A pair taken apart: the safe and the unsafe answer, and what was thought before the safe."""

    row: PreferenceRow
    reasoning: str
    safe: str
    unsafe: str


def cases(rows: Sequence[PreferenceRow]) -> list[Case]:
    """The pairs of whole turns with both answers, and with reasoning before the chosen one."""
    found = []
    for row in rows:
        chosen, rejected = row.chosen, row.rejected
        if isinstance(row.prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
            continue
        if len(chosen) != 1 or len(rejected) != 1:
            continue
        safe, unsafe = (
            reasoning.parse(row.prefix + turns[0].content) for turns in (chosen, rejected)
        )
        if safe.status == "ok" and unsafe.status == "ok" and safe.answer != unsafe.answer:
            found.append(Case(row, safe.reasoning, safe.answer, unsafe.answer))
    return found


def contexts(given: Sequence[Case], seed: int = 0) -> dict[str, list[str]]:
    """What stands before the answers, by condition: nothing; the reasoning; its words in disorder;
    the reasoning of a pair with another prompt.
    """
    rng = random.Random(f"{seed}:contexts")
    shuffled = []
    for case in given:
        words = case.reasoning.split()
        rng.shuffle(words)
        shuffled.append(" ".join(words))
    order = list(range(len(given)))
    rng.shuffle(order)
    other = [""] * len(given)
    for place, i in enumerate(order):
        rest = (order[(place + step) % len(order)] for step in range(1, len(order)))
        mine = given[i].row.prompt
        found = next((j for j in rest if given[j].row.prompt != mine), None)
        if found is None:
            raise ValueError("reasoning of another prompt: all pairs have the same prompt")
        other[i] = given[found].reasoning
    thoughts = {
        "reasoning": [case.reasoning for case in given],
        "shuffled": shuffled,
        "other": other,
    }
    blocks = {
        name: [f"{reasoning.OPEN}\n{text}\n{reasoning.CLOSE}\n\n" for text in texts]
        for name, texts in thoughts.items()
    }
    return {"prompt": [""] * len(given)} | blocks


def in_context(given: Sequence[Case], before: Sequence[str]) -> list[PreferenceRow]:
    """The pairs as rows: both answers after the same text."""
    return [
        replace(
            case.row,
            prefix=text,
            chosen=(Message("assistant", case.safe),),
            rejected=(Message("assistant", case.unsafe),),
        )
        for case, text in zip(given, before, strict=True)
    ]


def score(
    arch: Any,
    params: Any,
    tokenizer: Any,
    rows: Sequence[PreferenceRow],
    *,
    row_length: int,
    dtype: Any = jnp.float32,
    progress: Callable[[int], Any] = lambda count: None,
) -> dict[str, Scores]:
    """Scores of the rows by id, by the code that SRPO trains with; without rows that are too long.

    On the first device.
    """
    most = min(row_length, arch.max_position_embeddings)
    items, _ = tokenise(rows, tokenizer, most, "reject")
    shape = Shape(row_length, 1, "shared")
    items = [one for one in items if laid_out_length(one, "shared") <= row_length]
    if not items:
        return {}
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    scorer = make_scorer(arch, mesh, dtype=jnp.dtype(dtype), remat="none", branches=2)
    found = {}
    group = arrange(items, range(len(items)), shape)
    for i, logp, counts in score_items(scorer, params, items, [group], shape):
        chosen, rejected = (float(value) for value in logp.sum(-1))
        n_chosen, n_rejected = (int(value) for value in counts.sum(-1))
        found[items[i].id] = Scores(chosen, rejected, n_chosen, n_rejected)
        progress(1)
    return found


def gains(
    model: str, scored: Mapping[str, Mapping[str, Scores]], given: Sequence[Case], seed: int = 0
) -> list[Likelihood]:
    """Mean difference per token in each condition, and what each adds to the prompt alone.

    scored: by condition and id. Pairs that lack a condition are left out of all; intervals draw
    prompts again, which pairs share.
    """
    kept = [case for case in given if all(case.row.id in scored[name] for name in CONDITIONS)]
    if not kept:
        return []
    prompts = [case.row.prompt for case in kept]
    values = {name: [scored[name][case.row.id].per_token for case in kept] for name in CONDITIONS}
    for name in CONDITIONS[1:]:
        pairs = zip(values[name], values["prompt"], strict=True)
        values[f"gain:{name}"] = [a - b for a, b in pairs]
    found = []
    for name, numbers in values.items():
        mean, low, high = cluster_bootstrap(numbers, prompts, seed=seed)
        found.append(
            Likelihood(model=model, condition=name, mean=mean, low=low, high=high, n=len(kept))
        )
    return found
