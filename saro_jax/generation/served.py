"""Owns the generator that is a policy behind a server, its tokens counted by its own tokenizer."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from saro_jax.config import ModelConfig, ServerConfig
from saro_jax.generation.api import Api
from saro_jax.generation.requests import Request, Sample
from saro_jax.models import peft
from saro_jax.records import Sampler, content_id
from saro_jax.text import chat, reasoning

GREETING = ({"role": "user", "content": "Hello"},)
BEGUN = f"{reasoning.OPEN}\nThe user greets me.\n\n"


class Served:
    """A `requests.Generator` behind `api`; `tokenizer` is that of the weights that it serves.

    Answers that begin with a prefix need the tokenizer: `generate` first asks two short requests,
    whose token counts show whether the server goes on from text that a turn has begun with, and is
    a one-line ValueError where it does not. Close it.
    """

    def __init__(self, api: Api, tokenizer: Any | None):
        self.api, self.tokenizer = api, tokenizer
        self.name, self.failures, self.close = api.name, api.failures, api.close
        self.prefill, self.tokenizer_sha, self.sha = "", None, api.sha
        if tokenizer is not None:
            self.prefill = chat.generation_prefill(tokenizer)
            self.tokenizer_sha = chat.tokenizer_sha(tokenizer)
            self.sha = content_id(api.sha, self.tokenizer_sha)
        self._checked = False

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Each request with its samples, as `Api.generate`."""
        for request, samples in self.api.generate(self._asked(requests)):
            inside = request.prefix or self.prefill
            if reasoning.OPEN in inside and reasoning.CLOSE not in inside:
                samples = [dataclasses.replace(one, text=_inside(one.text)) for one in samples]
            yield request, samples

    def count(self, text: str) -> int | None:
        """Tokens of a text, where there is a tokenizer."""
        if self.tokenizer is None:
            return None
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def _asked(self, requests: Iterable[Request]) -> Iterator[Request]:
        for request in requests:
            if request.prefix and not self._checked:
                self._check()
            yield request

    def _check(self) -> None:
        """Whether a begun turn makes the prompt longer by its own tokens, and by no new turn."""
        if self.tokenizer is None:
            raise ValueError(
                f"{self.api.url}: answers that begin with given text need model.path, whose "
                "tokenizer shows whether the server goes on from it"
            )
        sampler = Sampler(temperature=0.0, top_p=1.0, max_new_tokens=1)
        asked = [Request(f"check {text!r}", GREETING, sampler, prefix=text) for text in ("", BEGUN)]
        found = {request.id: samples for request, samples in self.api.generate(asked)}
        for request in asked:
            if not found[request.id]:
                why = self.failures[request.id]
                raise ValueError(
                    f"{self.api.url}: does not go on from text that an answer begins with "
                    f"(continue_final_message): {why}"
                )
        plain, begun = (found[request.id][0].prompt_tokens or 0 for request in asked)
        greeting = (chat.Message("user", GREETING[0]["content"]),)
        wanted = len(chat.prompt_ids(self.tokenizer, greeting, BEGUN)) - len(
            chat.prompt_ids(self.tokenizer, greeting)
        )
        if begun - plain != wanted:
            raise ValueError(
                f"{self.api.url}: an answer that has begun makes the prompt {begun - plain} tokens "
                f"longer instead of {wanted}: the server does not go on from it "
                "(continue_final_message, as vLLM and SGLang do), or its chat template or "
                "tokenizer is not that of model.path"
            )
        self._checked = True


def _inside(text: str) -> str:
    """A continuation of a thought without the opening that a server's own parser writes anew."""
    return text.removeprefix(f"{reasoning.OPEN}\n") if text.startswith(reasoning.OPEN) else text


def opened(url: str, name: str | None, model: ModelConfig, server: ServerConfig) -> Served:
    """The model of section `model` at `url`, where it is called `name`; None = as model.path."""
    tokenizer = None
    if model.path is not None:
        folder, _ = peft.resolve(model.path, model.revision)
        tokenizer = chat.load_tokenizer(folder, model.chat_template)
    return Served(Api(url, name or model.path or "", server), tokenizer)
