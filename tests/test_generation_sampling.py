"""Draws: truncation equals sorting, row by row with settings of its own; frequencies are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saro_jax.generation import sampling
from saro_jax.generation.sampling import Sampling, Settings

ROWS = [  # (top_p, top_k, min_p)
    (1.0, 0, 0.0), (1.0, 5, 0.0), (0.9, 0, 0.0), (0.5, 0, 0.0), (0.8, 7, 0.0), (1e-6, 0, 0.0),
    (1.0, 0, 0.1), (0.9, 30, 0.05), (1.0, 0, 1.0), (1.0, 1, 0.0), (1.0, 200, 0.0), (1.0, 999, 0.0),
]  # fmt: skip


def reference_truncation(logits: np.ndarray, top_p: float, top_k: int, min_p: float) -> set[int]:
    """The tokens kept, by sorting."""
    order = np.argsort(-logits)[: top_k or None]
    p = np.exp(logits[order].astype(np.float64))
    p /= p.sum()
    return set(order[(np.cumsum(p) - p < top_p) & (p >= min_p * p[0])].tolist())


def truncated(logits: np.ndarray, rows: list) -> np.ndarray:
    top_p, top_k, min_p = zip(*rows, strict=True)
    arrays = np.array(top_p, np.float32), np.array(top_k, np.int32), np.array(min_p, np.float32)
    return np.asarray(sampling.truncate(jnp.asarray(logits), *map(jnp.asarray, arrays)))


@pytest.mark.parametrize("seed", range(4))
def test_truncation_equals_sorting_whatever_the_neighbours_ask(seed: int):
    logits = np.random.default_rng(seed).normal(size=(len(ROWS), 200)).astype(np.float32) * 3
    found = truncated(logits, ROWS)
    for row, mask, settings in zip(logits, np.isfinite(found), ROWS, strict=True):
        assert set(np.flatnonzero(mask).tolist()) == reference_truncation(row, *settings)
    np.testing.assert_array_equal(found[np.isfinite(found)], logits[np.isfinite(found)])
    for i, row in enumerate(ROWS):  # alone, with nothing computed that it does not ask for
        np.testing.assert_array_equal(truncated(logits[i : i + 1], [row])[0], found[i])


def test_truncation_keeps_ties_and_can_keep_all():
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.2]], np.float32))
    assert np.isfinite(truncated(logits, [(0.5, 0, 0.0)])).all()
    assert np.isfinite(truncated(logits, [(1.0, 4, 0.0)])).all()
    assert np.isfinite(truncated(logits, [(1.0, 2, 0.0)])).all()
    assert np.isfinite(truncated(logits, [(0.3, 0, 0.0)])).sum() == 1


def drawn(logits: np.ndarray, n: int, temperature: float, top_p: float = 1.0) -> np.ndarray:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(n))
    settings = Settings(
        jnp.full(n, temperature), jnp.full(n, top_p), jnp.zeros(n, jnp.int32), jnp.zeros(n)
    )
    return np.asarray(sampling.draw(jnp.tile(logits, (n, 1)), keys, settings))


@pytest.mark.parametrize("size", [8, 600])  # within a group of the vocabulary, and over three
def test_samples_follow_the_tempered_distribution(size: int):
    logits = np.random.default_rng(0).normal(size=size).astype(np.float32)
    logits[5:] -= np.log(max(1, size / 8))
    n = 20000
    want = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    counts = np.bincount(drawn(logits, n, 0.7), minlength=size)
    # A sum of squares of about `size` standard normal numbers.
    chi2 = (np.square(counts - n * want) / (n * want)).sum()
    assert abs(chi2 - (size - 1)) < 5 * np.sqrt(2 * size)


def test_what_is_cut_off_is_never_drawn():
    logits = np.random.default_rng(1).normal(size=700).astype(np.float32) * 2
    kept = reference_truncation(logits, 0.6, 0, 0.0)
    assert set(drawn(logits, 5000, 1.0, 0.6).tolist()) == kept


def test_greedy_rows_stay_greedy_among_others():
    logits = np.random.default_rng(2).normal(size=(64, 300)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    temperature = np.where(np.arange(64) % 2, 2.0, 0.0).astype(np.float32)
    rest = (jnp.ones(64), jnp.zeros(64, jnp.int32), jnp.zeros(64))
    found = np.asarray(sampling.draw(jnp.asarray(logits), keys, Settings(temperature, *rest)))
    best = logits.argmax(-1)
    np.testing.assert_array_equal(found[::2], best[::2])
    assert (found[1::2] != best[1::2]).any()


def test_of_tied_tokens_the_first_is_the_best():
    logits = np.zeros((3, 40), np.float32)
    logits[0, [9, 30]] = 1
    logits[1, 39] = 2
    rest = (jnp.ones(3), jnp.zeros(3, jnp.int32), jnp.zeros(3))
    keys = jax.random.split(jax.random.key(0), 3)
    found = sampling.draw(jnp.asarray(logits), keys, Settings(jnp.zeros(3), *rest))
    np.testing.assert_array_equal(found, [9, 39, 0])


def test_key_words_are_those_of_a_jax_key():
    for seed in (0, 7, 2**32 - 1):
        words = jax.random.key_data(jax.random.key(seed))
        np.testing.assert_array_equal(sampling.key_words(seed), words)
    assert len({sampling.key_words(s).tobytes() for s in (1, 2**32 + 1, 2**40 + 1)}) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0; allowed: >= 0"),
        ({"temperature": float("inf")}, "temperature: inf; allowed: >= 0"),
        ({"top_p": 0.0}, "top_p: 0.0; allowed: above 0, up to 1"),
        ({"top_k": -1}, "top_k: -1; allowed: >= 0 (0: all tokens)"),
        ({"min_p": 1.5}, "min_p: 1.5; allowed: 0 to 1"),
    ],
)
def test_settings_out_of_bounds(changed: dict, message: str):
    with pytest.raises(ValueError) as error:
        Sampling(**changed)
    assert str(error.value) == message
