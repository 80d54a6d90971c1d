"""The map of an index: a sample of its images, those that are near in the index near on the map."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes, Descriptors, Local
from ray_retrieval.search.threads import one_blas_thread

MOST = 1500
"""Images on a map."""
SEED = 0
_PERPLEXITY = 30.0


def drawn(rows: int) -> npt.NDArray[np.int64]:
    """int64 [m], ascending: which of so many rows are on the map: all, or some at random, always the same."""
    if rows <= MOST:
        return np.arange(rows)
    return np.sort(np.random.default_rng(SEED).choice(rows, MOST, replace=False))


def laid_out(descriptors: Descriptors) -> npt.NDArray[Any]:
    """What is laid out: uint8 [n, bits] of codes, else float32 [n, d].

    Sets of local features have the global vectors beside them, or the mean of their features.
    """
    if isinstance(descriptors, Codes):
        return np.unpackbits(descriptors.data, axis=1)[:, : descriptors.bits]
    if not isinstance(descriptors, Local):
        return descriptors.data
    if descriptors.vectors.shape[1]:
        return descriptors.vectors
    means = np.zeros((len(descriptors), descriptors.data.shape[1]), np.float32)
    of = np.repeat(np.arange(len(descriptors)), descriptors.counts)
    np.add.at(means, of, descriptors.data.astype(np.float32))
    return np.asarray(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12), np.float32)


def in_words(data: npt.NDArray[Any]) -> str:
    """How the map of data, [n, …] as `laid_out` gives it, is made."""
    metric = "Hamming" if data.dtype == np.uint8 else "Euclidean"
    settings = f"perplexity {_perplexity(len(data)):g}, seed {SEED}"
    return f"t-SNE of {len(data):,} images, {metric} distance, {settings}"


def places(data: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 [n, 2] within 0…1, the same for the same data; takes seconds.

    Reference: van der Maaten, Hinton 2008, Visualizing data using t-SNE.
    """
    if len(data) < 4:
        return np.linspace(0.25, 0.75, 2 * len(data), dtype=np.float32).reshape(-1, 2)
    from sklearn.manifold import TSNE

    values = data.astype(np.float32)
    # Squared Euclidean distances of bits are Hamming distances, times a constant that perplexity takes away.
    made = TSNE(
        n_components=2,
        perplexity=_perplexity(len(data)),
        init="pca" if values.shape[1] > 1 and values.std() > 0 else "random",
        random_state=SEED,
        n_jobs=1,
    )
    with one_blas_thread():
        found = made.fit_transform(values)
    low, high = found.min(axis=0), found.max(axis=0)
    return np.asarray((found - low) / np.maximum(high - low, 1e-12), np.float32)


def _perplexity(rows: int) -> float:
    return min(_PERPLEXITY, (rows - 1) / 3)
