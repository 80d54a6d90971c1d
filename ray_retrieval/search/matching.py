"""Which local features of two images may show the same thing: pairs by their descriptors alone.

Both ways compare unit vectors by their Euclidean distance, d² = 2 - 2 cos, through matrix products of blocks
that stay in the processor's second-level cache. A pair holds each feature once at the most, and pairs come
best first, which is what the sampler of `geometry` makes use of.

What two images give depends on them alone: not on other images, on the place in a database, or on threads.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ray_retrieval.config import Config

Floats = npt.NDArray[np.float32]
Features = npt.NDArray[np.float16] | npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

_BLOCK = 1 << 18
"""Similarities that are made at once: 1 MiB."""


class MatchingConfig(Config):
    """How features of two images are paired."""

    kind: Literal["mutual", "ratio"] = "mutual"
    """`mutual`: each is the other's nearest. `ratio`: clearly nearer than the second nearest (Lowe 2004)."""
    max_distance: float = Field(default=0.9, gt=0, le=2)
    """Euclidean distance of unit vectors above which nothing is a pair; 0.9 is a cosine of 0.595. DELF pairs
    40 dimensions at 0.8 and 128 at 0.9 to 1.0 (delf's match_images, and its two re-rankers)."""
    ratio: float = Field(default=0.9, gt=0, le=1)
    """Of the distances to the nearest and to the second nearest, for `ratio`."""


def pairs(a: Features, b: Features, config: MatchingConfig) -> Rows:
    """int64 [k, 2]: rows of `a` and of `b`, as `mutual_nearest` or `ratio_test` pair them."""
    if config.kind == "mutual":
        return mutual_nearest(a, b, config.max_distance)
    return ratio_test(a, b, config.ratio, config.max_distance)


def mutual_nearest(a: Features, b: Features, max_distance: float = 2.0) -> Rows:
    """Pairs of which each is the other's nearest.

    Of equally near rows of `b` the first counts, and of rows of `a` that share it as their nearest the first.

    Args:
        a: float16 or float32 [m, d], unit vectors.
        b: [n, d], likewise.
        max_distance: largest Euclidean distance of a pair.

    Returns:
        int64 [k, 2], the most similar first, then by row; [0, 2] where `a` or `b` is empty.
    """
    left, right = _floats(a), _floats(b)
    nearest, similarity = np.zeros(len(left), np.int64), np.full(len(left), -np.inf, np.float32)
    of_columns = np.full(len(right), -np.inf, np.float32)
    for some, block in _blocks(left, right):
        nearest[some] = block.argmax(axis=1)
        similarity[some] = np.take_along_axis(block, nearest[some, None], axis=1)[:, 0]
        np.maximum(of_columns, block.max(axis=0), out=of_columns)
    near = np.flatnonzero(similarity >= _least_cosine(max_distance))
    mutual = near[similarity[near] == of_columns[nearest[near]]]
    return _best_of_each_target(mutual, nearest, similarity)


def ratio_test(a: Features, b: Features, ratio: float, max_distance: float = 2.0) -> Rows:
    """Pairs that are nearer than `ratio` times the distance to the second nearest row of `b`.

    On unit vectors, 1 - s₁ < ratio² (1 - s₂) of the two greatest cosines. Where `b` has one row, the second
    is infinitely far. Of several rows of `a` that are paired with one of `b`, the most similar is kept.

    Args:
        a: float16 or float32 [m, d], unit vectors.
        b: [n, d], likewise.
        ratio: 0…1.
        max_distance: largest Euclidean distance of a pair.

    Returns:
        int64 [k, 2], the most similar first, then by row; [0, 2] where `a` or `b` is empty.

    Reference: Lowe 2004, IJCV 60(2), section 7.1.
    """
    left, right = _floats(a), _floats(b)
    nearest = np.zeros(len(left), np.int64)
    first, second = (np.full(len(left), -np.inf, np.float32) for _ in range(2))
    for some, block in _blocks(left, right):
        nearest[some] = block.argmax(axis=1)
        place = nearest[some, None]
        first[some] = np.take_along_axis(block, place, axis=1)[:, 0]
        np.put_along_axis(block, place, -np.inf, axis=1)
        second[some] = block.max(axis=1)
    # Rounding lets the cosine of equal vectors pass 1; such a distance is 0.
    near = np.maximum(1 - first.astype(np.float64), 0)
    chosen = (first >= _least_cosine(max_distance)) & (near < ratio**2 * (1 - second.astype(np.float64)))
    return _best_of_each_target(np.flatnonzero(chosen), nearest, first)


def _best_of_each_target(rows: Rows, nearest: Rows, similarity: Floats) -> Rows:
    """Pairs of some rows and their nearest, the most similar first; of those with one target the first."""
    order = rows[np.lexsort((rows, -similarity[rows]))]
    _, firsts = np.unique(nearest[order], return_index=True)
    kept = order[np.sort(firsts)]
    return np.stack([kept, nearest[kept]], axis=1)


def _blocks(left: Floats, right: Floats) -> Iterator[tuple[slice, Floats]]:
    """Cosines of some rows of `left` with all of `right`, block after block; none where `right` is empty."""
    if not len(right):
        return
    size = max(1, _BLOCK // len(right))
    for start in range(0, len(left), size):
        some = slice(start, start + size)
        yield some, left[some] @ right.T


def _least_cosine(distance: float) -> float:
    return 1 - distance**2 / 2


def _floats(features: Features) -> Floats:
    return np.ascontiguousarray(features, np.float32)
