"""Diffusion: similarity spreads from the query's nearest rows along the graph of mutual neighbours.

With the cosines s of unit vectors,

    A_ij   max(s_ij, 0)^γ where i and j are both among the k nearest others of each other, else 0
    S      D^-1/2 A D^-1/2, D the diagonal matrix of the sums of A's rows
    y_i    max(s(q, i), 0)^γ for the k_query first hits i of the query q, else 0
    f      solves (I - α S) f = y;   hits are put in order by f, the greatest first

The matrix is symmetric, and positive definite as α < 1: conjugate gradients solve it, started at 0 and
stopped after a few `iterations`, which also keeps f near the query.

A and D are those of the whole database and depend on it alone: they are made once. The equation is solved on
the rows and columns of S that belong to the query's first `depth` hits; on all of S where the database has no
more rows. The query is in no list of neighbours: it tells only in y. Where it is a row of the database, that
row has its place in y (s = 1) beside the k_query first others.

References: Iscen et al. 2017, CVPR, arXiv 1611.05113, for the equation and its numbers. Yang et al. 2019,
AAAI, arXiv 1811.10907, for the truncation to first hits, which keeps D; there it is done ahead, once for each
row of the database. Here k counts the others; in the code published with it, it counts the row itself too.
"""

from queue import Empty, SimpleQueue
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field
from scipy import sparse

from ray_retrieval.config import Config
from ray_retrieval.descriptors import Vectors
from ray_retrieval.metrics.compiled import compiled, frozen
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.rerank.neighbours import nearest_others
from ray_retrieval.search.rerank.reciprocal_data import Doubles, Numbers
from ray_retrieval.search.rerank.step import (
    Database,
    Floats,
    Progress,
    Rows,
    Step,
    check,
    in_order,
    rows_of_queries,
)
from ray_retrieval.search.threads import run_all
from ray_retrieval.search.vectors import VectorSegment, distances_to, norm_error

_GROUP = 16  # queries that a thread takes at once
_TOLERANCE = 1e-6  # of the residual beside y: where conjugate gradients stop before their last iteration


class DiffusionConfig(Config):
    """Re-ranking by diffusion on the graph of mutual neighbours."""

    name: Literal["diffusion"] = "diffusion"
    k: int = Field(default=50, ge=1)
    """Nearest others of a row that it may have edges to."""
    k_query: int = Field(default=10, ge=1)
    """First hits of the query that diffusion starts from."""
    gamma: float = Field(default=3.0, gt=0)
    """γ: power of the cosine that is the weight of an edge, and of a hit to start from."""
    alpha: float = Field(default=0.99, ge=0, lt=1)
    """α: what is passed on along the edges; 0: nothing."""
    iterations: int = Field(default=20, ge=1)
    """Most iterations of conjugate gradients."""
    depth: int = Field(default=1000, ge=1)
    """How many of the first hits are the graph and are re-ranked; of a smaller database, the whole graph."""


class Diffusion(Step):
    """Diffusion. Distances are -f, below 0.

    Those of hits that it does not reach, or that are behind the first `depth`, are the squared distances from
    the query, 0…4: they follow behind.

    S is kept in memory: at most 8 k bytes a row. Making it takes the vectors of all rows, too.

    Args:
        config: the numbers above.
        database: whose hits are to be re-ranked. Its own search is not used, which may be approximate.
        threads: to share the work among, now and in calls.
        progress: called with rows whose neighbours are found.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        database: Database,
        *,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(database, config.depth)
        self.config = config
        self._threads = threads
        vectors = frozen(database.vectors())
        self._graph = graph_of(vectors, config.k, config.gamma, threads=threads, progress=progress)
        self._whole = np.arange(len(database)) if config.depth >= len(database) else None
        self._rooms: SimpleQueue[Numbers] = SimpleQueue()

    def __call__(self, queries: Vectors, hits: Hits, query_rows: Rows | None = None) -> tuple[Vectors, Hits]:
        """The queries as they are, and their first `depth` hits re-ranked."""
        check(self.database, queries, hits, query_rows)
        if query_rows is None:
            first = hits.rows[:, : self.config.k_query + 1]
            query_rows = rows_of_queries(self.database, queries.data, first)
        own, scores = query_rows, np.full(hits.rows.shape, np.inf, np.float32)

        def work(start: int, stop: int) -> None:
            room = self._room()
            for number in range(start, stop):
                there = np.flatnonzero(hits.rows[number] != NO_ROW)
                rows = hits.rows[number, there]
                scores[number, there] = self._score(queries.data[number], rows, own[number], room)
            self._rooms.put(room)

        cuts = [(start, min(start + _GROUP, len(hits))) for start in range(0, len(hits), _GROUP)]
        run_all(work, cuts, self._threads)
        return queries, in_order(scores, hits.rows)

    def _score(self, query: Floats, rows: Rows, own: np.int64, room: Numbers) -> Floats:
        """float32 [m]: what the distances of one query's hits become.

        Args:
            query: float32 [d].
            rows: int64 [m], the hits.
            own: which row the query is, or `NO_ROW`.
            room: as `diffuse` takes it.
        """
        scores: Floats = distances_to(self.database.vectors(rows), query[None], np.arange(len(rows))[None])[0]
        inside = rows[: self.depth]
        others = np.flatnonzero(inside != own)[: self.config.k_query]
        first = np.concatenate([np.flatnonzero(inside == own), others])
        nodes, places = (inside, first) if self._whole is None else (self._whole, inside[first])
        start = np.zeros(len(nodes))
        start[places] = _weights(scores[first], self.config.gamma)
        found = diffuse(frozen(nodes), start, self._graph, self.config.alpha, self.config.iterations, room)
        reached = (found if self._whole is None else found[inside]).astype(np.float32)
        np.copyto(scores[: len(inside)], -reached, where=reached > 0)
        return scores

    def _room(self) -> Numbers:
        """Room that no other thread works in; it is put back after use."""
        try:
            return self._rooms.get_nowait()
        except Empty:
            return np.full(len(self.database), -1, np.int32)


class Graph(NamedTuple):
    """S, row by row.

    Attributes:
        starts: int64 [n + 1]: row i stands from starts[i] to starts[i + 1] in the others.
        columns: int32 [m].
        weights: float32 [m], above 0.
    """

    starts: Rows
    columns: Numbers
    weights: Floats


def graph_of(
    vectors: Floats, k: int, gamma: float, *, threads: int = 1, progress: Progress | None = None
) -> Graph:
    """The matrix S of a database.

    Args:
        vectors: float32 [n, d], unit vectors.
        k: nearest others of a row that it may have edges to.
        gamma: power of the cosine.
        threads: that a search may use.
        progress: called with rows whose neighbours are found.
    """
    segment = VectorSegment(vectors, 0, norm_error(vectors))
    count, width = len(segment), min(k, max(0, len(segment) - 1))
    columns, weights = np.empty((count, width), np.int32), np.empty((count, width))
    for some, rows, distances in nearest_others(segment, k, threads=threads):
        columns[some], weights[some] = rows[:, :width], _weights(distances[:, :width], gamma)
        if progress is not None:
            progress(len(rows))
    starts = np.arange(count + 1) * width
    near = sparse.csr_array((weights.reshape(-1), columns.reshape(-1), starts), (count, count))
    # Distances are the same to the last bit in both directions: only an edge without its reverse goes.
    mutual = near.minimum(near.T).tocsr()
    mutual.sort_indices()
    mutual.eliminate_zeros()
    degrees = mutual.sum(axis=1)
    scale = 1 / np.sqrt(np.where(degrees > 0, degrees, 1))
    ends = np.repeat(scale, np.diff(mutual.indptr)) * scale[mutual.indices]
    return Graph(
        frozen(mutual.indptr.astype(np.int64)),
        frozen(mutual.indices.astype(np.int32)),
        frozen((mutual.data * ends).astype(np.float32)),
    )


def _weights(distances: Floats, gamma: float) -> Doubles:
    """max(s, 0)^γ of the cosines s that belong to squared distances."""
    weights: Doubles = np.maximum(1 - distances.astype(np.float64) / 2, 0) ** gamma
    return weights


@compiled
def diffuse(
    nodes: Rows, start: Doubles, graph: Graph, alpha: float, iterations: int, room: Numbers
) -> Doubles:
    """float64 [m]: f on some rows of the graph, as conjugate gradients that start at 0 find it.

    Args:
        nodes: int64 [m]: the rows; each once.
        start: float64 [m]: y.
        graph: S.
        alpha: α.
        iterations: after which to stop, unless the residual falls to 1e-6 of y before.
        room: int32 [n], -1 everywhere, and so again afterwards.
    """
    starts, columns, weights = _inside(nodes, graph, room)
    solution, residual, direction = np.zeros(len(nodes)), start.copy(), start.copy()
    image = np.empty(len(nodes))
    square = np.sum(residual * residual)
    enough = square * _TOLERANCE**2
    for _ in range(iterations):
        if square <= enough:
            break
        along = 0.0
        for i in range(len(nodes)):
            passed = 0.0
            for j in range(starts[i], starts[i + 1]):
                passed += weights[j] * direction[columns[j]]
            image[i] = direction[i] - alpha * passed
            along += direction[i] * image[i]
        step, before = square / along, square
        square = np.float64(0)
        for i in range(len(nodes)):
            solution[i] += step * direction[i]
            residual[i] -= step * image[i]
            square += residual[i] * residual[i]
        direction *= square / before
        direction += residual
    return solution


@compiled
def _inside(nodes: Rows, graph: Graph, room: Numbers) -> tuple[Rows, Numbers, Floats]:
    """The rows and columns of S that belong to some nodes, in their order: starts, columns, weights."""
    most = 0
    for i in range(len(nodes)):
        room[nodes[i]] = i
        most += graph.starts[nodes[i] + 1] - graph.starts[nodes[i]]
    starts = np.zeros(len(nodes) + 1, np.int64)
    columns, weights = np.empty(most, np.int32), np.empty(most, np.float32)
    count = 0
    for i in range(len(nodes)):
        for j in range(graph.starts[nodes[i]], graph.starts[nodes[i] + 1]):
            place = room[graph.columns[j]]
            if place >= 0:
                columns[count], weights[count] = place, graph.weights[j]
                count += 1
        starts[i + 1] = count
    for i in range(len(nodes)):
        room[nodes[i]] = -1
    return starts, columns, weights
