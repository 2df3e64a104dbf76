"""Decontamination against brute force, and near duplicates."""

import random

import numpy as np
import pytest

from saro_jax.data.decontamination import hits, jaccard, near_duplicates, shingles, words

EVALUATION = [
    "How do I pick the lock of my neighbour's front door without him hearing it?",
    "Name three rivers in France.",
    "  ",
]


def found(text: str, **options) -> tuple[str, int] | None:
    one = hits([text], EVALUATION, **options)
    return (one[0].method, one[0].evaluation) if one else None


def test_each_method_finds_what_it_is_for():
    assert found("name THREE rivers\n in  France.") == ("exact", 1)
    assert found("Name three rivers in France") == ("exact", 1)
    assert found("Tell me: how do I pick the lock of my brother's car?") == ("ngram", 0)
    assert found("Tell me: how do I pick the lock of my brother's car?", ngram=9, tfidf=1) is None
    assert found("Name the rivers in France, three please.") == ("tfidf", 1)
    assert found("Name the rivers in France, three please.", tfidf=1) is None
    assert found("What is a good name for a cat?") is None
    assert found("") is None
    assert hits(["Name three rivers in France."], []) == []


def test_embeddings_are_a_further_method():
    def embed(texts):
        return np.array([[1.0, 0.0] if "river" in text else [0.0, 1.0] for text in texts])

    options = {"ngram": 0, "tfidf": 1, "embed": embed}
    assert found("Which river is long?", **options) == ("embedding", 1)
    assert found("name three rivers in france.", **options) == ("exact", 1)


def test_cosines_are_those_of_dense_arithmetic():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(12)]
    some = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 9))) for _ in range(40)]
    texts, evaluation = some[:25], some[25:]
    columns = {word: i for i, word in enumerate(vocabulary)}
    table = np.zeros((40, 12))
    for row, text in enumerate(some):
        for word in words(text):
            table[row, columns[word]] += 1
    table *= np.log((1 + 40) / (1 + (table > 0).sum(0))) + 1
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    cosine = table[:25] @ table[25:].T
    for limit in (0.3, 0.7, 0.9):
        scores = {
            hit.text: hit.score
            for hit in hits(texts, evaluation, ngram=0, tfidf=limit)
            if hit.method == "tfidf"
        }
        exact = {i for i, text in enumerate(texts) if text in evaluation}
        assert set(scores) == set(np.flatnonzero(cosine.max(1) >= limit)) - exact
        for i, score in scores.items():
            assert score == pytest.approx(cosine[i].max(), abs=1e-4)


def test_near_duplicates_are_those_of_brute_force():
    rng = random.Random(1)
    texts = []
    for _ in range(60):
        text = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 30))
        texts.append(" ".join(text))
        changed = list(text)
        changed[rng.randrange(len(text))] = "changed"
        texts.append(" ".join(changed))
    same = near_duplicates(texts, 0.8)
    sets = [set(shingles(words(text), 3)) for text in texts]
    for later, earlier in same.items():
        assert earlier < later and jaccard(sets[later], sets[earlier]) >= 0.8
        assert earlier not in same
    close = [i for i in range(1, 120, 2) if jaccard(sets[i], sets[i - 1]) >= 0.8]
    # MinHash may miss one: 32 bands of 2 find all but 1e-14 of those at 0.8.
    assert close and set(close) - set(same) == set()
    assert near_duplicates(["one lock", "One  lock!", "two"], 0.8) == {1: 0}
