"""Chat templates: conversations to token ids, with a mask of what the assistant wrote."""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from saro_jax.records import sha256

ROLES = ("system", "user", "assistant")

# Llama 3's templates print this date, or today's where none is given: ids would change overnight.
TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024"}

# What a template may put between the assistant header and the text: reasoning tags.
THINK_TAIL = re.compile(r"(?:<think>\s*)?(?:</think>\s*)?\Z")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation as one text and its tokens.

    ids, scored, ends: one entry a token. scored is 1 where the token holds text that the assistant
    writes in the completion, end-of-turn tokens included. ends is the character of `text` at which
    the token ends (never falls; pieces of one character share their end). start is the character at
    which the first completion text begins.
    """

    text: str
    ids: np.ndarray
    scored: np.ndarray
    ends: np.ndarray
    start: int


def load_tokenizer(folder: str | Path, chat_template_file: str | Path | None = None) -> Any:
    """Loads the fast tokenizer of a model folder; a jinja file replaces its chat template.

    Raises ValueError where a file is missing or the tokenizer is a slow one, without offsets.
    """
    # It advises to install torch, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # a slow import that reading rows does not need

    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no usable tokenizer: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: {type(tokenizer).__name__} gives no offsets; needs tokenizer.json"
        )
    if chat_template_file is not None:
        try:
            tokenizer.chat_template = Path(chat_template_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"model.chat_template: {chat_template_file}: {error.strerror}"
            ) from error
    return tokenizer


def render(
    tokenizer: Any, prompt: tuple[Message, ...], completion: tuple[Message, ...]
) -> Rendered:
    """Renders a conversation by its chat template; the completion's assistant turns are scored.

    The template never sees the text of a scored turn. It renders a mark in its place, and the text
    is put where the mark came out: no clause can strip the reasoning (Qwen3, DeepSeek-R1) or trim
    spaces, so the row's text is kept exactly and once. The empty reasoning block that Qwen3 writes
    before an answer without reasoning is removed. In short, a turn follows exactly what the
    generation prompt writes: a closed block there (a template in no-thinking mode) stays before a
    text that opens no reasoning of its own, and `<think>` opened there is not opened twice. What
    the template writes between the generation prompt and the text (Llama 2's space) has to be
    generated too, so it is scored. Assistant turns of the *prompt* are history and rendered as the
    template likes.

    The whole text is tokenised once, without special tokens added (the template writes BOS or
    nobody does), so the ids are those of `apply_chat_template` wherever it keeps the text, less
    what it writes after the last end-of-turn token (a newline mostly), which is cut. The
    end-of-turn token is the special token that follows the text, spaces between allowed (Llama 2)
    and scored.

    Raises ValueError for a conversation that the template refuses, changes, or renders otherwise
    than for generation, for text that holds a control token, and for a template without end-of-turn
    token.
    """
    text, spans = _conversation(tokenizer, prompt, completion)
    ids, ends = _encode(tokenizer, text)
    starts = np.concatenate([[0], ends[:-1]])
    scored = np.zeros(len(ids), np.bool_)
    for start, _, end in spans:
        scored |= (ends > start) & (starts < end)
    return Rendered(text, ids, scored, ends, spans[0][1])


def render_raw(tokenizer: Any, prompt: str, completion: str) -> Rendered:
    """Renders two texts without a template: BOS if the tokenizer adds one, prompt, completion, EOS.

    The completion and EOS are scored. BOS and EOS are not repeated where the text brings its own.
    """
    eos, bos = tokenizer.eos_token, _habitual_bos(tokenizer)
    if eos is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path} has no eos token to end a text with")
    text = prompt + completion
    if not text.endswith(eos):
        text += eos
    ids, ends = _encode(tokenizer, text)
    scored = ends > len(prompt)
    # By id, not as text: a SentencePiece tokenizer splits the text after "<s>" in another way.
    if bos is not None and (len(ids) == 0 or ids[0] != bos):
        ids, ends = np.insert(ids, 0, bos), np.insert(ends, 0, 0)
        scored = np.insert(scored, 0, False)
    return Rendered(text, ids, scored, ends, len(prompt))


def prompt_ids(tokenizer: Any, messages: tuple[Message, ...], prefix: str = "") -> np.ndarray:
    """Ids int32[n] of a conversation up to the answer: generation prompt, or unfinished answer.

    `prefix` is the beginning of the assistant's answer, with its `<think>`. Without a chat template
    the one user message is the text. The ids are a prefix of `render`'s, merges at the cut apart.
    """
    if tokenizer.chat_template is None:
        rendered = render_raw(tokenizer, raw_text(tokenizer, messages), prefix)
        # The last token is the EOS that a finished text gets.
        return rendered.ids[:-1]
    if prefix:
        text, spans = _conversation(tokenizer, messages, (Message("assistant", prefix),))
        return _encode(tokenizer, text[: spans[0][1] + len(prefix)])[0]
    _refuse_control_tokens(tokenizer, messages)
    return _encode(tokenizer, _apply(tokenizer, messages, generation=True))[0]


def generation_prefill(tokenizer: Any) -> str:
    """The part of the answer that the generation prompt writes: an opened `<think>`, or nothing.

    A sampled answer is this text and the generated one.
    """
    if tokenizer.chat_template is None:
        return ""
    tail = _think_tail(_apply(tokenizer, (Message("user", "x"),), generation=True))
    return "" if "</think>" in tail else tail


def tokenizer_sha(tokenizer: Any) -> str:
    """The hash of a tokenizer and its chat template, 16 hex digits."""
    return sha256(f"{tokenizer.backend_tokenizer.to_str()}\n{tokenizer.chat_template}")[:16]


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token that ends an assistant turn: the template's, or EOS without a template.

    Raises ValueError naming the template where it writes none.
    """
    turn = (Message("user", "x"),), (Message("assistant", "y"),)
    rendered = (
        render(tokenizer, *turn) if tokenizer.chat_template else render_raw(tokenizer, "x", "y")
    )
    return int(rendered.ids[-1])


def raw_text(tokenizer: Any, messages: tuple[Message, ...]) -> str:
    """The text of a single message, for a tokenizer without chat template; else ValueError."""
    if len(messages) != 1:
        raise ValueError(
            f"no chat template: tokenizer {tokenizer.name_or_path} has none, and the row has "
            f"{len(messages)} turns where one prompt and one answer are allowed"
        )
    return messages[0].content


def _conversation(
    tokenizer: Any, prompt: tuple[Message, ...], completion: tuple[Message, ...]
) -> tuple[str, list[tuple[int, int, int]]]:
    """Text up to the last end-of-turn token, and each assistant turn's characters.

    They are (first after the generation prompt, first of the row's text, first after the end of
    turn).
    """
    _refuse_control_tokens(tokenizer, (*prompt, *completion))
    answers = [message.content for message in completion if message.role == "assistant"]
    if not answers:
        raise ValueError("no assistant turn: the completion has none to score")
    marks = _marks((*prompt, *completion), len(answers))
    unused = iter(marks)
    marked = tuple(
        Message(message.role, next(unused)) if message.role == "assistant" else message
        for message in completion
    )
    rest = _apply(tokenizer, (*prompt, *marked), generation=False)
    generation = _apply(tokenizer, prompt, generation=True)
    tail = _think_tail(generation)
    opening = generation[: len(generation) - len(tail)]
    # Some templates (Mistral's) place the system turn elsewhere once an answer follows.
    if not rest.startswith(opening.rstrip()):
        raise ValueError(
            f"chat template of {tokenizer.name_or_path} renders another prompt before an answer "
            "than for generation"
        )
    text, spans, gap, ending = "", [], None, None
    for mark, answer in zip(marks, answers, strict=True):
        head, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError(
                f"chat template of {tokenizer.name_or_path} drops or repeats an assistant turn"
            )
        turn_end = _end_pattern(tokenizer).match(rest)
        if turn_end is None or (ending is not None and turn_end.group() != ending):
            raise ValueError(
                f"chat template of {tokenizer.name_or_path} writes no end-of-turn token after "
                f"an assistant turn, found {rest[:20]!r}"
            )
        ending = turn_end.group()
        head = head[: len(head) - len(_think_tail(head))]
        if gap is None:
            gap = max(0, len(head) - len(opening))
        text += head + _kept_tail(tail, answer)
        spans.append((len(text) - gap, len(text), len(text) + len(answer) + len(ending)))
        text += answer + ending
        rest = rest[len(ending) :]
    return text, spans


def _kept_tail(tail: str, answer: str) -> str:
    """What of the generation prompt's reasoning tags stands before this answer."""
    if not tail or answer.lstrip().startswith("<think>"):
        return ""
    return tail if "</think>" in tail or "</think>" in answer else ""


def _think_tail(text: str) -> str:
    match = THINK_TAIL.search(text)
    return match.group() if match else ""


def _marks(messages: tuple[Message, ...], count: int) -> list[str]:
    """Words that no message holds and that no template clause has a reason to look into."""
    salt = 0
    while any(f"SCORED{salt}TURN" in message.content for message in messages):
        salt += 1
    return [f"SCORED{salt}TURN{i}END" for i in range(count)]


def _apply(tokenizer: Any, messages: tuple[Message, ...], generation: bool) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation, **TEMPLATE_OPTIONS
        )
    except (TemplateError, ValueError) as error:
        raise ValueError(
            f"chat template of {tokenizer.name_or_path} refuses the conversation: "
            f"{_first_line(error)}"
        ) from error


def _refuse_control_tokens(tokenizer: Any, messages: tuple[Message, ...]) -> None:
    # In a text they would become the real tokens: a turn that ends, or begins, inside a turn.
    pattern = _control_pattern(tokenizer)
    for message in messages:
        if found := pattern.search(message.content):
            raise ValueError(f"control token in text: {found.group()!r} in the {message.role} turn")


def _encode(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32[n] and token ends int64[n] of a text, nothing added."""
    encoding = _encoder(tokenizer).encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids, np.int32)
    ends = np.array([end for _, end in encoding.offsets], np.int64)
    return ids, np.maximum.accumulate(ends) if len(ends) else ends


# The three below read a tokenizer once: what is changed in it after its first use is not seen.


@lru_cache(maxsize=4)
def _encoder(tokenizer: Any) -> Any:
    """The Rust half without its post-processor, which trims spaces off offsets (Llama 3)."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.post_processor = TemplateProcessing(single="$A")
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


@lru_cache(maxsize=4)
def _control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches the special tokens of a tokenizer as text, the longest first."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {token for token in tokenizer.all_special_tokens if token}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")


@lru_cache(maxsize=4)
def _end_pattern(tokenizer: Any) -> re.Pattern[str]:
    return re.compile(rf"\s*(?:{_control_pattern(tokenizer).pattern})")


def _habitual_bos(tokenizer: Any) -> int | None:
    """The BOS id if the tokenizer itself writes it before a text."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids and ids[0] == bos else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
