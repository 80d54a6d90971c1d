"""Hits of several groups of shards, and of several examples, made one list."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Descriptors, Local
from ray_retrieval.search import Hits, merge
from ray_retrieval.search.hits import NO_ROW, no_hits
from ray_retrieval.search.neighbours import Neighbours, merge_neighbours
from ray_retrieval.search.votes import cast

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Best:
    """What counts of several rankings, sorted by (distance, row).

    Attributes:
        rows: int64 [m].
        distances: [m], the least of the rankings.
        rankings: int64 [m], the first ranking that has it.
    """

    rows: Rows
    distances: npt.NDArray[Any]
    rankings: Rows


def merged(
    parts: Sequence[Hits | Neighbours], queries: Descriptors, k: int, *, images: int, neighbours: int
) -> Hits:
    """The hits of what groups of shards have found: the same as a search of all of their shards.

    Args:
        parts: of the groups, in any order.
        queries: what was searched for.
        k: hits of each.
        images: rows of the database that may be hits, where votes are cast.
        neighbours: K of the index, where votes are cast.
    """
    near = [part for part in parts if isinstance(part, Neighbours)]
    if near:
        assert isinstance(queries, Local)
        return cast(merge_neighbours(near, neighbours), queries.offsets, k, images=images)
    hits = [part for part in parts if isinstance(part, Hits)]
    if not any(part.rows.shape[1] for part in hits):
        return no_hits(len(queries), k, np.int32 if queries.data.dtype == np.uint8 else np.float32)
    dtype = next(part.distances.dtype for part in hits if part.rows.shape[1])
    return merge([part for part in hits if part.distances.dtype == dtype], k)


def best(hits: Hits, k: int) -> Best:
    """The `k` rows that come first in any of some rankings: a row counts by the least of its distances."""
    rankings = np.repeat(np.arange(len(hits)), hits.rows.shape[1])
    rows, distances = hits.rows.ravel(), hits.distances.ravel()
    real = rows != NO_ROW
    rows, distances, rankings = rows[real], distances[real], rankings[real]
    order = np.lexsort((rankings, distances, rows))
    first = order[np.unique(rows[order], return_index=True)[1]]
    kept = first[np.lexsort((rows[first], distances[first]))][:k]
    return Best(rows[kept], distances[kept], rankings[kept])


def one(hits: Hits, k: int) -> Best:
    """The first `k` of a single ranking, in its order."""
    rows = hits.rows[0, :k]
    rows = rows[rows != NO_ROW]
    return Best(rows, hits.distances[0, : len(rows)], np.zeros(len(rows), np.int64))
