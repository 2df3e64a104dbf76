"""Owns the model class of lm-evaluation-harness: its requests, answered by the decoder and engine.

Legend: B rows of a batch, T tokens of a row (padded), S scored tokens of a row (padded).

Needs the extra `lm-eval`. What a request means (tokens of context and continuation, cuts from the
left, stop strings) is as in the harness' `hf` model; requests of similar length share a batch.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jinja2.exceptions import TemplateError
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm

from saro_jax.generation.engine import Cut, Engine, Job
from saro_jax.generation.programs import cast_matrices
from saro_jax.generation.sampling import Sampling
from saro_jax.models import decoder, huggingface, peft
from saro_jax.models.attention import Tokens
from saro_jax.objectives.logprobs import token_scores
from saro_jax.text import chat

BATCH = 16  # rows where --batch_size is auto
LEAST = 32  # tokens of a padded row, at least
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
Pair = tuple[Any, list[int], list[int]]  # (texts, ids of the context, ids of the continuation)


@register_model("saro_jax")
class SaroJax(TemplateLM):
    """`--model saro_jax`; model_args as the parameters here.

    pretrained: model folder, adapter folder, .gguf file, Hub id or quickstart. dtype: None =
    float32 on a CPU, else bfloat16. max_length: None = the model's own. add_bos_token: None = as
    the tokenizer does. seed: of requests that sample. device and max_batch_size are the harness'
    and take no part: jax chooses the device. Raises ValueError for what it can not load.
    """

    def __init__(
        self,
        pretrained: str = "quickstart",
        revision: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = "auto",
        chat_template: str | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        folder, adapter = peft.resolve(pretrained, revision)
        self.arch = huggingface.load_architecture(folder)
        self.max_length = int(max_length or self.arch.max_position_embeddings)
        if not 1 < self.max_length <= self.arch.max_position_embeddings:
            raise ValueError(
                f"max_length={max_length}; allowed: 2 to {self.arch.max_position_embeddings}"
            )
        decoder.check_length(self.arch, self.max_length)
        self.dtype = jnp.dtype(dtype)
        params = peft.load_params(folder, adapter, self.arch, dtype, None)
        self.params = cast_matrices(params, self.dtype)
        self.tokenizer = chat.load_tokenizer(folder, chat_template)
        self.batch_size = BATCH if str(batch_size).startswith("auto") else int(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; allowed: auto or >= 1")
        self.max_gen_toks, self.seed = int(max_gen_toks), int(seed)
        self.add_bos_token = add_bos_token
        self._engine: Engine | None = None

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids, with what the tokenizer adds by itself unless told, but never a second BOS."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text; without its system turn where the template refuses it."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return self.tokenizer.apply_chat_template(turns, **options)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list:
        """The log-likelihood of each whole text, in windows of the model's length."""
        windows: list[Pair] = []
        owners: list[int] = []
        for i, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(i)
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (logp, _) in zip(owners, scores, strict=True):
            sums[i] += logp
        for request, logp in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logp)
        return sums

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probs of the continuation, whether each of its tokens is the most likely)."""
        for texts, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"{texts!r:.200}: {len(context)} tokens of context, {len(continuation)} to "
                    f"score; allowed: >= 1 of context, 1 to {self.max_length} to score"
                )
        # Requests of the same ids, and those of the longest rows first, as memory wants it.
        kept = self.max_length + 1
        rows = [tuple((context + scored)[-kept:]) for _, context, scored in requests]
        keys = [(row, len(pair[2])) for row, pair in zip(rows, requests, strict=True)]
        wanted = sorted(set(keys), key=lambda key: (-len(key[0]), -key[1], key[0]))
        found: dict[tuple, tuple[float, bool]] = {}
        bar = tqdm(total=len(wanted), unit="row", disable=True if disable_tqdm else None)
        with bar:
            for start in range(0, len(wanted), self.batch_size):
                some = wanted[start : start + self.batch_size]
                found.update(zip(some, self._score(some), strict=True))
                bar.update(len(some))
        answers = [found[key] for key in keys]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _score(self, keys: Sequence[tuple[tuple[int, ...], int]]) -> list[tuple[float, bool]]:
        """Of each (ids, how many of the last are scored)."""
        B = self.batch_size
        T = _padded(max(len(ids) for ids, _ in keys) - 1)
        S = min(T, _padded(max(count for _, count in keys)))
        tokens_BT, real_BT = np.zeros((2, B, T), np.int32)
        at_BS, target_BS, valid_BS = np.zeros((3, B, S), np.int32)
        for row, (ids, count) in enumerate(keys):
            length = len(ids) - 1
            tokens_BT[row, :length], real_BT[row, :length] = ids[:-1], 1
            at_BS[row, :count] = np.arange(length - count, length)
            target_BS[row, :count], valid_BS[row, :count] = ids[-count:], 1
        batch = (tokens_BT, real_BT, at_BS, target_BS, valid_BS.astype(bool))
        logp_B, greedy_B = jax.device_get(_scores(self.arch, self.params, *batch, dtype=self.dtype))
        return [
            (float(logp), bool(greedy))
            for logp, greedy, _ in zip(logp_B, greedy_B, keys, strict=False)
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first stop string, the end of text or the limit."""
        if self._engine is None:
            stops = {*self.arch.eos_token_ids, self.eot_token_id}
            self._engine = Engine(
                self.arch,
                self.params,
                slots=self.batch_size,
                stop_ids=stops,
                dtype=self.dtype,
            )
        asked = [self._job(i, *request.args) for i, request in enumerate(requests)]
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][0].prompt))
        place = {id(job): i for i, (job, _) in enumerate(asked)}
        texts = [""] * len(asked)
        bar = tqdm(total=len(asked), unit="answer", disable=True if disable_tqdm else None)
        with bar:
            for job, (one,) in self._engine.run(asked[i][0] for i in order):
                i = place[id(job)]
                text = self.tokenizer.decode(one.ids, skip_special_tokens=True)
                texts[i] = postprocess_generated_text(text, asked[i][1], None)
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                bar.update(1)
        return texts

    def _job(self, number: int, context: str, options: dict[str, Any]) -> tuple[Job, list[str]]:
        """What the engine is asked, and the stop strings."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = [stop for stop in handle_stop_sequences(given.pop("until", None), eos=end) if stop]
        new = int(given.pop("max_gen_toks"))
        given.pop("do_sample", None)  # temperature is 0 where it is false
        unknown = sorted(given.keys() - {*SAMPLING})
        if unknown:
            allowed = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING))
            raise ValueError(f"generation_kwargs: {unknown[0]}; allowed: {allowed}")
        room = self.max_length - new
        if room < 1:
            raise ValueError(f"max_gen_toks={new}; allowed: < max_length, {self.max_length}")
        sampling = Sampling(
            float(given.get("temperature", 0.0)),
            float(given.get("top_p", 1.0)),
            int(given.get("top_k", 0)),
            float(given.get("min_p", 0.0)),
        )
        ids = np.array(self.tok_encode(context)[-room:], np.int32)
        review = partial(_review, self.tokenizer, until)
        return Job(ids, new, sampling, self.seed, (number,), review=review), until


def _review(tokenizer: Any, until: list[str], ids: np.ndarray, *_: Any) -> Cut | None:
    """Ends a sample with the token that completes a stop string."""

    def stops(n: int) -> bool:
        text = tokenizer.decode(ids[:n])
        return any(stop in text for stop in until)

    if not stops(len(ids)):
        return None
    return Cut(1 + bisect_left(range(1, len(ids)), True, key=stops))


def _padded(length: int) -> int:
    """The length it is padded to: a power of two, so that few programs are compiled."""
    return max(LEAST, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnames=("arch", "dtype"))
def _scores(arch, params, tokens_BT, real_BT, at_BS, target_BS, valid_BS, *, dtype):
    """Sums of log-probs and whether all are the most likely, [B] each."""
    position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    where = Tokens(real_BT, jnp.zeros_like(real_BT), position_BT)
    hidden_BTD = decoder.forward(arch, params, tokens_BT, where, dtype=dtype)
    hidden_BSD = jnp.take_along_axis(hidden_BTD, at_BS[..., None], axis=1)
    scores = token_scores(
        hidden_BSD,
        decoder.head(arch, params),
        target_BS,
        valid_BS,
        softcap=arch.final_softcap,
    )
    return scores.logp.sum(-1), (scores.correct.sum(-1) == valid_BS.sum(-1))
