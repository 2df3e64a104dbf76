"""Depth: does safety go deeper than the first tokens? Attacks that prefill a compliant opening."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from saro_jax.analysis.pool import Asked
from saro_jax.analysis.results import Depth
from saro_jax.evaluation.statistics import wilson
from saro_jax.generation.requests import Generator, Request
from saro_jax.records import Sampler, sha256
from saro_jax.text import reasoning
from saro_jax.text.refusal_classifier import classify_all

FILE = Path(__file__).with_name("tampering.yaml")


@cache
def texts() -> dict[str, Any]:
    """The packaged texts: opening, filler, counter, refusing."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def seed_of(seed: int, *names: str) -> int:
    """A seed that follows from seed and names."""
    return int(sha256(":".join([str(seed), *names]))[:8], 16) % 2**31


def complied(prompts: Sequence[str], continuations: Sequence[str]) -> list[bool]:
    """Whether what a user would see complies, by the refusal judge; nothing to see does not."""
    answers = [reasoning.parse(text).answer for text in continuations]
    verdicts = classify_all(list(zip(prompts, answers, strict=True)))
    return [
        bool(answer.strip()) and verdict.label == "FC"
        for answer, verdict in zip(answers, verdicts, strict=True)
    ]


def openings(tokenizer: Any, depths: Sequence[int]) -> list[str]:
    """The first k tokens of the opening as text, for each k; ValueError beyond its end."""
    ids = tokenizer.encode(texts()["opening"], add_special_tokens=False)
    if max(depths) > len(ids):
        raise ValueError(f"analyse.depth: {max(depths)}; the opening has {len(ids)} tokens")
    return [tokenizer.decode(ids[:k], clean_up_tokenization_spaces=False) for k in depths]


def curve(
    generator: Generator,
    tokenizer: Any,
    asked: Sequence[Asked],
    depths: Sequence[int],
    *,
    max_new_tokens: int,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[Depth]:
    """Share of the prompts that are answered after k tokens of the opening, for each k; greedy.

    The judge sees what the model adds to the opening, not the opening. It tells refusals, not
    harm: a share is an upper bound of attack success.
    """
    requests = {}
    for k, prefix in zip(depths, openings(tokenizer, depths), strict=True):
        for one in asked:
            sampler = Sampler(
                temperature=0.0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                seed=seed_of(seed, "depth", one.id),
            )
            name = f"{k}:{one.id}"
            messages = ({"role": "user", "content": one.text},)
            requests[name] = Request(name, messages, sampler, prefix=prefix)
    answers: dict[str, str] = {}
    for request, samples in generator.generate(requests.values()):
        answers[request.id] = samples[0].text if samples else ""
        progress(1)
    found = []
    for k in depths:
        names = [f"{k}:{one.id}" for one in asked]
        verdicts = complied([one.text for one in asked], [answers[name] for name in names])
        low, high = wilson(sum(verdicts), len(verdicts))
        asr = sum(verdicts) / len(verdicts)
        found.append(Depth(model=generator.name, k=k, n=len(asked), asr=asr, low=low, high=high))
    return found
