"""Tokens: a row to ids with a mask of the scored ones, chosen and rejected cut at one place."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from saro_jax.data.rows import PreferenceRow, Reject, Row, SamplesRow, SFTRow, Turns, UnpairedRow
from saro_jax.text import chat, reasoning

TooLong = Literal["truncate", "reject"]
Scope = Literal["suffix", "step"]


@dataclass(frozen=True, eq=False)
class Branch:
    """Tokens that continue an item's prefix: ids int32[n], scored bool[n] (1 = counts in the loss).

    truncated is set where the end, with its end-of-turn token, was cut to the maximal length.
    reasoning bool[n]: 1 = the token begins within the reasoning, `</think>` included; None = none.
    """

    ids: np.ndarray
    scored: np.ndarray
    truncated: bool
    reasoning: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Item:
    """A tokenised row: prefix int32[p], never scored, and its branches.

    SFT: no prefix (p = 0), one branch with the whole conversation. Preference: the prefix is what
    both see, the branches are (chosen, rejected). Unpaired: the prefix is what the response
    follows, the one branch the response, which `label` calls desirable or not. noise: probability
    that a pair is the wrong way round, None where the row does not say.
    """

    id: str
    where: str
    kind: str
    weight: float
    prefix: np.ndarray
    branches: tuple[Branch, ...]
    noise: float | None = None
    label: bool = True


class RowError(ValueError):
    """A row that cannot be an item; the message is the reason of its reject."""


def tokenise(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    too_long: TooLong = "truncate",
    workers: int = 0,
    scope: Scope = "suffix",
) -> tuple[list[Item], list[Reject]]:
    """Tokenises all rows, in order, in `workers` processes or (0) in this one, all the same.

    Raises ValueError at once for a tokenizer whose template ends no turn: every row would fail.
    Worker processes are spawned: a script that asks for them needs its `__name__` guard.
    """
    chat.end_of_turn(tokenizer)
    one = _Tokenise(tokenizer, max_length, too_long, scope)
    results: Any = grain.MapDataset.source(rows).map(one)
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


def tokenise_row(
    row: Row,
    tokenizer: Any,
    max_length: int,
    too_long: TooLong = "truncate",
    scope: Scope = "suffix",
) -> Item:
    """The item of a row, whose prefix and any one branch have at most max_length tokens together.

    Every text is tokenised once, whole, as one conversation; what follows the last end-of-turn
    token is not part of it (a template's newline, which nothing reads). SFT scores the completion's
    assistant turns. A preference branch is scored from its first token, which is the first that
    holds text past the cut (prompt, header and the row's `prefix`), or an earlier one where the two
    texts part before it because a token crosses the cut. What both answers begin with stays in the
    branches, scored; with scope "step" only the first step of the continuation in which the two
    answers differ is scored (a token belongs to the step in which it begins, the end of turn to the
    last). An unpaired row is scored like one branch of a pair, several samples like more than two.

    A sequence that is too long loses its end, never its prompt or prefix; a row without a scored
    token left raises RowError, and so does one that is too long where too_long is "reject".
    """
    try:
        if isinstance(row, SFTRow):
            prefix, branches = np.zeros(0, np.int32), (_sft(row, tokenizer),)
        elif isinstance(row, UnpairedRow):
            prefix, branches = _continuations(row, (row.completion,), tokenizer)
        elif isinstance(row, SamplesRow):
            prefix, branches = _continuations(row, row.completions, tokenizer)
        else:
            prefix, branches = _preference(row, tokenizer, scope)
    except ValueError as error:
        raise RowError(str(error)) from error
    branches = tuple(_fit(branch, len(prefix), max_length, too_long) for branch in branches)
    if isinstance(row, PreferenceRow) and np.array_equal(branches[0].ids, branches[1].ids):
        cut = " after truncation" if branches[0].truncated else ""
        raise RowError(f"chosen equals rejected: the same {len(branches[0].ids)} tokens{cut}")
    noise = row.noise if isinstance(row, PreferenceRow | UnpairedRow) else None
    label = row.label if isinstance(row, UnpairedRow) else True
    return Item(row.id, row.where, row.kind, row.weight, prefix, branches, noise, label)


def item_key_parts(item: Item) -> bytes:
    """The tokens and masks of an item as bytes to hash: equal for equal items on any machine."""
    parts = [struct.pack("<II", len(item.prefix), len(item.branches)), _ids_bytes(item.prefix)]
    for branch in item.branches:
        parts.append(struct.pack("<I", len(branch.ids)))
        parts.append(_ids_bytes(branch.ids))
        parts.append(branch.scored.astype(np.uint8).tobytes())
        if branch.reasoning is not None:  # decides which of the branch's sums a token goes to
            parts.append(b"reasoning" + branch.reasoning.astype(np.uint8).tobytes())
    return b"".join(parts)


def digest(items: Sequence[Item]) -> str:
    """Hash of the items in their order: equal where two machines would train on the same."""
    found = hashlib.blake2b(digest_size=8)
    for item in items:
        facts = (item.id, item.kind, item.weight, item.noise, item.label)
        found.update(repr(facts).encode("utf-8", "surrogatepass") + item_key_parts(item))
    return f"{len(items)} rows, hash {found.hexdigest()}"


@dataclass(frozen=True)
class _Tokenise:
    """`tokenise_row` as a value that can be sent to a worker process."""

    tokenizer: Any
    max_length: int
    too_long: TooLong
    scope: Scope

    def __call__(self, row: Row) -> Item | Reject:
        try:
            return tokenise_row(row, self.tokenizer, self.max_length, self.too_long, self.scope)
        except RowError as error:
            return Reject(row.where, row.id, str(error))


def _sft(row: SFTRow, tokenizer: Any) -> Branch:
    rendered = _render(tokenizer, row.prompt, row.completion)
    return Branch(rendered.ids, rendered.scored, False)


def _continuations(
    row: UnpairedRow | SamplesRow, completions: Sequence[Turns], tokenizer: Any
) -> tuple[np.ndarray, tuple[Branch, ...]]:
    rendered = [
        _render(tokenizer, row.prompt, _continued(row.prefix, answer)) for answer in completions
    ]
    start, cut = _shared(rendered, row.prefix)
    return rendered[0].ids[:start], tuple(_branch(one, start, cut) for one in rendered)


def _shared(rendered: Sequence[chat.Rendered], prefix: str) -> tuple[int, int]:
    """Number of tokens that the renderings of several answers share, and the cut in their text."""
    first = rendered[0]
    cut = first.start + len(prefix)
    if any(one.text[:cut] != first.text[:cut] for one in rendered):
        raise ValueError("chat template: the answers change the text before them")
    # Ends never fall: the first token with text past the cut is the first that ends past it.
    start = min(int(np.searchsorted(one.ends, cut, side="right")) for one in rendered)
    for one in rendered:
        parted = np.flatnonzero(one.ids[:start] != first.ids[:start])
        start = int(parted[0]) if len(parted) else start
    return start, cut


def _preference(
    row: PreferenceRow, tokenizer: Any, scope: Scope
) -> tuple[np.ndarray, tuple[Branch, Branch]]:
    chosen, rejected = (
        _render(tokenizer, row.prompt, _continued(row.prefix, answer))
        for answer in (row.chosen, row.rejected)
    )
    start, cut = _shared((chosen, rejected), row.prefix)
    a, b = _branch(chosen, start, cut), _branch(rejected, start, cut)
    if scope == "step":
        first, *ends = _diverging_step(_first_turn(row.chosen), _first_turn(row.rejected))
        begin = cut + first if first else 0  # tokens across the cut belong to the first step
        end_a, end_b = (None if end is None else cut + end for end in ends)
        a = _only(a, chosen, start, begin, end_a)
        b = _only(b, rejected, start, begin, end_b)
    return chosen.ids[:start], (a, b)


def _branch(rendered: chat.Rendered, start: int, cut: int) -> Branch:
    scored = rendered.scored[start:].copy()
    # Tokens of the prefix that the two tokenisations do not share are part of the choice.
    scored[: int(np.searchsorted(rendered.ends, cut, side="right")) - start] = True
    # The whole turn counts, with the row's prefix: `<think>` may stand there.
    inside = np.zeros(len(rendered.ids), np.bool_)
    starts = np.concatenate([[0], rendered.ends[:-1]])
    for first, last in reasoning.spans(rendered.text[rendered.start :]):
        inside |= (starts >= rendered.start + first) & (starts < rendered.start + last)
    return Branch(rendered.ids[start:], scored, False, inside[start:])


def _first_turn(answer: Turns | str) -> str:
    return answer if isinstance(answer, str) else answer[0].content


def _diverging_step(chosen: str, rejected: str) -> tuple[int, int | None, int | None]:
    """Where the first unequal step of two texts begins, and ends in each; None = with the turn."""
    steps = reasoning.steps(chosen), reasoning.steps(rejected)
    equal = 0
    while equal < min(map(len, steps)) and steps[0][equal] == steps[1][equal]:
        equal += 1
    begin = sum(map(len, steps[0][:equal]))
    ends = [begin + len(s[equal]) if equal + 1 < len(s) else None for s in steps]
    return begin, ends[0], ends[1]


def _only(
    branch: Branch, rendered: chat.Rendered, start: int, begin: int, end: int | None
) -> Branch:
    """The branch with its scored tokens cut to those that begin in [begin, end)."""
    starts = np.concatenate([[0], rendered.ends[:-1]])[start:]
    scored = branch.scored & (starts >= begin)
    if end is None:  # through the end-of-turn token: up to the next token that is given
        after = np.flatnonzero(~branch.scored & (starts >= begin))
        scored[after[0] if len(after) else len(scored) :] = False
    else:
        scored &= starts < end
    if not scored.any():
        raise ValueError("empty step: no token begins in the step in which the answers differ")
    return replace(branch, scored=scored)


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
        inside = None if branch.reasoning is None else branch.reasoning[:room]
        branch = Branch(branch.ids[:room], branch.scored[:room], True, inside)
    if not branch.scored.any():
        raise RowError(f"nothing to score: no answer token within data.max_length={max_length}")
    return branch


def _ids_bytes(ids: np.ndarray) -> bytes:
    return ids.astype("<i4").tobytes()
