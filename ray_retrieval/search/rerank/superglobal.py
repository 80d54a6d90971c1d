"""SuperGlobal re-ranking: the first hits are refined by each other, and then the query by the best of them.

With the query q, its first M hits x_i, of length 1, and their cosines s_ij,

    x'_i    (x_i + β Σ_j s_ij x_j) / (1 + β Σ_j s_ij) over the K hits j nearest to x_i among the M
    s1_i    q·x'_i
    q_e     the elementwise maximum of the K + 1 vectors x' of the greatest s1
    s2_i    q_e·x'_i
    score   (s1 + s2) / 2, the greatest first

Nothing is trained, and nothing made beforehand. A query that is a row of the database is a hit like others.

The x' need not be made: q·x'_i is the same mean of the products q·x_j. Only the K + 1 of q_e are.

Reference: Shao et al. 2023, ICCV, arXiv 2308.06954. Negative cosines count as 0 here, so that no weight of a
mean is below 0; there they count as they are, and the divisor may be 0.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.descriptors import Vectors
from ray_retrieval.metrics.compiled import compiled
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.rerank.reciprocal_data import Doubles
from ray_retrieval.search.rerank.step import Database, Floats, Rows, Step, check, in_order
from ray_retrieval.search.threads import one_blas_thread, run_all
from ray_retrieval.search.vectors import distances_to

_GROUP = 16  # queries that a thread takes at once


class SuperGlobalConfig(Config):
    """Re-ranking by hits that are refined by each other, and a query that is refined by them."""

    name: Literal["superglobal"] = "superglobal"
    k: int = Field(default=9, ge=1)
    """K: nearest hits that refine a hit; one more refine the query."""
    beta: float = Field(default=0.15, ge=0)
    """β: what a hit of cosine 1 counts beside the hit that it refines."""
    depth: int = Field(default=400, ge=1)
    """M: how many of the first hits are re-ranked. The others stay behind them, by their distance."""


class SuperGlobal(Step):
    """SuperGlobal re-ranking. Distances are 0…1; 1…2 of hits behind the first `depth`.

    With the greatest score g that is possible, they are (g - score) / 2g; behind, with the squared distance d
    from the query, 1 + d / 4.

    Args:
        config: the numbers above.
        database: whose hits are to be re-ranked.
        threads: to share the queries of a call among.
    """

    def __init__(self, config: SuperGlobalConfig, database: Database, *, threads: int = 1) -> None:
        super().__init__(database, config.depth)
        self.config = config
        self._threads = threads

    def __call__(self, queries: Vectors, hits: Hits, query_rows: Rows | None = None) -> tuple[Vectors, Hits]:
        """The queries as they are, and their first `depth` hits re-ranked."""
        check(self.database, queries, hits, query_rows)
        distances = np.full(hits.rows.shape, np.inf, np.float32)

        def work(start: int, stop: int) -> None:
            for number in range(start, stop):
                there = np.flatnonzero(hits.rows[number] != NO_ROW)
                if len(there):
                    vectors = self.database.vectors(hits.rows[number, there])
                    distances[number, there] = self._distances(queries.data[number], vectors)

        cuts = [(start, min(start + _GROUP, len(hits))) for start in range(0, len(hits), _GROUP)]
        with one_blas_thread():
            run_all(work, cuts, self._threads)
        return queries, in_order(distances, hits.rows)

    def _distances(self, query: Floats, vectors: Floats) -> Floats:
        """float32 [m]: those of one query's hits, whose vectors are float32 [m, d]."""
        k, depth = self.config.k, self.config.depth
        # |x'| is at most 1, the length of q_e thus at most that of K + 1 vectors of 1 at right angles.
        greatest = (1 + np.sqrt(k + 1)) / 2
        scores = refined_scores(query, vectors[:depth], k, self.config.beta)
        behind = distances_to(vectors[depth:], query[None], np.arange(len(vectors[depth:]))[None])[0]
        return np.concatenate([((greatest - scores) / (2 * greatest)).astype(np.float32), 1 + behind / 4])


def refined_scores(query: Floats, vectors: Floats, k: int, beta: float) -> Doubles:
    """float64 [m]: (s1 + s2) / 2 of hits.

    Args:
        query: float32 [d].
        vectors: float32 [m, d], of the hits, in their order; m at least 1.
        k: K; of fewer hits, all of them count.
        beta: β.
    """
    cosines = vectors @ vectors.T
    near = nearest_within(cosines, min(k, len(vectors) - 1))
    weights = beta * np.maximum(np.take_along_axis(cosines, near, axis=1).astype(np.float64), 0)
    total = 1 + weights.sum(axis=1)

    def mean(values: Doubles) -> Doubles:
        """Of a value for each hit, what it is for x' where it is linear in x."""
        summed: Doubles = (values + (weights * values[near]).sum(axis=1)) / total
        return summed

    first: Doubles = mean(np.einsum("md,d->m", vectors, query, dtype=np.float64))
    best = np.argsort(-first, kind="stable")[: k + 1]
    summed = vectors[best] + np.einsum("bk,bkd->bd", weights[best], vectors[near[best]])
    expanded = (summed / total[best, None]).max(axis=0)
    second = mean(np.einsum("md,d->m", vectors, expanded, dtype=np.float64))
    return (first + second) / 2


@compiled
def nearest_within(cosines: Floats, k: int) -> Rows:
    """int64 [m, k]: the others that each is nearest to, by (cosine descending, place).

    Args:
        cosines: float32 [m, m].
        k: others, at most m - 1.
    """
    count = len(cosines)
    near = np.empty((count, k), np.int64)
    for i in range(count):
        held = 0
        for j in range(count):
            if j == i or k == 0 or (held == k and cosines[i, j] <= cosines[i, near[i, k - 1]]):
                continue
            place = min(held, k - 1)
            while place > 0 and cosines[i, near[i, place - 1]] < cosines[i, j]:
                near[i, place] = near[i, place - 1]
                place -= 1
            near[i, place] = j
            held = min(held + 1, k)
    return near
