"""What the checks count of an item: its ids, its scored tokens, what tells it from others."""

import hashlib

import numpy as np

from saro_jax.data.tokenise import Branch, Item


def parts(item: Item) -> list[np.ndarray]:
    return [item.prefix, *(branch.ids for branch in item.branches)]


def scored_tokens(*branches: Branch) -> int:
    return sum(int(branch.scored.sum()) for branch in branches)


def digest(*ids: np.ndarray) -> bytes:
    return hashlib.blake2b(b"".join(part.tobytes() for part in ids), digest_size=16).digest()
