"""Owns what is asked of a generator and what comes back: one interface for engine and servers."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from saro_jax.records import Sampler


@dataclass(frozen=True)
class Request:
    """A conversation to be continued `n` times.

    `sampler.seed` is that of the request: sample i depends on (seed, i) and on nothing else that
    runs beside it. `prefix` is text the assistant's turn already begins with, such as reasoning
    that is injected.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    sampler: Sampler
    n: int = 1
    prefix: str = ""


@dataclass(frozen=True)
class Sample:
    """One continuation: `text` without the prefix and without the stop that ended it.

    finish: eos = the model ended its turn, stop = a stop string, length = cut off, filter = a
    server withheld or cut it, so that it is no answer of the model. `ids` and
    `logprobs` (log-probs under the model itself, nats) are those of the sampled tokens, where the
    generator tells them; `forced`, the thought was closed by budget forcing; `cost` in money;
    `seconds` from when it was begun to its last token, with others beside it.
    """

    text: str
    finish: Literal["eos", "length", "stop", "filter"]
    prompt_tokens: int | None = None
    tokens: int | None = None
    ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    forced: bool = False
    cost: float = 0.0
    seconds: float | None = field(default=None, compare=False)


class Generator(Protocol):
    """A model that answers: `name` stands in the records, `sha` is what its answers depend on.

    `generate` takes requests as they come and yields each with its n samples when they are done, in
    any order; a request that failed for good comes with what it got, perhaps nothing.
    """

    name: str
    sha: str

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]: ...
