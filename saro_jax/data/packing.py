"""Items -> packed rows of a few fixed shapes.

Legend: B rows, T tokens of a row, S scored positions of a row (S = T, padded), P item slots of a
row, K branches of an item (1 for a conversation, 2 for a preference pair).

Two layouts of an item with several branches:
  shared    prefix, branch 1, branch 2, ...: the prefix once; every branch continues its positions
  separate  prefix, branch 1, prefix, branch 2, ...: the usual one, kept as the reference
All branches of an item lie in one row, so that its loss needs no other row.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from saro_jax.data.tokenise import Item

Array = Any  # numpy on the host, jax in a step


class Rows(NamedTuple):
    """A block of packed rows. Scored positions of a row come first in its S axis."""

    tokens: Array  # int32 [B, T], 0 where padded
    segment: Array  # int32 [B, T], 0 = padding
    branch: Array  # int32 [B, T], 0 = shared prefix
    position: Array  # int32 [B, T], restarts with each example, continues into each branch
    source: Array  # int32 [B, S], index in the row of the token that predicts a scored one
    target: Array  # int32 [B, S], id of the scored token
    valid: Array  # bool [B, S], 1 = a scored token
    sequence: Array  # int32 [B, S], slot * K + branch that the scored token belongs to
    item: Array  # int32 [B, P], index of the item in each slot, -1 where empty
    weight: Array  # float32 [B, P], 0 where empty
    part: Array  # int32 [B, S], segment of its branch that a scored token counts to (Piece.part)
    noise: Array  # float32 [B, P], probability of a flipped pair, -1 where the row does not say
    label: Array  # float32 [B, P], 1 = desirable (kto)


class Piece(NamedTuple):
    """One item laid out: what it adds to a row."""

    index: int
    tokens: np.ndarray
    branch: np.ndarray
    position: np.ndarray
    segment: np.ndarray  # 0.. within the item
    source: np.ndarray
    target: np.ndarray
    sequence: np.ndarray  # branch of each scored token
    weight: float
    part: np.ndarray  # segment of each scored token, 2 * (answer) + (beyond the shortest branch)


def lay_out(item: Item, index: int, layout: str) -> Piece:
    """Tokens of one item in `layout` (shared | separate), and what is scored from where.

    A scored token with nothing before it has no state that predicts it and does not count.
    """
    p = len(item.prefix)
    copies = 1 if layout == "shared" else len(item.branches)
    tokens: list[np.ndarray] = []
    branch: list[np.ndarray] = []
    position: list[np.ndarray] = []
    segment: list[np.ndarray] = []
    source: list[np.ndarray] = []
    target: list[np.ndarray] = []
    sequence: list[np.ndarray] = []
    part: list[np.ndarray] = []
    length = 0
    shortest = min(int(_counted(item, k).sum()) for k in range(len(item.branches)))
    for k, continuation in enumerate(item.branches):
        n = len(continuation.ids)
        if k < copies:
            start = length
            tokens.append(item.prefix)
            branch.append(np.zeros(p, np.int32))
            position.append(np.arange(p, dtype=np.int32))
            segment.append(np.full(p, k, np.int32))
            length += p
        tokens.append(continuation.ids)
        # A lone branch is the prefix's own continuation: no need for a branch of its own.
        branch.append(np.full(n, k + 1 if copies < len(item.branches) else 0, np.int32))
        position.append(np.arange(p, p + n, dtype=np.int32))
        segment.append(np.full(n, k if copies > 1 else 0, np.int32))
        before = np.arange(length - 1, length + n - 1, dtype=np.int32)
        before[0] = start + p - 1  # the end of the prefix, also where another branch lies between
        counts = _counted(item, k)
        source.append(before[counts])
        target.append(continuation.ids[counts])
        sequence.append(np.full(counts.sum(), k, np.int32))
        answer = np.ones(n, np.bool_) if continuation.reasoning is None else ~continuation.reasoning
        beyond = np.arange(counts.sum()) >= shortest
        part.append(2 * answer[counts].astype(np.int32) + beyond)
        length += n
    return Piece(
        index=index,
        tokens=np.concatenate(tokens),
        branch=np.concatenate(branch),
        position=np.concatenate(position),
        segment=np.concatenate(segment),
        source=np.concatenate(source),
        target=np.concatenate(target),
        sequence=np.concatenate(sequence),
        weight=item.weight,
        part=np.concatenate(part),
    )


def _counted(item: Item, k: int) -> np.ndarray:
    """The scored tokens of branch k that have a state which predicts them."""
    counts = item.branches[k].scored.copy()
    counts[0] &= len(item.prefix) > 0
    return counts


def laid_out_length(item: Item, layout: str) -> int:
    """Tokens that `lay_out` would give."""
    copies = 1 if layout == "shared" else len(item.branches)
    return copies * len(item.prefix) + sum(len(branch.ids) for branch in item.branches)


def slots(row_length: int) -> int:
    """Most items that a row may hold: a bound that only very short items meet."""
    return max(1, row_length // 16)


def first_fit(lengths: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    """First-fit-decreasing bins: lists of indices, at most `most` in each, deterministic."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > capacity:
            raise ValueError(f"item {i} of {lengths[i]} tokens does not fit a row of {capacity}")
        for b, free in enumerate(room):
            if lengths[i] <= free and len(bins[b]) < most:
                bins[b].append(i)
                room[b] -= lengths[i]
                break
        else:
            bins.append([i])
            room.append(capacity - lengths[i])
    return bins


def pack(
    items: Sequence[Item],
    indices: Sequence[int],
    *,
    row_length: int,
    rows: int,
    layout: str,
    buckets: int = 1,
) -> Iterator[Rows]:
    """Blocks of `rows` packed rows that hold items[i] for i in indices, each exactly once.

    A block's rows have the smallest of `buckets` lengths (equal parts of row_length) that holds
    what is in them: each length is a program of its own to compile, and less padding to compute.
    The last block is filled up with empty rows. Deterministic in its arguments.
    """
    lengths = [laid_out_length(items[i], layout) for i in indices]
    bins = first_fit(lengths, row_length, slots(row_length))
    used = {id(members): sum(lengths[i] for i in members) for members in bins}
    bins.sort(key=lambda members: -used[id(members)])
    part = -(-row_length // buckets)
    for start in range(0, len(bins), rows):
        block = bins[start : start + rows]
        T = min(row_length, -(-used[id(block[0])] // part) * part)
        members = [[indices[i] for i in row] for row in block]
        yield _block(items, members, T, rows, slots(row_length), layout)


def _block(items, members: list[list[int]], T: int, B: int, P: int, layout: str) -> Rows:
    K = len(items[members[0][0]].branches)
    out = Rows(
        tokens=np.zeros((B, T), np.int32),
        segment=np.zeros((B, T), np.int32),
        branch=np.zeros((B, T), np.int32),
        position=np.zeros((B, T), np.int32),
        source=np.zeros((B, T), np.int32),
        target=np.zeros((B, T), np.int32),
        valid=np.zeros((B, T), np.bool_),
        sequence=np.zeros((B, T), np.int32),
        item=np.full((B, P), -1, np.int32),
        weight=np.zeros((B, P), np.float32),
        part=np.zeros((B, T), np.int32),
        noise=np.full((B, P), -1, np.float32),
        label=np.zeros((B, P), np.float32),
    )
    for b, row in enumerate(members):
        at, scored, segments = 0, 0, 0
        for slot, index in enumerate(row):
            piece = lay_out(items[index], index, layout)
            n, s = len(piece.tokens), len(piece.target)
            out.tokens[b, at : at + n] = piece.tokens
            out.branch[b, at : at + n] = piece.branch
            out.position[b, at : at + n] = piece.position
            out.segment[b, at : at + n] = piece.segment + segments + 1
            out.source[b, scored : scored + s] = piece.source + at
            out.target[b, scored : scored + s] = piece.target
            out.valid[b, scored : scored + s] = True
            out.sequence[b, scored : scored + s] = piece.sequence + slot * K
            out.item[b, slot] = index
            out.weight[b, slot] = piece.weight
            out.part[b, scored : scored + s] = piece.part
            noise = items[index].noise
            out.noise[b, slot] = -1 if noise is None else noise
            out.label[b, slot] = items[index].label
            at, scored, segments = at + n, scored + s, segments + int(piece.segment.max()) + 1
    return out


def real_tokens(rows: Rows) -> int:
    """Tokens that are not padding, each counted once."""
    return int((rows.segment > 0).sum())
