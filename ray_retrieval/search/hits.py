"""What a search returns, and the exact merge of what several searches return."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import QueryError

NO_ROW = -1
"""Stands where fewer rows than asked for exist."""

NO_DISTANCE = 2**31 - 1
"""The Hamming distance beside `NO_ROW`; no real one reaches it. Of floating-point distances: infinity."""

# A hit as one integer that sorts by (distance, row). Rows below 2^43 - 1 and distances below 2^20 fit.
_ROW_BITS = 43
_NO_HIT = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Hits:
    """The nearest rows of each query, sorted by (distance, row).

    Attributes:
        distances: [q, k], ascending. int32: Hamming distances, `NO_DISTANCE` where there is no row. float32:
            squared Euclidean distances of unit vectors, 0…4 (the cosine is 1 − distance / 2), scores of sets
            of local features with the sign turned, or what a reranking puts in their place; infinity where
            there is no row.
        rows: int64 [q, k]; `NO_ROW` where fewer than k rows exist.
    """

    distances: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        assert self.distances.shape == self.rows.shape
        assert self.rows.ndim == 2
        assert self.distances.dtype in (np.int32, np.float32)
        assert self.rows.dtype == np.int64

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.rows)

    def take(self, queries: "slice | Sequence[int] | npt.NDArray[np.int64]") -> "Hits":
        """The hits of some of the queries: a slice, or int64 [m] in the order asked."""
        return Hits(self.distances[queries], self.rows[queries])


def check_k(k: int) -> None:
    """Raise QueryError unless `k` is a number of hits to ask for: a whole one, at least 1."""
    if not isinstance(k, int | np.integer) or k < 1:
        raise QueryError(
            f"k is the number of hits to return, a whole one and at least 1, got {k!r}",
            mend="ask for 1 hit or more",
        )


def no_hits(queries: int, k: int, dtype: "type[np.int32] | type[np.float32]" = np.int32) -> Hits:
    """Hits of a search that finds nothing, with distances of a type."""
    nothing: Any = NO_DISTANCE if dtype is np.int32 else np.inf
    return Hits(np.full((queries, k), nothing, dtype), np.full((queries, k), NO_ROW, np.int64))


def without(hits: Hits, rows: npt.NDArray[np.int64]) -> Hits:
    """One hit fewer for each query: a row of its own, int64 [q], or the last where that was not found."""
    own = hits.rows == rows[:, None]
    order = np.argsort(own, axis=1, kind="stable")[:, :-1]
    taken = (np.take_along_axis(hits.distances, order, 1), np.take_along_axis(hits.rows, order, 1))
    return Hits(*taken)


def merge(parts: Sequence[Hits], k: int) -> Hits:
    """The `k` nearest among the hits of several searches over disjoint rows.

    Each part must hold the nearest min(k, its rows) rows of its share. Then the result is, bit for bit,
    what one search over all the rows returns, in whatever order the parts come.

    Args:
        parts: at least one, all for the same queries.
        k: hits to keep; what is missing is filled with `NO_ROW`.
    """
    assert parts
    if parts[0].distances.dtype == np.float32:
        return _merge_floats(parts, k)
    keys = np.concatenate([_keys(part) for part in parts], axis=1)
    keys.sort(axis=1)
    keys = keys[:, :k]
    found = no_hits(len(keys), k)
    width = keys.shape[1]
    real = keys != _NO_HIT
    np.copyto(found.distances[:, :width], (keys >> _ROW_BITS).astype(np.int32), where=real)
    np.copyto(found.rows[:, :width], keys & ((1 << _ROW_BITS) - 1), where=real)
    return found


def _merge_floats(parts: Sequence[Hits], k: int) -> Hits:
    distances = np.concatenate([part.distances for part in parts], axis=1)
    rows = np.concatenate([part.rows for part in parts], axis=1)
    # What is no hit is infinitely far: it comes last, whatever its row number.
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    found = no_hits(len(rows), k, np.float32)
    found.distances[:, : order.shape[1]] = np.take_along_axis(distances, order, axis=1)
    found.rows[:, : order.shape[1]] = np.take_along_axis(rows, order, axis=1)
    return found


def _keys(hits: Hits) -> npt.NDArray[np.int64]:
    keys: npt.NDArray[np.int64] = (hits.distances.astype(np.int64) << _ROW_BITS) | hits.rows
    keys[hits.rows == NO_ROW] = _NO_HIT
    return keys
