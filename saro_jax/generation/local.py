"""Owns the generator that is a model in this process: requests of text in, samples of text out."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from saro_jax.generation.engine import Completion, Cut, Engine, Finish, Force, Job
from saro_jax.generation.requests import Request, Sample
from saro_jax.generation.sampling import Sampling
from saro_jax.models import huggingface, peft
from saro_jax.models.architecture import Architecture
from saro_jax.models.decoder import Params
from saro_jax.parallel import sharding
from saro_jax.records import Sampler, sha256
from saro_jax.text import chat, reasoning

FINISHES: dict[Finish, Literal["eos", "length", "stop"]] = {
    "stop": "eos",
    "length": "length",
    "cut": "stop",
}
CLOSING = "\n</think>\n\n"  # what budget forcing ends a thought with


@dataclass(frozen=True)
class _Opening:
    """Text that the assistant's turn begins with, and whether the template opened a thought."""

    prefix: str
    prefilled_open: bool

    def unfinished(self, text: str) -> bool:
        """Whether the turn is inside a thought after `text`."""
        parsed = reasoning.parse(self.prefix + text, prefilled_open=self.prefilled_open)
        return parsed.status == "unclosed"


class Local:
    """A `requests.Generator` on this process' devices; `sha` is the hash of weights and tokenizer.

    The end of a turn is the model's eos or its template's. slots: sequences decoded at a time.
    look: called after every burst of decoding; what it raises ends the generation.
    """

    def __init__(
        self,
        arch: Architecture,
        params: Params,
        tokenizer: Any,
        *,
        name: str,
        sha: str,
        dtype: Any = np.float32,
        slots: int = 16,
        unroll: bool | None = None,
        mesh: Mesh | None = None,
        look: Callable[[], None] | None = None,
    ):
        self.name, self.sha, self.tokenizer, self._look = name, sha, tokenizer, look
        stops = {chat.end_of_turn(tokenizer), *arch.eos_token_ids}
        self.engine = Engine(
            arch, params, slots=slots, stop_ids=stops, dtype=dtype, unroll=unroll, mesh=mesh
        )
        self.prefill = chat.generation_prefill(tokenizer)  # what the template begins a turn with
        self.tokenizer_sha = chat.tokenizer_sha(tokenizer)
        self._closing = tuple(tokenizer.encode(CLOSING, add_special_tokens=False))

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Yields each request with its samples; ValueError names the one that can not be asked."""
        asked: dict[int, tuple[Request, Job]] = {}

        def jobs() -> Iterator[Job]:
            for request in requests:
                job = self.job(request)
                asked[id(job)] = request, job
                yield job

        for job, completions in self.engine.run(jobs()):
            request, _ = asked.pop(id(job))
            yield request, [self._sample(request, job, one) for one in completions]

    def job(self, request: Request) -> Job:
        """What the engine is asked; ValueError, with the request's id, for what does not fit."""
        sampler = request.sampler
        messages = tuple(chat.Message(m["role"], m["content"]) for m in request.messages)
        try:
            job = Job(
                chat.prompt_ids(self.tokenizer, messages, request.prefix),
                sampler.max_new_tokens,
                Sampling(sampler.temperature, sampler.top_p, sampler.top_k, sampler.min_p),
                sampler.seed,
                range(request.n),
                sampler.think_tokens,
                self._review(request.prefix, sampler),
            )
            self.engine.check(job)
        except ValueError as error:
            raise ValueError(f"{request.id}: {error}") from None
        return job

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def text(self, ids: Any) -> str:
        """The text of ids, control tokens too."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _review(self, prefix: str, sampler: Sampler):
        """What ends a sample, or its thought, before the model does; None where nothing can."""
        look = self._look
        if not sampler.stop and sampler.think_tokens is None:
            return None if look is None else lambda *_: look()
        opening = _Opening(prefix, not prefix and "<think>" in self.prefill)

        def review(ids: np.ndarray, finish: Finish | None, forced: bool) -> Cut | Force | None:
            if look is not None:
                look()
            end = len(ids) - (finish == "stop")
            if sampler.stop and any(stop in self.text(ids[:end]) for stop in sampler.stop):
                return Cut(_first(end, lambda n: self._stop(ids[:n], sampler.stop) is not None))
            # A thought is closed when its budget is used up, or where the turn ends inside it.
            if sampler.think_tokens is None or forced or finish is None:
                return None
            if finish == "length" and len(ids) != min(sampler.think_tokens, sampler.max_new_tokens):
                return None
            if opening.unfinished(self.text(ids[:end])):
                return Force(self._closing, end)
            return None

        return review

    def _stop(self, ids: np.ndarray, stops: tuple[str, ...]) -> int | None:
        """The character at which the first of the stops begins."""
        text = self.text(ids)
        return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)

    def _sample(self, request: Request, job: Job, one: Completion) -> Sample:
        ids = one.ids[:-1] if one.finish == "stop" else one.ids
        text = self.text(ids)
        if one.finish == "cut":
            text = text[: self._stop(ids, request.sampler.stop)]
        return Sample(
            text,
            FINISHES[one.finish],
            prompt_tokens=len(job.prompt),
            tokens=len(one.ids),
            ids=tuple(one.ids.tolist()),
            logprobs=tuple(round(float(logp), 5) for logp in one.logps),
            forced=one.forced,
            seconds=one.seconds,
        )


def _first(end: int, holds: Any) -> int:
    """The least n in 1..end for which `holds`, which stays true from there on."""
    low, high = 0, end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Files:
    """A model before its weights are read; `sha` is what its answers depend on."""

    name: str
    folder: Path
    adapter: Path | None
    tokenizer: Any
    dtype: str
    sha: str


def find(
    model: str | None,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
) -> Files:
    """The files of a model folder, adapter folder, .gguf file or Hub id.

    dtype: what is computed in; None = float32 on a CPU, else bfloat16.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    folder, adapter = peft.resolve(model, revision)
    tokenizer = chat.load_tokenizer(folder, chat_template)
    sha = _sha(folder, adapter, tokenizer, dtype)
    return Files(name or model or "quickstart", folder, adapter, tokenizer, dtype, sha)


def load(
    model: str | Files | None,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    dtype: str | None = None,
    slots: int = 16,
    mesh: Mesh | None = None,
    name: str | None = None,
) -> Local:
    """The generator of a model that `find` knows, or has found.

    Adapters are added to the weights they belong to, in float32, before these are cast.
    """
    files = model
    if not isinstance(files, Files):
        files = find(files, revision=revision, chat_template=chat_template, dtype=dtype, name=name)
    arch = huggingface.load_architecture(files.folder)
    places = None
    if mesh is not None:
        from saro_jax.models import decoder

        decoder.check_mesh(arch, mesh)
        places = sharding.shardings(mesh, decoder.abstract_params(arch))
    params = peft.load_params(files.folder, files.adapter, arch, files.dtype, places)
    return Local(
        arch,
        params,
        files.tokenizer,
        name=files.name,
        sha=files.sha,
        dtype=files.dtype,
        slots=slots,
        mesh=mesh,
    )


def _sha(folder: Path, adapter: Path | None, tokenizer: Any, dtype: str) -> str:
    """What the answers depend on: weights, adapters, the tokenizer with its template, the dtype."""
    parts = [huggingface.weights_hash(folder), chat.tokenizer_sha(tokenizer), dtype]
    if adapter is not None:
        parts.append(huggingface.weights_hash(adapter / peft.WEIGHTS))
        parts.append((adapter / peft.CONFIG).read_text(encoding="utf-8"))
    return sha256("\n".join(parts))[:16]
