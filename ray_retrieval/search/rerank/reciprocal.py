"""k-reciprocal re-ranking: two images are alike where they have the same neighbours, and these have them too.

With the squared Euclidean distances d of unit vectors, N(p, k) the item p itself and its k nearest others (by
distance, equal ones by number), and M_p the distance of the item farthest from p:

    R(p, k)    the members g of N(p, k) with p in N(g, k)
    R*(p)      R(p, k1) and, for each of its members q, all of R(q, k1/2), where more than two thirds of these
               are in R(p, k1)
    V[p, g]    exp(-d(p, g) / M_p) for g in R*(p), else 0; divided by the sum of its row
    V'[p]      mean of V[g] over the first k2 of N(p, k1): p itself and its k2 - 1 nearest
    d_J(p, g)  1 - s / (2 - s), s = Σ_j min(V'[p, j], V'[g, j])
    score      (1 - λ) d_J(p, g) + λ d(p, g) / M_p

The items are the database and the one query; where the query is a row of the database, they are the database
alone. A query that a step before has moved away from its row (by expansion, or by augmenting the rows) is an
item of its own. So the result for a query does not depend on others, and it is the same as that of the dense
matrices of the publication over these items. There the items are all queries and the database together:
`joint`.

What is computed. The lists, M and the sparse V of the database are made once. For each row, that takes the
search for its k1 nearest and for the farthest one, which is the nearest to -p (up to the rounding of lengths
to 1). Of a query, only the first `depth` hits are looked at, and s needs V' only in the columns that the
query has. A query that is not in the database gets into the lists of the rows that it is near to; the rows of
V that depend on these are made anew for it, so that this too is exact.

Reference: Zhong et al. 2017, CVPR, arXiv 1701.08398. As in the code published with it, k1/2 is rounded to the
nearest even number where it is in the middle, and each distance is divided by the greatest of its row. Other
than there, an item comes first in its own list also where others are equal to it.
"""

from queue import Empty, SimpleQueue
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ray_retrieval.config import Config
from ray_retrieval.descriptors import Vectors
from ray_retrieval.metrics.compiled import frozen
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.rerank.neighbours import nearest_others
from ray_retrieval.search.rerank.reciprocal_data import (
    Guests,
    Holders,
    Neighbours,
    Numbers,
    Room,
    Sparse,
    room_for,
)
from ray_retrieval.search.rerank.reciprocal_kernels import make_rows, score
from ray_retrieval.search.rerank.step import (
    Database,
    Floats,
    Progress,
    Rows,
    Step,
    check,
    in_order,
)
from ray_retrieval.search.threads import one_blas_thread, run_all
from ray_retrieval.search.vectors import VectorSegment, distances_to, norm_error, search_vectors

_ROWS = 8192  # rows that are multiplied with queries at once
_MADE = 1024  # rows of V that are made at once
_GROUP = 256  # queries that are re-ranked at once
_PAIRS = 1 << 14  # of queries and rows whose distances are looked at at once
_MOVED = 2e-3  # distance from its row at which a query is another item: what encoding it twice stays below


class KReciprocalConfig(Config):
    """Re-ranking by shared reciprocal neighbours."""

    name: Literal["k_reciprocal"] = "k_reciprocal"
    k1: int = Field(default=20, ge=1)
    """Neighbours that are looked at of each item."""
    k2: int = Field(default=6, ge=1)
    """Items, the item itself included, whose neighbourhoods are averaged; 1: none."""
    weight: float = Field(default=0.3, ge=0, le=1)
    """λ: what the original distance counts beside the neighbourhoods."""
    depth: int = Field(default=1000, ge=1)
    """How many of the first hits are re-ranked. The others stay behind them, by their distance."""
    joint: bool = False
    """Take all the queries of a call as items, as published: the result then depends on what they are."""

    @model_validator(mode="after")
    def _check(self) -> "KReciprocalConfig":
        if self.k2 > self.k1 + 1:
            raise ValueError(f"'k2' is at most 'k1' + 1, the item and its neighbours, got {self.k2}")
        return self


class KReciprocal(Step):
    """k-reciprocal re-ranking. Distances are the scores: 0…1; 1…2 of hits behind the first `depth`.

    The vectors of the database and its tables are kept in memory: for each row, 4 bytes a dimension, 8 k1 for
    the lists, and 12 for each entry of V (1 to 2 k1).

    Args:
        config: the numbers above.
        database: whose hits are to be re-ranked. Its own search is not used, which may be approximate.
        threads: to share the work among, now and in calls.
        progress: called with rows whose neighbours are found.
    """

    def __init__(
        self,
        config: KReciprocalConfig,
        database: Database,
        *,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(database, config.depth)
        self.config = config
        self.joint = config.joint
        self._threads = threads
        self._segment = _segment(frozen(database.vectors()))
        self._items = None if config.joint else _Items(self._segment, config, threads, progress)

    def __call__(self, queries: Vectors, hits: Hits, query_rows: Rows | None = None) -> tuple[Vectors, Hits]:
        """The queries as they are, and their first `depth` hits re-ranked."""
        check(self.database, queries, hits, query_rows)
        if len(queries) == 0 or len(self._segment) == 0:
            return queries, in_order(np.full(hits.rows.shape, np.inf, np.float32), hits.rows)
        if query_rows is None:
            nearest = search_vectors([self._segment], queries.data, 1, threads=self._threads)
            query_rows = np.where(nearest.distances == 0, nearest.rows, NO_ROW)[:, 0]
        else:
            far = distances_to(self._segment.vectors, queries.data, query_rows[:, None])[:, 0]
            query_rows = np.where(far < _MOVED, query_rows, NO_ROW)
        items, own = self._items, np.where(query_rows == NO_ROW, len(self._segment), query_rows)
        if items is None:
            others = query_rows == NO_ROW
            own[others] += np.arange(others.sum())
            joined = np.concatenate([self._segment.vectors, queries.data[others]])
            items = _Items(_segment(joined), self.config, self._threads, None)
        return queries, items.rerank(queries.data, own, hits.rows)


class _Items:
    """Items that are re-ranked, and what depends on them alone.

    Args:
        segment: their vectors.
        config: of the step.
        threads: to share the work among.
        progress: called with the number of items whose neighbours are found.
    """

    def __init__(
        self, segment: VectorSegment, config: KReciprocalConfig, threads: int, progress: Progress | None
    ) -> None:
        self._config, self._threads = config, threads
        # np.around, and so the published code, rounds halves to even numbers, as `round` does.
        self._half = round(config.k1 / 2) + 1
        self._segment = segment
        self._rooms: SimpleQueue[Room] = SimpleQueue()
        self._near = self._find_neighbours(progress)
        self._sparse = self._make_rows()
        self._holders = _holders_of(self._sparse)

    def rerank(self, queries: Floats, own: Rows, rows: Rows) -> Hits:
        """Hits by their scores.

        Args:
            queries: float32 [q, d].
            own: int64 [q]: which item each is; n: none of them.
            rows: int64 [q, m], the hits.
        """
        guests = self._guests(queries, own)
        scores = np.empty(rows.shape, np.float32)

        def work(start: int, stop: int) -> None:
            some = slice(start, stop)
            scores[some] = distances_to(self._near.vectors, queries[some], rows[some])
            room = self._room()
            score(
                self._with_hosts(guests, some),
                frozen(rows[some]),
                scores[some],
                self._config.k2,
                self._half,
                self._config.weight,
                self._config.depth,
                self._near,
                self._sparse,
                self._holders,
                room,
            )
            self._rooms.put(room)

        with one_blas_thread():
            run_all(work, _cuts(len(rows), _GROUP), self._threads)
        return in_order(scores, rows)

    def _find_neighbours(self, progress: Progress | None) -> Neighbours:
        vectors, k1 = self._segment.vectors, self._config.k1
        count = len(vectors)
        lists, distances = np.empty((count, k1 + 1), np.int32), np.zeros((count, k1 + 1), np.float32)
        farthest = np.empty(count, np.float32)
        lists[:, 0] = np.arange(count)
        for some, rows, far in nearest_others(self._segment, k1, threads=self._threads):
            lists[some, 1:], distances[some, 1:] = rows, far
            farthest[some] = self._farthest(vectors[some])
            if progress is not None:
                progress(len(rows))
        return Neighbours(frozen(vectors), lists, distances, farthest)

    def _search(self, vectors: Floats, k: int) -> Hits:
        return search_vectors([self._segment], vectors, k, threads=self._threads)

    def _farthest(self, vectors: Floats) -> Floats:
        """The distance of the item farthest from each vector, which is the nearest to what is opposite."""
        rows = self._search(-vectors, 1).rows
        return distances_to(self._segment.vectors, vectors, rows, threads=self._threads)[:, 0]

    def _make_rows(self) -> Sparse:
        """The matrix V."""
        count, width = self._near.lists.shape
        cuts = _cuts(count, _MADE)
        parts: list[tuple[Rows, Numbers, Floats] | None] = [None] * len(cuts)

        def work(number: int, _: int) -> None:
            start, stop = cuts[number]
            most, room = (stop - start) * width * (1 + self._half), self._room()
            sizes, columns = np.empty(stop - start, np.int64), np.empty(most, np.int32)
            weights = np.empty(most, np.float32)
            total = make_rows(start, stop, self._half, self._near, room, sizes, columns, weights)
            parts[number] = sizes, columns[:total].copy(), weights[:total].copy()
            self._rooms.put(room)

        run_all(work, [(number, 0) for number in range(len(cuts))], self._threads)
        made = [part for part in parts if part is not None]
        sizes = np.concatenate([np.zeros(1, np.int64), *(sizes for sizes, _, _ in made)])
        return Sparse(
            np.cumsum(sizes),
            np.concatenate([np.zeros(0, np.int32), *(columns for _, columns, _ in made)]),
            np.concatenate([np.zeros(0, np.float32), *(weights for _, _, weights in made)]),
        )

    def _guests(self, queries: Floats, own: Rows) -> Guests:
        """The queries with their neighbours, where they are no items; without hosts."""
        count, width = self._near.lists.shape
        lists, farthest = np.full((len(queries), width), count, np.int32), np.zeros(len(queries), np.float32)
        guests = np.flatnonzero(own == count)
        if len(guests):
            lists[guests, 1:] = self._search(queries[guests], width - 1).rows
            farthest[guests] = self._farthest(queries[guests])
        none = np.zeros(0, np.int64)
        return Guests(frozen(queries), own, lists, farthest, none, farthest[:0], none)

    def _with_hosts(self, guests: Guests, some: slice) -> Guests:
        """Some of the queries, with the items whose lists they enter where they are no items.

        These are the items that are less far from a guest than from the last of their list. Products say
        which may be: they are off by less than 2 d 2⁻²⁴ |q| |x| (see `search.vectors`), and squared lengths
        differ from 1 by no more than the norm errors.
        """
        queries, items = guests.vectors[some], guests.items[some]
        vectors, last = self._near.vectors, self._near.distances[:, -1]
        asked = np.flatnonzero(items == len(vectors))
        error = max(self._segment.norm_error, norm_error(queries))
        slack = error + vectors.shape[1] * 2.0**-23 * (1 + error) + 1e-6
        found: list[tuple[Rows, Rows, Floats]] = []
        for start, stop in _cuts(len(vectors) if len(asked) else 0, _ROWS):
            products = queries[asked] @ vectors[start:stop].T
            numbers, rows = np.nonzero(products >= (1 - last[start:stop] / 2 - slack).astype(np.float32))
            numbers, rows = asked[numbers], rows + start
            for first in range(0, len(rows), _PAIRS):
                pairs = slice(first, first + _PAIRS)
                distances = distances_to(vectors, queries[numbers[pairs]], rows[pairs, None])[:, 0]
                near = distances < last[rows[pairs]]
                found.append((numbers[pairs][near], rows[pairs][near], distances[near]))
        found.append((guests.hosts, guests.hosts, guests.distances))
        numbers, hosts, distances = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.argsort(numbers, kind="stable")
        spans = np.searchsorted(numbers[order], np.arange(len(queries) + 1))
        return Guests(
            queries, items, guests.lists[some], guests.farthest[some], hosts[order], distances[order], spans
        )

    def _room(self) -> Room:
        """Room that no other thread works in; it is put back after use."""
        try:
            return self._rooms.get_nowait()
        except Empty:
            return room_for(len(self._near.vectors))


def _holders_of(sparse: Sparse) -> Holders:
    count = len(sparse.starts) - 1
    rows = np.repeat(np.arange(count, dtype=np.int32), np.diff(sparse.starts))
    sizes = np.bincount(sparse.columns, minlength=count)
    return Holders(
        np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
        rows[np.argsort(sparse.columns, kind="stable")],
    )


def _segment(vectors: Floats) -> VectorSegment:
    return VectorSegment(vectors, 0, norm_error(vectors))


def _cuts(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]
