"""The input pipeline: items -> shuffled steps -> packed blocks, as a Grain iterator.

Step k of a run is a function of (seed, k) alone, so the iterator's state is one number, any number
of prefetch threads gives the same batches, and a resumed run sees what the straight one would have.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from saro_jax.config import DataConfig
from saro_jax.data import rows as rows_file
from saro_jax.data.packing import Rows, laid_out_length, pack
from saro_jax.data.rows import Reject, StageKind
from saro_jax.data.tokenise import Item, Scope, tokenise


class Shape(NamedTuple):
    """How items become blocks: tokens and number of their rows, layout, number of row lengths."""

    row_length: int
    rows: int
    layout: str
    buckets: int = 1


def row_length(config: DataConfig, kind: StageKind) -> int:
    """Tokens of a packed row: given, or room for two conversations or two pairs of any length."""
    return config.row_length or config.max_length * (4 if kind == "preference" else 2)


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


class _Pack(grain.transforms.Map):
    def __init__(self, items: Sequence[Item], shape: Shape):
        self._items, self._shape = items, shape

    def map(self, element: np.ndarray) -> list[Rows]:
        indices = [int(i) for i in np.atleast_1d(element)]
        return list(pack(self._items, indices, **self._shape._asdict()))


def order(count: int, batch_rows: int, *, seed: int, shuffle: bool) -> grain.MapDataset:
    """Item indices of every step: element k is an int array [batch_rows]; endless.

    Each epoch is a new shuffle of all items; a step may span two epochs.
    """
    dataset = grain.MapDataset.source(range(count)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    return dataset.repeat(None).batch(batch_rows)


def steps(
    items: Sequence[Item],
    *,
    batch_rows: int,
    shape: Shape,
    seed: int,
    shuffle: bool = True,
    prefetch: int = 2,
) -> grain.DatasetIterator:
    """Endless iterator of steps, each a list of `Rows` blocks of `shape`.

    Its `get_state` / `set_state` are what a checkpoint keeps. prefetch: steps packed ahead.
    """
    dataset = order(len(items), batch_rows, seed=seed, shuffle=shuffle)
    dataset = dataset.map(_Pack(items, shape))
    options = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))
