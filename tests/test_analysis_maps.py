"""Tests analysis/maps.py: principal components against scikit-learn; t-SNE keeps clusters."""

import numpy as np
from sklearn.decomposition import PCA

from saro_jax.analysis import maps, overlap


def test_principal_components_are_scikit_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 10)) * np.arange(1, 11) + 5
    ours, shares = maps.pca(x, 3)
    reference = PCA(3).fit(x)
    theirs = reference.transform(x)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-9)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, atol=1e-12)
    assert (ours[np.abs(ours).argmax(0), range(3)] > 0).all()


def test_equal_rows_have_a_map():
    y, shares = maps.pca(np.ones((5, 3)))
    assert not y.any()
    assert not shares.any()


def test_tsne_keeps_planted_clusters_and_follows_its_seed():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.normal(size=(90, 60)) + 6 * rng.normal(size=(3, 60))[y]
    first = maps.tsne(x, seed=0)
    assert first.shape == (90, 2)
    for label in (0, 1):  # each cluster against the other two
        assert overlap.knn_purity(overlap.distances(first), (y == label).astype(int)) > 0.95
    np.testing.assert_array_equal(first, maps.tsne(x, seed=0))
    assert not np.allclose(first, maps.tsne(x, seed=1))
