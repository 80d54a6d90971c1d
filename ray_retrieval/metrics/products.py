"""Unit vectors and the products of fixed shape by which they are compared.

A product of a BLAS library is a float32 sum whose order depends on the shape of the product and on the place
in it. So every product has one shape, and a row stands in it where its number in the database has it stand,
with zeros around it where nothing else is known of the database: a row's similarity is then the same number
whatever the cut into shards and whatever is done at once.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

QUERIES, ROWS = 128, 1024
"""The shape of every product: a quarter faster than half as many queries; more rows gain nothing."""

# How far from 1 the length of a vector may be: what half-precision storage leaves, but no forgotten division.
_TOLERANCE = 1e-3
_ROWS_AT_ONCE = 1 << 14


class Tile(NamedTuple):
    """Rows of a database that are in one product.

    Attributes:
        shard: which shard they are of.
        start: where they start in the shard.
        stop: where they stop.
        first_row: number of the first of them in the database.
    """

    shard: int
    start: int
    stop: int
    first_row: int

    @property
    def place(self) -> slice:
        """The columns of the product that they have."""
        first = self.first_row % ROWS
        return slice(first, first + self.stop - self.start)

    def of(self, rows: Vectors) -> Vectors:
        """float32 [1024, d]: the rows of the shard in their places, zeros elsewhere. A view where full."""
        found = rows[self.start : self.stop]
        return filled_up(found, ROWS, self.place.start)


def tiles_of(shard: int, rows: int, first_row: int) -> Iterator[Tile]:
    """The tiles of a shard of so many rows, the first of which has this number in the database."""
    start = 0
    while start < rows:
        stop = min(rows, start + ROWS - (first_row + start) % ROWS)
        yield Tile(shard, start, stop, first_row + start)
        start = stop


def filled_up(vectors: Vectors, count: int, before: int = 0) -> Vectors:
    """float32 [count, d]: the vectors, float32 [n, d], `before` rows of zeros before them, others after."""
    if len(vectors) == count:
        return vectors
    filled = np.zeros((count, vectors.shape[1]), np.float32)
    filled[before : before + len(vectors)] = vectors
    return filled


def copies_in(vectors: Vectors) -> tuple[Rows, Rows]:
    """Which rows repeat an earlier one.

    Args:
        vectors: float32 [n, d].

    Returns:
        The numbers of such rows, int64 [copies], ascending, and for each the first row that equals it.
    """
    first = first_of_equal(keys_of(vectors))
    copies = np.flatnonzero(first != np.arange(len(first)))
    equal = np.zeros(len(copies), bool)
    for start in range(0, len(copies), _ROWS_AT_ONCE):
        some = copies[start : start + _ROWS_AT_ONCE]
        equal[start : start + len(some)] = (vectors[some] == vectors[first[some]]).all(axis=1)
    return copies[equal], first[copies[equal]]


def keys_of(vectors: Vectors) -> Keys:
    """uint64 [n]: a number for each vector, float32 [n, d], the same for equal ones.

    That two others have the same is as unlikely as 2^-48; it hangs on nothing but the vector itself.
    """
    weights = _weights(vectors.shape[1])
    keys = np.empty(len(vectors), np.uint64)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        # Sums of whole numbers are the same in any order; adding 0 makes -0 a 0, which it equals.
        bits = (vectors[start : start + _ROWS_AT_ONCE] + np.float32(0)).view(np.uint32)
        # A sign alone is the highest bit, of which the product with a weight would keep one bit in 33.
        bits ^= bits >> np.uint32(16)
        keys[start : start + len(bits)] = bits.astype(np.uint64) @ weights
    return keys


@functools.cache
def _weights(dimension: int) -> Keys:
    """uint64 [d]: random and always the same; drawing them takes longer than some keys."""
    weights = np.random.default_rng(0).integers(0, 1 << 64, dimension, np.uint64)
    weights.flags.writeable = False
    return weights


def first_of_equal(*keys: npt.NDArray[Any]) -> Rows:
    """int64 [n]: for each place the first one at which every one of the keys [n] is the same."""
    order = np.lexsort(keys)
    changes = [key[order][1:] != key[order][:-1] for key in keys]
    begins = np.flatnonzero(np.r_[np.ones(min(1, len(order)), np.bool_), np.any(changes, axis=0)])
    first = np.empty(len(order), np.int64)
    first[order] = np.repeat(order[begins], np.diff(np.r_[begins, len(order)]))
    return first


def checked_vectors(vectors: Vectors, where: str) -> Vectors:
    """The vectors, contiguous.

    Raises:
        MetricError: if they are not float32 [n, d], not finite or not of unit length, or there are none.
    """
    vectors = check_shape(vectors, where)
    if vectors.size == 0:
        raise MetricError(f"there is nothing to compare: {list(vectors.shape)}", where=where)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        check_lengths(vectors[start : start + _ROWS_AT_ONCE], where, start)
    return np.ascontiguousarray(vectors)


def check_shape(vectors: Vectors, where: str) -> Vectors:
    """The vectors as an array; their values are not looked at.

    Raises:
        MetricError: if they are not float32 [n, d].
    """
    vectors = np.asarray(vectors)
    if vectors.dtype != np.float32 or vectors.ndim != 2:
        raise MetricError(
            f"vectors are float32 [n, d], got {vectors.dtype} {list(vectors.shape)}",
            where=where,
            mend="give one row a vector, as numpy.asarray(vectors, numpy.float32)",
        )
    return vectors


def check_lengths(vectors: Vectors, where: str, first_row: int) -> None:
    """Look at some vectors, the first of which has this number.

    Raises:
        MetricError: if one is not finite or not of unit length.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    # Also where the length is not a number.
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _TOLERANCE))
    if len(wrong):
        raise MetricError(
            f"vectors have length 1, got {lengths[wrong[0]]:.4g} in row {first_row + wrong[0]:,}",
            where=where,
            mend="divide each by its length; a length that is not finite means a diverged model",
        )
