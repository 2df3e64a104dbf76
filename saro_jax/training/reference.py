"""The reference store: log-probs of pairs under the reference policy, computed once, reused by key.

A key is a hash of everything that changes the number (weights, dtypes, tokenizer and chat template,
ids and mask after truncation, layout, scoring version) and of nothing else: beta, the loss, the
learning rate or the order of the rows leave it alone.
"""

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from saro_jax.config import Config
from saro_jax.data.packing import Shape
from saro_jax.data.tokenise import Item, item_key_parts
from saro_jax.models import hub, huggingface
from saro_jax.objectives.preference import REFERENCE_FREE, SEGMENTS
from saro_jax.parallel import distributed, sharding
from saro_jax.training.scoring import make_scorer, score_items
from saro_jax.training.source import Source

Groups = Sequence[Sequence[list[int]]]  # per step the packed rows, each a list of item numbers

SCORING_VERSION = 2  # raise it whenever a change to model or scoring code may change a log-prob
# How far a re-scored row may lie from the stored one, in nats per scored token. In float32 another
# packing moves a sum by rounding only; in bfloat16 by more (docs/log.md has the measurement).
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}


def model_key(*parts: str) -> str:
    """Hash of what all rows of a run share: weights, dtypes, tokenizer, layout."""
    text = "\n".join((*parts, f"scoring {SCORING_VERSION}"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tokenizer_key(tokenizer: Any) -> str:
    """Hash of a fast tokenizer's vocabulary and rules and of its chat template."""
    text = f"{tokenizer.backend_tokenizer.to_str()}\n{tokenizer.chat_template}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def row_key(model: str, item: Item) -> str:
    """Hash of one pair under one model."""
    digest = hashlib.blake2b(model.encode(), digest_size=16)
    digest.update(item_key_parts(item))
    return digest.hexdigest()


class ReferenceStore:
    """A table key -> summed log-probs of a pair's segments in one SQLite file; a resource.

    Per key 8 little-endian float32 of a pair [2, G], 4 of a single response [1, G].
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "reference.sqlite"
        self._db = sqlite3.connect(self.path, timeout=60)
        self._db.execute("create table if not exists sums (key text primary key, logps blob)")
        self._db.commit()

    def get(self, keys: Sequence[str], branches: int) -> np.ndarray:
        """float32 [n, branches, G], NaN where a key is missing."""
        out = np.full((len(keys), branches, SEGMENTS), np.nan, np.float32)
        for i, key in enumerate(keys):
            row = self._db.execute("select logps from sums where key = ?", (key,)).fetchone()
            if row is not None:
                out[i] = np.frombuffer(row[0], "<f4").reshape(branches, SEGMENTS)
        return out

    def put(self, rows: Iterable[tuple[str, np.ndarray]]) -> None:
        """Store (key, float32 [K, G]) rows at once: all of them or, if the process dies, none."""
        blobs = ((key, np.asarray(logps, "<f4").tobytes()) for key, logps in rows)
        with self._db:
            self._db.executemany("insert or replace into sums values (?, ?)", blobs)

    def close(self) -> None:
        self._db.close()


def complete(
    store: ReferenceStore | None,
    model: str,
    items: Sequence[Item],
    groups: Groups,
    score: Callable[[Iterable[Sequence[list[int]]]], Iterable[tuple[int, np.ndarray, np.ndarray]]],
    *,
    recheck: int,
    tolerance: float,
) -> np.ndarray:
    """Sums of all items, float32 [n, K, G]: the stored ones, and the missing scored and stored.

    groups: the packed rows of each step, lists of indices; score: `scoring.score_items` of groups.
    Whole groups are scored, so that rows are packed as training will pack them; what is done is
    kept if the process dies. Of several processes the first has the store, the others None, and
    all of them score. `recheck` stored items are scored again and must agree within
    `tolerance` nats per scored token.
    """
    keys = [row_key(model, item) for item in items]
    branches = len(items[0].branches)
    logps = np.full((len(items), branches, SEGMENTS), np.nan, np.float32)
    logps = distributed.broadcast(logps if store is None else store.get(keys, branches))
    missing: np.ndarray = np.isnan(logps.sum(axis=(1, 2)))
    what = "pairs" if branches == 2 else "responses"
    where = "the store of process 0" if store is None else str(store.path)
    print(
        f"reference: {len(items) - int(missing.sum())} of {len(items)} {what} in {where}",
        flush=True,
    )
    stored = [[[int(i)]] for i in np.flatnonzero(~missing)[:recheck]]
    for i, logp, tokens in score(stored):
        if (np.abs(logp - logps[i]).sum(-1) / tokens.sum(-1) > tolerance).any():
            raise ValueError(
                f"{where}: {items[i].where}: stored log-probs {logps[i].sum(-1).tolist()}, "
                f"now {logp.sum(-1).tolist()}: more than {tolerance} nats per token apart; delete "
                "the file"
            )
    todo = [group for group in groups if missing[[i for row in group for i in row]].any()]
    for done, group in enumerate(todo, 1):
        new = {i: logp for i, logp, _ in score([group]) if missing[i]}
        if store is not None:
            store.put((keys[i], logp) for i, logp in new.items())
        for i, logp in new.items():
            logps[i], missing[i] = logp, False
        if done % 10 == 0 or done == len(todo):
            print(f"reference: {done} of {len(todo)} steps scored", flush=True)
    return logps


def is_stored(config: Config, stage: str) -> bool:
    """Whether the run takes reference log-probs from the store."""
    loss, reference = config.srpo.loss, config.srpo.reference
    return stage == "srpo" and loss not in REFERENCE_FREE and reference == "stored"


def of_items(
    source: Source, params: Any, items: Sequence[Item], groups: Groups, shape: Shape
) -> np.ndarray:
    """Reference log-probs of all items, float32 [n, K, G]: stored ones, the missing scored now."""
    config = source.config
    scorer = make_scorer(
        source.arch,
        source.mesh,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        attention=config.model.attention,
        branches=len(items[0].branches),
    )
    where = config.srpo.reference_cache
    store = None
    if distributed.writes():
        store = ReferenceStore(Path(where) if where else hub.cache_folder() / "reference")
    own = distributed.own_rows(sharding.rows(source.mesh), shape.rows)
    try:
        return complete(
            store,
            model_key(
                huggingface.weights_hash(source.folder),
                _dtypes(config),
                repr(source.arch),  # RoPE, norms: what config.json says beside the weights
                tokenizer_key(source.tokenizer),
                shape.layout,
                _packing(config, items, groups, shape),
            ),
            items,
            groups,
            lambda some: score_items(scorer, params, items, some, shape, own),
            recheck=config.srpo.recheck,
            tolerance=TOLERANCE[config.model.dtype],
        )
    finally:
        if store is not None:
            store.close()


def _dtypes(config: Config) -> str:
    """What the weights are rounded to before they are used, which moves a log-prob."""
    model = config.model
    text = f"{model.param_dtype} {model.dtype}"
    if model.frozen_dtype not in (None, model.param_dtype):
        text += f" {model.frozen_dtype} {config.train.freeze}"
    return text


def _packing(config: Config, items, groups: Groups, shape: Shape) -> str:
    """In bfloat16, which rows lie beside which: it moves a log-prob, and step 0 must be exact."""
    if config.model.dtype != "bfloat16":
        return ""
    order = [[[items[i].id for i in row] for row in group] for group in groups]
    return f"{shape} {order} {config.model.attention}"
