"""Decontamination: which texts occur in an evaluation set, exactly, in part or nearly."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from saro_jax.records import normalised

METHODS = ("exact", "ngram", "tfidf", "embedding")
# Texts [n] to unit vectors [n, d].
Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Hit:
    """One text that is too near to an evaluation text; score 1 for exact and n-gram hits."""

    text: int
    evaluation: int
    method: str
    score: float


def hits(
    texts: Sequence[str],
    evaluation: Sequence[str],
    *,
    ngram: int = 8,
    tfidf: float = 0.7,
    embed: Embed | None = None,
    embedding: float = 0.8,
) -> list[Hit]:
    """At most one hit a text, by the first method that finds one: exact, ngram, tfidf, embedding.

    Exact is equality of normalised texts (records.normalised) or of their words; ngram a shared run
    of `ngram` words (0 = not looked for); tfidf a cosine of at least that of word weights (1 - or
    more - = not looked for); embedding the same of `embed`'s vectors. Thresholds are those of
    STAR-1's code.
    """
    exact = {}
    for i, one in enumerate(evaluation):
        exact.setdefault(normalised(one), i)
        exact.setdefault(" ".join(words(one)), i)
    exact.pop("", None)
    grams: dict[tuple[str, ...], int] = {}
    if ngram:
        for i, one in enumerate(evaluation):
            for gram in shingles(words(one), ngram):
                grams.setdefault(gram, i)
    nearest = _cosines(texts, evaluation) if tfidf < 1 else None
    vectors = (embed(texts) @ embed(evaluation).T) if embed and len(evaluation) else None
    found = []
    for i, text in enumerate(texts):
        tokens = words(text)
        at = exact.get(normalised(text), exact.get(" ".join(tokens)))
        if at is not None:
            found.append(Hit(i, at, "exact", 1.0))
            continue
        shared = [grams[gram] for gram in shingles(tokens, ngram) if gram in grams] if ngram else []
        if shared:
            found.append(Hit(i, min(shared), "ngram", 1.0))
        elif nearest is not None and nearest[i][0] >= tfidf:
            found.append(Hit(i, nearest[i][1], "tfidf", round(nearest[i][0], 4)))
        elif vectors is not None and (best := float(vectors[i].max())) >= embedding:
            found.append(Hit(i, int(vectors[i].argmax()), "embedding", round(best, 4)))
    return found


def words(text: str) -> list[str]:
    """The words of a text: letters and digits, case folded."""
    return re.findall(r"\w+", normalised(text))


def shingles(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n tokens; none where there are fewer."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _cosines(texts: Sequence[str], evaluation: Sequence[str]) -> list[tuple[float, int]]:
    """For each text the highest cosine to an evaluation text, and which; (0, 0) without any.

    Weights as scikit-learn's TfidfVectorizer has them by default: counts times
    ln((1 + n) / (1 + df)) + 1, of unit length; n and df are those of both sets together.
    """
    counts = [Counter(words(text)) for text in [*texts, *evaluation]]
    frequency = Counter(word for count in counts for word in count)
    weight = {w: math.log((1 + len(counts)) / (1 + df)) + 1 for w, df in frequency.items()}

    def vector(count: Counter[str]) -> dict[str, float]:
        found = {word: times * weight[word] for word, times in sorted(count.items())}
        length = math.sqrt(sum(value * value for value in found.values()))
        return {word: value / length for word, value in found.items()}

    entries: dict[str, tuple[list[int], list[float]]] = {}
    for i, count in enumerate(counts[len(texts) :]):
        for word, value in vector(count).items():
            places, values = entries.setdefault(word, ([], []))
            places.append(i)
            values.append(value)
    postings = {word: (np.array(p), np.array(v)) for word, (p, v) in entries.items()}
    best = []
    scores = np.zeros(len(evaluation))
    for count in counts[: len(texts)]:
        scores[:] = 0
        for word, value in vector(count).items():
            if word in postings:
                places, values = postings[word]
                scores[places] += value * values
        at = int(scores.argmax()) if len(evaluation) else 0
        best.append((float(scores[at]) if len(evaluation) else 0.0, at))
    return best


def near_duplicates(texts: Sequence[str], threshold: float, n: int = 3) -> dict[int, int]:
    """Texts whose words' runs of n have a Jaccard index of at least `threshold` with a kept one.

    The earlier text is kept: {later: earlier}. Candidates come from MinHash (32 bands of 2), and
    are then compared exactly.
    """
    sets = [set(shingles(words(text), n)) or {tuple(words(text))} for text in texts]
    buckets: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    found: dict[int, int] = {}
    for i, one in enumerate(sets):
        signature = _minhash(one)
        keys = [(band, tuple(signature[2 * band : 2 * band + 2])) for band in range(32)]
        candidates = sorted({j for key in keys for j in buckets.get(key, ())})
        same = next((j for j in candidates if jaccard(one, sets[j]) >= threshold), None)
        if same is not None:
            found[i] = same
            continue
        for key in keys:
            buckets.setdefault(key, []).append(i)
    return found


def jaccard(one: set, other: set) -> float:
    """Shared elements over all elements; 0 for two empty sets."""
    return len(one & other) / max(len(one | other), 1)


_PRIME = np.uint64((1 << 31) - 1)
_FACTORS = np.random.default_rng(0).integers(1, _PRIME, (2, 64), dtype=np.uint64)


def _minhash(shingle_set: set[tuple[str, ...]]) -> list[int]:
    hashes = np.array(
        [zlib.crc32(" ".join(one).encode()) & 0x7FFFFFFF for one in sorted(shingle_set)], np.uint64
    )
    table = (hashes[:, None] * _FACTORS[0] + _FACTORS[1]) % _PRIME
    return table.min(0).tolist()
