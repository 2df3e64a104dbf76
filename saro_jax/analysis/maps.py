"""Maps: prompts in the plane, by principal components or by t-SNE; pictures, not evidence.

Legend: N prompts, D hidden width, K components.
"""

import numpy as np

from saro_jax.analysis import linear

PERPLEXITY = 30.0
COMPONENTS = 50  # that t-SNE gets to see


@linear.one_thread()
def pca(x_ND: np.ndarray, components: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [N, K] of the rows on their first principal components, and shares of variance.

    Signs are such that each component's largest coordinate is positive.
    """
    centred = x_ND.astype(np.float64) - x_ND.mean(0, dtype=np.float64)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    y_NK = (u * s)[:, :components]
    largest = np.take_along_axis(y_NK, np.abs(y_NK).argmax(0)[None], 0)[0]
    total = float((s * s).sum()) or 1.0
    return y_NK * np.where(largest < 0, -1.0, 1.0), (s * s)[:components] / total


@linear.one_thread()
def tsne(x_ND: np.ndarray, seed: int = 0, perplexity: float = PERPLEXITY) -> np.ndarray:
    """t-SNE of the rows [N, 2] (van der Maaten and Hinton 2008), started at random by seed.

    Neither axes nor distances between clusters nor their sizes mean anything; compare seeds.
    """
    from sklearn.manifold import TSNE

    reduced, _ = pca(x_ND, COMPONENTS)
    perplexity = min(perplexity, (len(x_ND) - 1) / 3)
    found = TSNE(perplexity=perplexity, init="random", random_state=seed).fit_transform(reduced)
    return np.asarray(found, np.float64)
