"""States: hidden states of a model at chosen tokens of many texts, packed into rows of one shape.

Legend: L layers, T tokens of a row, P positions, D hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saro_jax.data.packing import first_fit, round_up, slots
from saro_jax.models import decoder
from saro_jax.models.architecture import Architecture
from saro_jax.models.attention import Tokens
from saro_jax.text import chat

FEWEST = 64  # positions that a row has room for: one program for nearly all rows


@dataclass(frozen=True, eq=False)
class Marked:
    """Tokens int32 [n], and the indices of those whose states are wanted."""

    ids: np.ndarray
    at: tuple[int, ...]


def prompt_end(tokenizer: Any, text: str) -> Marked:
    """A request in the model's chat template; its state is read where the answer would begin."""
    ids = chat.prompt_ids(tokenizer, (chat.Message("user", text),))
    return Marked(ids, (len(ids) - 1,))


def step_ends(tokenizer: Any, prompt: str, response: str, steps: Sequence[str]) -> Marked:
    """A request with its response, read at the end of the prompt and of each reasoning step.

    `steps` are texts of the response in order; tokens after the last are left out. ValueError where
    one is not there.
    """
    turn = (chat.Message("user", prompt),), (chat.Message("assistant", response),)
    rendered = chat.render(tokenizer, *turn)
    chars, at = [rendered.start], 0
    for step in steps:
        found = response.find(step.strip(), at)
        if found < 0:
            raise ValueError(f"a step is not in the response: {step[:40]!r}")
        at = found + len(step.strip())
        chars.append(rendered.start + at)
    # The token that holds the last character; before the response, the last that is whole.
    first = int(np.searchsorted(rendered.ends, chars[0], side="right")) - 1
    after = np.searchsorted(rendered.ends, chars[1:], side="left")
    places = (first, *(int(i) for i in after))
    return Marked(rendered.ids[: places[-1] + 1], places)


@partial(jax.jit, static_argnames=("arch", "dtype"))
def _read(arch, params, tokens_1T, where, at_1P, *, dtype):
    return decoder.states(arch, params, tokens_1T, where, at_1P, dtype=dtype)[:, 0].astype(
        jnp.float32
    )


def read(
    arch: Architecture,
    params: Any,
    texts: Sequence[Marked],
    *,
    row_length: int,
    dtype: Any = jnp.float32,
    progress: Callable[[int], None] = lambda count: None,
) -> list[np.ndarray]:
    """Hidden states of each text, float32 [L + 1, P, D], layer 0 the embedding (`decoder.states`).

    ValueError for a text of more than row_length tokens. progress: told how many texts are done.
    """
    lengths = [len(text.ids) for text in texts]
    found: dict[int, np.ndarray] = {}
    for members in first_fit(lengths, row_length, slots(row_length)):
        tokens, segment, position = (np.zeros((1, row_length), np.int32) for _ in range(3))
        places: list[int] = []
        start = 0
        for number, i in enumerate(members, 1):
            span = slice(start, start + lengths[i])
            tokens[0, span], segment[0, span] = texts[i].ids, number
            position[0, span] = np.arange(lengths[i])
            places += [start + at for at in texts[i].at]
            start += lengths[i]
        at_1P = np.zeros((1, round_up(len(places), FEWEST)), np.int32)
        at_1P[0, : len(places)] = places
        where = Tokens(*map(jnp.asarray, (segment, np.zeros_like(segment), position)))
        states = np.asarray(_read(arch, params, tokens, where, at_1P, dtype=jnp.dtype(dtype)))
        first = 0
        for i in members:
            count = len(texts[i].at)
            found[i] = states[:, first : first + count]
            first += count
        progress(len(members))
    return [found[i] for i in range(len(texts))]
