"""The input pipeline: items -> shuffled steps -> packed blocks, as a Grain iterator.

Step k of a run is a function of (seed, k) alone, so the iterator's state is one number, any number
of prefetch threads gives the same batches, and a resumed run sees what the straight one would have.
Every process of a run plans every step, from the lengths of all items, and packs its own rows of
it: the plan does not know how many processes there are.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import grain
import numpy as np

from saro_jax.config import DataConfig
from saro_jax.data import rows as rows_file
from saro_jax.data.packing import Shape, blocks, deal, laid_out_length, round_up
from saro_jax.data.rows import Reject, StageKind
from saro_jax.data.tokenise import Item, Scope, tokenise


def row_length(config: DataConfig, kind: StageKind, sequence: int = 1) -> int:
    """Tokens of a packed row: given, or room for two conversations or two pairs of any length.

    sequence: shards of a row, mesh.sequence; a given length that they do not divide is refused.
    """
    if config.row_length is None:
        return round_up(config.max_length * (4 if kind == "preference" else 2), sequence)
    if config.row_length % sequence:
        raise ValueError(
            f"data.row_length={config.row_length}: must be a multiple of mesh.sequence={sequence}, "
            f"the shards of each row; {round_up(config.row_length, sequence)} is the next"
        )
    return config.row_length


def read_items(
    config: DataConfig,
    sources: str | list[str],
    kind: StageKind,
    tokenizer: Any,
    *,
    layout: str,
    row_length: int,
    scope: Scope = "suffix",
) -> tuple[list[Item], list[Reject], int]:
    """Items of the rows of `sources` that fit a packed row; rejects; how many rows were read."""
    found, rejects = rows_file.read(sources, kind, config.split)
    total = len(found) + len(rejects)
    items, more = tokenise(
        found, tokenizer, config.max_length, config.too_long, config.workers, scope
    )
    rejects = rejects + more
    kept = []
    for item in items:
        length = laid_out_length(item, layout)
        if length <= row_length:
            kept.append(item)
        else:
            reason = f"too long for a packed row: {length} tokens, data.row_length={row_length}"
            rejects.append(Reject(item.where, item.id, reason))
    return kept, rejects, total


def order(count: int, batch_rows: int, *, seed: int, shuffle: bool) -> grain.MapDataset:
    """Item indices of every step: element k is an int array [batch_rows]; endless.

    Each epoch is a new shuffle of all items; a step may span two epochs.
    """
    dataset = grain.MapDataset.source(range(count)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    return dataset.repeat(None).batch(batch_rows)


def window_of(step: int, count: int, batch_rows: int, window: int) -> tuple[int, int]:
    """First step and number of steps of the shuffle window that a step belongs to.

    Windows do not reach over the end of an epoch of `count` items; a step that does is alone.
    """
    epoch = step * batch_rows // count
    first, end = -(-epoch * count // batch_rows), (epoch + 1) * count // batch_rows
    if step >= end:
        return step, 1
    start = first + (step - first) // window * window
    return start, min(window, end - start)


def plan(
    items: Sequence[Item],
    *,
    batch_rows: int,
    shape: Shape,
    seed: int,
    shuffle: bool = True,
    window: int = 1,
) -> Callable[[int], list[list[int]]]:
    """A function of the step number: the rows of that step, lists of item indices.

    The rows of `window` steps are packed together and then dealt out to them, `batch_rows` items to
    each, so that an item may move to another step of its window. Without shuffle every item stays
    in the step that its place gives it.
    """
    indices: Any = order(len(items), batch_rows, seed=seed, shuffle=shuffle)
    window = window if shuffle else 1

    @lru_cache(maxsize=4)
    def dealt(start: int, number: int) -> list[list[list[int]]]:
        drawn = [int(i) for k in range(start, start + number) for i in np.atleast_1d(indices[k])]
        return deal(items, drawn, number, shape)

    def rows_of(step: int) -> list[list[int]]:
        start, number = window_of(step, len(items), batch_rows, window)
        return dealt(start, number)[step - start]

    return rows_of


def steps(
    items: Sequence[Item],
    rows_of: Callable[[int], list[list[int]]],
    shape: Shape,
    prefetch: int = 2,
    own: np.ndarray | None = None,
) -> grain.DatasetIterator:
    """Endless iterator of the steps of a `plan`, each a list of `Rows` blocks of `shape`.

    Its `get_state` / `set_state` are what a checkpoint keeps. prefetch: steps packed ahead. own:
    the rows of a block that this process computes (`packing.blocks`); no other is laid out.
    """
    dataset = grain.MapDataset.range(2**31).map(
        lambda k: list(blocks(items, rows_of(k), shape, own))
    )
    options = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))
