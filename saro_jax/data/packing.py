"""Items -> packed rows of a few fixed shapes.

Legend: B rows, T tokens of a row, S scored positions of a row (S = T, padded), P item slots of a
row, K branches of an item (1 for a conversation, 2 for a preference pair, the most of any item).

Two layouts of an item with several branches:
  shared    prefix, branch 1, branch 2, ...: the prefix once; every branch continues its positions
  separate  prefix, branch 1, prefix, branch 2, ...: the usual one, kept as the reference
All branches of an item lie in one row, so that its loss needs no other row.
"""

from collections import deque
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


def round_up(x: int, to: int) -> int:
    """The least multiple of `to` that is not below x."""
    return -(-x // to) * to


class Shape(NamedTuple):
    """How items become blocks: tokens and number of their rows, layout, number of row lengths.

    Row lengths are multiples of `unit`, and `row_length` is one.
    """

    row_length: int
    rows: int
    layout: str
    buckets: int = 1
    unit: int = 1

    @property
    def part(self) -> int:
        """What the row lengths are multiples of (the longest is `row_length` itself)."""
        return round_up(-(-self.row_length // self.buckets), self.unit)

    def bucket(self, used: int) -> int:
        """The smallest row length that holds `used` tokens."""
        return min(self.row_length, round_up(used, self.part))


def computed_tokens(used: Sequence[int], shape: Shape) -> int:
    """Tokens of the blocks that rows with `used` tokens each become, padding included."""
    longest = sorted(used, reverse=True)[:: shape.rows]
    return sum(shape.bucket(most) * shape.rows for most in longest)


def arrange(
    items: Sequence[Item], indices: Sequence[int], shape: Shape, dealt: Sequence[list[int]] = ()
) -> list[list[int]]:
    """The rows, lists of item indices, that the items of one step become; every index once.

    Of first-fit-decreasing into each row length, as many even rows as blocks need, and `dealt`
    (rows that hold the same items already), the one that computes least. Deterministic.
    """
    length = {i: laid_out_length(items[i], shape.layout) for i in indices}
    lengths = [length[i] for i in indices]
    most = slots(shape.row_length)
    plans = [list(map(list, dealt))] if dealt else []
    for k in range(shape.buckets, 0, -1):
        capacity = min(shape.row_length, k * shape.part)
        if plans and capacity < max(lengths):
            break
        plans.append([[indices[i] for i in row] for row in first_fit(lengths, capacity, most)])
    if shape.rows > 1:
        fewest = -(-min(map(len, plans)) // shape.rows) * shape.rows
        for count in (fewest, fewest + shape.rows):
            even = spread(lengths, count)
            fits = all(sum(lengths[i] for i in row) <= shape.row_length for row in even)
            if fits and max(map(len, even)) <= most:
                plans.append([[indices[i] for i in row] for row in even if row])

    def cost(plan: list[list[int]]) -> tuple[int, int]:
        return computed_tokens([sum(length[i] for i in row) for row in plan], shape), len(plan)

    return min(plans, key=cost)


def spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` rows of nearly the same length: longest first, each into the shortest row so far."""
    rows: list[list[int]] = [[] for _ in range(count)]
    used = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        shortest = used.index(min(used))
        rows[shortest].append(i)
        used[shortest] += lengths[i]
    return rows


def deal(
    items: Sequence[Item], indices: Sequence[int], steps: int, shape: Shape
) -> list[list[list[int]]]:
    """Rows for several steps at once: the items packed together, then dealt out row by row.

    Returns for each step its rows; every step gets len(indices) / steps items, every index goes to
    one step. More items to choose from fill rows better than those of one step could.
    """
    lengths = [laid_out_length(items[i], shape.layout) for i in indices]
    rows = first_fit(lengths, shape.row_length, slots(shape.row_length))
    room = [len(indices) // steps] * steps
    out: list[list[list[int]]] = [[] for _ in range(steps)]
    waiting = deque(sorted(rows, key=len, reverse=True))
    while waiting:
        row = waiting.popleft()
        step = room.index(max(room))
        if len(row) > room[step]:  # it goes to two steps
            waiting.append(row[room[step] :])
            row = row[: room[step]]
        out[step].append([indices[i] for i in row])
        room[step] -= len(row)
    return [arrange(items, [i for row in step for i in row], shape, step) for step in out]


def blocks(
    items: Sequence[Item],
    rows: Sequence[list[int]],
    shape: Shape,
    own: np.ndarray | None = None,
) -> Iterator[Rows]:
    """Blocks of `shape.rows` packed rows, longest first, that hold the given rows of items.

    A block's rows have the smallest row length that holds what is in them: each length is a program
    of its own to compile, and less padding to compute. The last block is filled up with empty rows.

    own: bool [B], the rows of a block that this process computes; None = all. The tokens of other
    rows are left 0, pages that nothing touches, while `item`, `weight`, `noise` and `label` are
    those of the whole block: what a step needs to know of the rows of other processes.
    """
    K = max(len(item.branches) for item in items)
    used = [sum(laid_out_length(items[i], shape.layout) for i in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda r: -used[r])
    for start in range(0, len(rows), shape.rows):
        members = [rows[r] for r in order[start : start + shape.rows]]
        T = shape.bucket(used[order[start]])
        yield _block(items, members, T, K, shape, own)


def pack(
    items: Sequence[Item],
    indices: Sequence[int],
    *,
    row_length: int,
    rows: int,
    layout: str,
    buckets: int = 1,
    unit: int = 1,
    own: np.ndarray | None = None,
) -> Iterator[Rows]:
    """Blocks that hold items[i] for i in indices, each exactly once: `arrange`, then `blocks`."""
    shape = Shape(row_length, rows, layout, buckets, unit)
    yield from blocks(items, arrange(items, list(indices), shape), shape, own)


def _block(
    items, members: list[list[int]], T: int, K: int, shape: Shape, own: np.ndarray | None
) -> Rows:
    B, P = shape.rows, slots(shape.row_length)
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
            out.item[b, slot] = index
            out.weight[b, slot] = items[index].weight
            noise = items[index].noise
            out.noise[b, slot] = -1 if noise is None else noise
            out.label[b, slot] = items[index].label
            if own is not None and not own[b]:
                continue
            piece = lay_out(items[index], index, shape.layout)
            n, s = len(piece.tokens), len(piece.target)
            out.tokens[b, at : at + n] = piece.tokens
            out.branch[b, at : at + n] = piece.branch
            out.position[b, at : at + n] = piece.position
            out.segment[b, at : at + n] = piece.segment + segments + 1
            out.source[b, scored : scored + s] = piece.source + at
            out.target[b, scored : scored + s] = piece.target
            out.valid[b, scored : scored + s] = True
            out.sequence[b, scored : scored + s] = piece.sequence + slot * K
            out.part[b, scored : scored + s] = piece.part
            at, scored, segments = at + n, scored + s, segments + int(piece.segment.max()) + 1
    return out


def scored_tokens(item: Item) -> int:
    """Tokens of an item that count in the loss, of all branches."""
    return sum(int(_counted(item, k).sum()) for k in range(len(item.branches)))
