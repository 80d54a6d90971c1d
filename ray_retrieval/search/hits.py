"""What a search returns, and the exact merge of what several searches return."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NO_ROW = -1
"""Stands where fewer rows than asked for exist."""

NO_DISTANCE = 2**31 - 1
"""The distance beside `NO_ROW`; no real distance reaches it."""

# A hit as one integer that sorts by (distance, row). Rows below 2^43 - 1 and distances below 2^20 fit.
_ROW_BITS = 43
_NO_HIT = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Hits:
    """The nearest rows of each query, sorted by (distance, row).

    Attributes:
        distances: int32 [q, k], ascending; `NO_DISTANCE` where there is no row.
        rows: int64 [q, k]; `NO_ROW` where fewer than k rows exist.
    """

    distances: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        assert self.distances.shape == self.rows.shape
        assert self.rows.ndim == 2
        assert self.distances.dtype == np.int32
        assert self.rows.dtype == np.int64

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.rows)

    def take(self, queries: "slice | Sequence[int] | npt.NDArray[np.int64]") -> "Hits":
        """The hits of some of the queries."""
        return Hits(self.distances[queries], self.rows[queries])


def no_hits(queries: int, k: int) -> Hits:
    """Hits of a search that finds nothing."""
    return Hits(np.full((queries, k), NO_DISTANCE, np.int32), np.full((queries, k), NO_ROW, np.int64))


def merge(parts: Sequence[Hits], k: int) -> Hits:
    """The `k` nearest among the hits of several searches over disjoint rows.

    Each part must hold the nearest min(k, its rows) rows of its share. Then the result is, bit for bit,
    what one search over all the rows returns, in whatever order the parts come.

    Args:
        parts: at least one, all for the same queries.
        k: hits to keep; what is missing is filled with `NO_ROW`.
    """
    assert parts
    keys = np.concatenate([_keys(part) for part in parts], axis=1)
    keys.sort(axis=1)
    keys = keys[:, :k]
    found = no_hits(len(keys), k)
    width = keys.shape[1]
    real = keys != _NO_HIT
    np.copyto(found.distances[:, :width], (keys >> _ROW_BITS).astype(np.int32), where=real)
    np.copyto(found.rows[:, :width], keys & ((1 << _ROW_BITS) - 1), where=real)
    return found


def _keys(hits: Hits) -> npt.NDArray[np.int64]:
    keys: npt.NDArray[np.int64] = (hits.distances.astype(np.int64) << _ROW_BITS) | hits.rows
    keys[hits.rows == NO_ROW] = _NO_HIT
    return keys
