"""Judging by a checkpoint in JAX: guards with the probability of their verdict, and any chat model.

Legend: B questions of a batch, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saro_jax.generation import engine
from saro_jax.judging import guards
from saro_jax.judging.guards import Answer, Guard, Verdict
from saro_jax.judging.rubrics import Complete
from saro_jax.models import decoder, hub, huggingface
from saro_jax.models.architecture import Architecture
from saro_jax.models.attention import Tokens
from saro_jax.text import chat

WINDOW, STRIDE = 1024, 896  # tokens of a long response that are judged at a time, and their step


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model to ask; `version` is the hash of its weights."""

    arch: Architecture
    params: Any
    tokenizer: Any
    dtype: Any
    version: str


def load(model: str, dtype: str | None = None) -> Checkpoint:
    """Load a model folder, .gguf file or Hub id; dtype: float32 on a CPU, else bfloat16."""
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    folder = hub.resolve(model)
    arch = huggingface.load_architecture(folder)
    params = huggingface.load_params(folder, arch, dtype)
    version = huggingface.weights_hash(folder)[:16]
    return Checkpoint(arch, params, chat.load_tokenizer(folder), jnp.dtype(dtype), version)


def judge(
    model: Checkpoint, guard: Guard, rows: Sequence[tuple[str, str]], batch_size: int = 8
) -> list[Answer]:
    """Ask a guard about (prompt, response) pairs; what it can not be asked is invalid, with why.

    A response longer than WINDOW tokens is judged in windows: unsafe if any of them is. P(unsafe)
    compares the two words of a verdict where the guard's text has it, and is the largest of the
    windows and policies.
    """
    questions: list[np.ndarray] = []
    wanted: list[list[list[int]] | str] = []  # by row, window and policy; or why not
    for prompt, response in rows:
        try:
            mine = [
                [question_ids(model, guard, prompt, part, p) for p in guard.policies or ("",)]
                for part in windows(model.tokenizer, response)
            ]
        except ValueError as error:
            wanted.append(str(error))
            continue
        numbers = []
        for window in mine:
            numbers.append(list(range(len(questions), len(questions) + len(window))))
            questions.extend(window)
        wanted.append(numbers)
    asked = ask(model, guard, questions, batch_size)
    answers = []
    for row in wanted:
        if isinstance(row, str):
            answers.append(Answer(Verdict("invalid"), None, row))
            continue
        by_window = [
            guards.by_policy(guard, [guards.parse(guard, asked[i][0]) for i in window])
            for window in row
        ]
        texts = [asked[i][0] for window in row for i in window]
        scores = [asked[i][1] for window in row for i in window]
        known = [score for score in scores if score is not None]
        worst = max(known) if known and len(known) == len(scores) else None
        answers.append(Answer(guards.worst(by_window), worst, "\n---\n".join(texts)))
    return answers


def ask(
    model: Checkpoint, guard: Guard, questions: Sequence[np.ndarray], batch_size: int
) -> list[tuple[str, float | None]]:
    """The guard's greedy text after each question, and P(unsafe) where its verdict stands."""
    ids = _generate(model, questions, guard.new_tokens, batch_size)
    safe, unsafe = word_ids(model.tokenizer, guard)
    texts, before = [], []
    for generated in ids:
        text, place = _decode(model, generated), _verdict_place(model, guard, generated)
        texts.append(text)
        before.append(None if place is None else generated[:place])
    scores: list[float | None] = [None] * len(texts)
    leads = {i: lead for i, lead in enumerate(before) if lead is not None}
    known = list(leads)
    whole = [np.concatenate([questions[i], lead]) for i, lead in leads.items()]
    for batch in engine.batches([len(ids) for ids in whole], batch_size):
        logp_BV = next_logps(model, [whole[i] for i in batch])
        bad = np.logaddexp.reduce(logp_BV[:, unsafe], axis=-1)
        good = np.logaddexp.reduce(logp_BV[:, safe], axis=-1)
        for i, p in zip(batch, 1 / (1 + np.exp(good - bad)), strict=True):
            scores[known[i]] = float(p)
    return list(zip(texts, scores, strict=True))


def next_logps(model: Checkpoint, sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Log-probs of the token after each sequence, float64 [B, V]."""
    lengths = np.array([len(ids) for ids in sequences])
    tokens_BT = np.zeros((len(sequences), engine.cache_slots(int(lengths.max()))), np.int32)
    for row, ids in zip(tokens_BT, sequences, strict=True):
        row[: len(ids)] = ids
    logits = _last_logits(model.arch, model.params, tokens_BT, lengths - 1, dtype=model.dtype)
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


@partial(jax.jit, static_argnames=("arch", "dtype"))
def _last_logits(arch, params, tokens_BT, last_B, *, dtype):
    # What pads a row on the right stands after every token that is read.
    ones = jnp.ones_like(tokens_BT)
    position = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    where = Tokens(ones, 0 * ones, position)
    hidden_BTD = decoder.forward(arch, params, tokens_BT, where, dtype=dtype)
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], 1)[:, 0]
    return decoder.logits(arch, params, hidden_BD)


def question_ids(
    model: Checkpoint, guard: Guard, prompt: str, response: str, policy: str = ""
) -> np.ndarray:
    """Token ids of one question, int32; ValueError where a text holds control tokens or is long."""
    tokenizer = model.tokenizer
    control = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    for text in (prompt, response):
        if found := [token for token in sorted(control) if token in text]:
            raise ValueError(f"control token in text: {found[0]!r}")
    if guard.template:
        if tokenizer.chat_template is None:
            raise ValueError(f"{guard.name}: the tokenizer has no chat template to ask it by")
        text = _templated(tokenizer, prompt, response)
    else:
        text = guards.question(guard, prompt, response, policy)
        bos = tokenizer.bos_token or ""
        text = bos + text.removeprefix("<s>")
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    if len(ids) + guard.new_tokens > model.arch.max_position_embeddings:
        raise ValueError(
            f"{len(ids)} tokens; the guard takes {model.arch.max_position_embeddings} with its own"
        )
    return ids


def _templated(tokenizer: Any, prompt: str, response: str) -> str:
    """The guard's own template on the two turns, as texts or (Llama Guard 3 1B) as parts."""
    pair = (("user", prompt), ("assistant", response))
    for parts in (False, True):
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in pair
        ]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if prompt.strip() in text and response.strip() in text:
            return text
    raise ValueError(f"chat template of {tokenizer.name_or_path} leaves a turn out")


def windows(tokenizer: Any, text: str) -> list[str]:
    """A text, or parts of it of WINDOW tokens, overlapping, where it is longer."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    if len(offsets) <= WINDOW:
        return [text]
    starts = range(0, len(offsets) - WINDOW + STRIDE, STRIDE)
    return [text[offsets[i][0] : offsets[min(i + WINDOW, len(offsets)) - 1][1]] for i in starts]


def word_ids(tokenizer: Any, guard: Guard) -> tuple[list[int], list[int]]:
    """Ids of the tokens that a safe and an unsafe verdict begin with, after a space or not."""

    def firsts(word: str) -> set[int]:
        return {tokenizer.encode(w, add_special_tokens=False)[0] for w in (word, f" {word}")}

    safe, unsafe = firsts(guard.safe), firsts(guard.unsafe)
    shared = safe & unsafe  # a space of its own says nothing
    if safe == shared or unsafe == shared:
        raise ValueError(f"{guard.name}: {guard.safe!r} and {guard.unsafe!r} begin with one token")
    return sorted(safe - shared), sorted(unsafe - shared)


def complete(model: Checkpoint, new_tokens: int = 512) -> Complete:
    """This model, greedy, as what a rubric asks."""

    def ask_one(messages: list[dict[str, str]]) -> str:
        turns = tuple(chat.Message(m["role"], m["content"]) for m in messages)
        return _decode(
            model, _generate(model, [chat.prompt_ids(model.tokenizer, turns)], new_tokens, 1)[0]
        )

    return ask_one


def _generate(model: Checkpoint, prompts: Sequence[np.ndarray], new: int, batch_size: int):
    stops = set(model.arch.eos_token_ids)
    if model.tokenizer.eos_token_id is not None:
        stops.add(model.tokenizer.eos_token_id)
    completions = engine.generate(
        model.arch,
        model.params,
        prompts,
        max_new_tokens=new,
        batch_size=batch_size,
        stop_ids=stops,
        dtype=model.dtype,
    )
    return [c.ids[:-1] if c.finish == "stop" else c.ids for c in completions]


def _verdict_place(model: Checkpoint, guard: Guard, ids: np.ndarray) -> int | None:
    """Index of the token that begins the verdict; None where the text has no place for one."""
    for place in range(len(ids) + 1):
        rest = _decode(model, ids[place : place + 1])
        if guard.lead.match(_decode(model, ids[:place])) and (place == len(ids) or rest.strip()):
            return place
    return None


def _decode(model: Checkpoint, ids: np.ndarray) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
