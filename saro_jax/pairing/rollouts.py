"""Rollouts: continuations of unfinished thoughts, drawn once, judged, as outcomes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saro_jax.generation.requests import Generator, Request, Sample
from saro_jax.judging.judges import Judge
from saro_jax.pairing import judges
from saro_jax.pairing.continuations import CountTokens, of_sample
from saro_jax.pairing.outcomes import Limits, Outcome, outcome
from saro_jax.records import Journal, Judgment, Prompt, Sampler, content_id, sha256


@dataclass(frozen=True)
class Ask:
    """n continuations of `prefix`, the beginning of an answer to `prompt`.

    `messages` replace the prompt as what the generator is asked, and then the prefix is not forced
    on it (a repair: it is told the steps and goes on). `origin` and `parents` stand in the traces.
    """

    prompt: Prompt
    prefix: str
    n: int
    origin: str = "self"
    parents: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] | None = None

    @property
    def key(self) -> str:
        told = None if self.messages is None else [dict(one) for one in self.messages]
        return content_id("ask", self.prompt.id, self.prefix, self.n, told)


@dataclass(frozen=True)
class Rollouts:
    """Draws and judges continuations; what the journal holds is not drawn again.

    The seed of a request follows from `seed` and what is asked, so that the draw is the same in
    whatever order. `tell` hears how many requests are done; `failures` has, by ask, why it could
    not be drawn: there is no room for it in the model, or a server refuses it.
    """

    generator: Generator
    journal: Journal
    sampler: Sampler
    seed: int
    limits: Limits
    bases: Mapping[str, str]  # the text of the bare request by prompt id, where it differs
    guard: Judge | None = None
    count: CountTokens = lambda text: len(text.split())
    tell: Callable[[int], None] = lambda _: None
    failures: dict[str, str] = field(default_factory=dict)

    def draw(self, asks: Sequence[Ask]) -> dict[str, list[Outcome]]:
        """The outcomes of each ask, by its key; a request that failed for good has none."""
        unique = {ask.key: ask for ask in asks}
        samples = self._samples(unique)
        traces, prompts, keys = [], [], []
        for key, ask in unique.items():
            for i, sample in enumerate(samples[key]):
                if sample.finish == "filter":  # the server kept it back
                    continue
                text = sample.text
                if ask.messages is not None:  # a repair begins where the prefix ends
                    text = text.lstrip()
                traces.append(
                    of_sample(
                        ask.prompt,
                        ask.prefix,
                        dataclasses.replace(sample, text=text),
                        self._sampler(ask),
                        i,
                        model=self.generator.name,
                        origin=ask.origin,
                        parents=ask.parents,
                        count=self.count,
                    )
                )
                prompts.append(ask.prompt)
                keys.append(key)
        found: dict[str, list[Outcome]] = {key: [] for key in unique}
        for key, one in zip(keys, self.judged(traces, prompts), strict=True):
            found[key].append(one)
        return found

    def judged(self, traces: Sequence[Any], prompts: Sequence[Prompt]) -> list[Outcome]:
        """The outcomes of whole traces."""
        mine: dict[str, list[Judgment]] = {}
        said = judges.by_form(traces, prompts)
        if self.guard is not None:
            bases = [self.bases.get(prompt.id, prompt.text) for prompt in prompts]
            said += judges.by_guard(self.guard, traces, prompts, bases)
        for one in said:
            mine.setdefault(one.trace_id, []).append(one)
        pairs = zip(traces, prompts, strict=True)
        return [outcome(trace, prompt, mine[trace.id]) for trace, prompt in pairs]

    def _samples(self, asks: Mapping[str, Ask]) -> dict[str, list[Sample]]:
        todo = [ask for key, ask in asks.items() if key not in self.journal.values]
        requests = self._fitting([self._request(ask) for ask in todo])
        self.tell(len(asks) - len(requests))
        told: Mapping[str, str] = getattr(self.generator, "failures", {})
        short: dict[str, list[Sample]] = {}
        if requests:
            for request, samples in self.generator.generate(requests):
                if len(samples) < request.n:  # failed for good this time: the next run asks again
                    short[request.id] = samples
                    self.failures[request.id] = told.get(request.id, "not enough samples")
                else:
                    # Without the time that it took: the same answers are the same bytes.
                    kept = [dataclasses.replace(one, seconds=None) for one in samples]
                    self.journal.append(request.id, [dataclasses.asdict(one) for one in kept])
                self.tell(1)
        if requests and len(short) == len(requests) and not any(short.values()):
            why = self.failures[requests[0].id]
            raise ValueError(f"{self.generator.name}: no request succeeded: {why}")
        done = self.journal.values
        return {
            key: [_sample(one) for one in done[key]] if key in done else short.get(key, [])
            for key in asks
        }

    def _request(self, ask: Ask) -> Request:
        return Request(
            id=ask.key,
            messages=ask.messages or ({"role": "user", "content": ask.prompt.text},),
            sampler=self._sampler(ask),
            n=ask.n,
            prefix="" if ask.messages is not None else ask.prefix,
        )

    def _fitting(self, requests: Sequence[Request]) -> list[Request]:
        """Those that a model run here has room for."""
        check = getattr(self.generator, "job", lambda _: None)
        fitting = []
        for request in requests:
            try:
                check(request)
                fitting.append(request)
            except ValueError as error:
                self.failures[request.id] = str(error).removeprefix(f"{request.id}: ")
        return fitting

    def _sampler(self, ask: Ask) -> Sampler:
        return self.sampler.model_copy(update={"seed": self._seed(ask)})

    def _seed(self, ask: Ask) -> int:
        return int(sha256(f"{self.seed}:{ask.key}")[:7], 16)


def _sample(value: Mapping[str, Any]) -> Sample:
    fields: dict[str, Any] = dict(value)
    for name in ("ids", "logprobs"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    return Sample(**fields)


def share_good(outcomes: Sequence[Outcome], limits: Limits) -> tuple[int, int]:
    """(good, all) of the outcomes that have a valid verdict."""
    valid = [one for one in outcomes if not one.answer.invalid]
    return sum(one.good(limits) for one in valid), len(valid)
