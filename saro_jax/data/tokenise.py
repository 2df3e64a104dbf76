"""Tokens: a row to ids with a mask of the scored ones, chosen and rejected cut at one place."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from saro_jax.data.rows import PreferenceRow, Reject, Row, SFTRow, Turns
from saro_jax.text import chat

TooLong = Literal["truncate", "reject"]


@dataclass(frozen=True, eq=False)
class Branch:
    """Tokens that continue an item's prefix: ids int32[n], scored bool[n] (1 = counts in the loss).

    truncated is set where the end, with its end-of-turn token, was cut to the maximal length.
    """

    ids: np.ndarray
    scored: np.ndarray
    truncated: bool


@dataclass(frozen=True, eq=False)
class Item:
    """A tokenised row: prefix int32[p], never scored, and its branches.

    SFT: no prefix (p = 0), one branch with the whole conversation. Preference: the prefix is what
    both see, the branches are (chosen, rejected).
    """

    id: str
    where: str
    kind: str
    weight: float
    prefix: np.ndarray
    branches: tuple[Branch, ...]


class RowError(ValueError):
    """A row that cannot be an item; the message is the reason of its reject."""


def tokenise(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    too_long: TooLong = "truncate",
    workers: int = 0,
) -> tuple[list[Item], list[Reject]]:
    """Tokenises all rows, in order, in `workers` processes or (0) in this one, all the same.

    Raises ValueError at once for a tokenizer whose template ends no turn: every row would fail.
    Worker processes are spawned: a script that asks for them needs its `__name__` guard.
    """
    chat.end_of_turn(tokenizer)
    results: Any = grain.MapDataset.source(rows).map(_Tokenise(tokenizer, max_length, too_long))
    if workers > 0 and len(rows) > 0:
        # Grain's workers read absl flags, which only absl's own main parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # The tokenizer is no faster with threads: each worker reads on one.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
        multiprocessing = grain.MultiprocessingOptions(workers, per_worker_buffer_size=16)
        results = results.to_iter_dataset(options).mp_prefetch(multiprocessing)
    items: list[Item] = []
    rejects: list[Reject] = []
    for result in results:
        if isinstance(result, Item):
            items.append(result)
        else:
            rejects.append(result)
    return items, rejects


def tokenise_row(row: Row, tokenizer: Any, max_length: int, too_long: TooLong = "truncate") -> Item:
    """The item of a row, whose prefix and any one branch have at most max_length tokens together.

    Every text is tokenised once, whole, as one conversation; what follows the last end-of-turn
    token is not part of it (a template's newline, which nothing reads). SFT scores the completion's
    assistant turns. A preference branch is scored from its first token, which is the first that
    holds text past the cut (prompt, header and the row's `prefix`), or an earlier one where the two
    texts part before it because a token crosses the cut. What both answers begin with stays in the
    branches, scored.

    A sequence that is too long loses its end, never its prompt or prefix; a row without a scored
    token left raises RowError, and so does one that is too long where too_long is "reject".
    """
    try:
        if isinstance(row, SFTRow):
            prefix, branches = np.zeros(0, np.int32), (_sft(row, tokenizer),)
        else:
            prefix, branches = _preference(row, tokenizer)
    except ValueError as error:
        raise RowError(str(error)) from error
    branches = tuple(_fit(branch, len(prefix), max_length, too_long) for branch in branches)
    if len(branches) == 2 and np.array_equal(branches[0].ids, branches[1].ids):
        cut = " after truncation" if branches[0].truncated else ""
        raise RowError(f"chosen equals rejected: the same {len(branches[0].ids)} tokens{cut}")
    return Item(row.id, row.where, row.kind, row.weight, prefix, branches)


def item_key_parts(item: Item) -> bytes:
    """The tokens and masks of an item as bytes to hash: equal for equal items on any machine."""
    parts = [struct.pack("<II", len(item.prefix), len(item.branches)), _ids_bytes(item.prefix)]
    for branch in item.branches:
        parts.append(struct.pack("<I", len(branch.ids)))
        parts.append(_ids_bytes(branch.ids))
        parts.append(branch.scored.astype(np.uint8).tobytes())
    return b"".join(parts)


@dataclass(frozen=True)
class _Tokenise:
    """`tokenise_row` as a value that can be sent to a worker process."""

    tokenizer: Any
    max_length: int
    too_long: TooLong

    def __call__(self, row: Row) -> Item | Reject:
        try:
            return tokenise_row(row, self.tokenizer, self.max_length, self.too_long)
        except RowError as error:
            return Reject(row.where, row.id, str(error))


def _sft(row: SFTRow, tokenizer: Any) -> Branch:
    rendered = _render(tokenizer, row.prompt, row.completion)
    return Branch(rendered.ids, rendered.scored, False)


def _preference(row: PreferenceRow, tokenizer: Any) -> tuple[np.ndarray, tuple[Branch, Branch]]:
    chosen, rejected = (
        _render(tokenizer, row.prompt, _continued(row.prefix, answer))
        for answer in (row.chosen, row.rejected)
    )
    cut = chosen.start + len(row.prefix)
    if chosen.text[:cut] != rejected.text[:cut]:
        raise ValueError("chat template: the two answers change the text before them")
    # Ends never fall: the first token with text past the cut is the first that ends past it.
    start = min(int(np.searchsorted(r.ends, cut, side="right")) for r in (chosen, rejected))
    parted = np.flatnonzero(chosen.ids[:start] != rejected.ids[:start])
    start = int(parted[0]) if len(parted) else start
    return chosen.ids[:start], (_branch(chosen, start, cut), _branch(rejected, start, cut))


def _branch(rendered: chat.Rendered, start: int, cut: int) -> Branch:
    scored = rendered.scored[start:].copy()
    # Tokens of the prefix that the two tokenisations do not share are part of the choice.
    scored[: int(np.searchsorted(rendered.ends, cut, side="right")) - start] = True
    return Branch(rendered.ids[start:], scored, False)


def _continued(prefix: str, answer: Turns | str) -> Turns | str:
    """The answer with the shared beginning of its first assistant turn: one turn, one header."""
    if isinstance(answer, str):
        return prefix + answer
    return (replace(answer[0], content=prefix + answer[0].content), *answer[1:])


def _render(tokenizer: Any, prompt: Turns | str, completion: Turns | str) -> chat.Rendered:
    if isinstance(prompt, str) or isinstance(completion, str):
        assert isinstance(prompt, str) and isinstance(completion, str), "rows.py makes both raw"
        return chat.render_raw(tokenizer, prompt, completion)
    if tokenizer.chat_template is None:
        texts = (chat.raw_text(tokenizer, turns) for turns in (prompt, completion))
        return chat.render_raw(tokenizer, *texts)
    return chat.render(tokenizer, prompt, completion)


def _fit(branch: Branch, prefix_length: int, max_length: int, too_long: TooLong) -> Branch:
    length = prefix_length + len(branch.ids)
    if length > max_length:
        if too_long == "reject":
            raise RowError(f"too long: {length} tokens, data.max_length={max_length}")
        room = max(0, max_length - prefix_length)
        branch = Branch(branch.ids[:room], branch.scored[:room], True)
    if not branch.scored.any():
        raise RowError(f"nothing to score: no answer token within data.max_length={max_length}")
    return branch


def _ids_bytes(ids: np.ndarray) -> bytes:
    return ids.astype("<i4").tobytes()
