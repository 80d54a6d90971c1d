"""Expansion: a vector is replaced by the weighted mean of itself and its nearest rows, before searching.

With the nearest rows x_i of a vector x, of length 1, and their cosines s_i,

    x' = (x + Σ_{i ≤ n} max(s_i, 0)^α x_i) / |…|

For queries it is called α-weighted query expansion: the database is searched again with x'. The greater α,
the less do distant rows count; with α = 0 all count alike (average query expansion). For the rows of the
database it is called database augmentation: queries are searched for in the x'.

The row that the vector itself is does not count among its n nearest: its weight is 1.

References: Radenović et al. 2018, TPAMI, arXiv 1711.02512, for the weights; Arandjelović and Zisserman 2012,
CVPR, for augmentation.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.descriptors import Vectors
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.rerank.step import (
    Database,
    Floats,
    HeldVectors,
    Progress,
    Rows,
    Step,
    check,
    dimension_of,
    rows_of_queries,
)
from ray_retrieval.search.vectors import distances_to

_GATHERED = 1 << 22  # numbers that are gathered at once: bounds the memory to 16 MiB for each array


class QueryExpansionConfig(Config):
    """Search again with the mean of the query and its nearest rows."""

    name: Literal["query_expansion"] = "query_expansion"
    n: int = Field(default=10, ge=1)
    """Nearest rows that are added to the query."""
    alpha: float = Field(default=3.0, ge=0)
    """Power of the cosine that is a row's weight; 0: all weigh 1."""


class DatabaseAugmentationConfig(Config):
    """Search in a database whose rows are means of themselves and their nearest rows."""

    name: Literal["database_augmentation"] = "database_augmentation"
    n: int = Field(default=10, ge=1)
    """Nearest rows that are added to each row."""
    alpha: float = Field(default=3.0, ge=0)
    """Power of the cosine that is a row's weight; 0: all weigh 1."""


class QueryExpansion(Step):
    """α-weighted query expansion. The distances are those of the expanded query."""

    def __init__(self, config: QueryExpansionConfig, database: Database) -> None:
        super().__init__(database, config.n + 1)
        self.config = config

    def __call__(self, queries: Vectors, hits: Hits, query_rows: Rows | None = None) -> tuple[Vectors, Hits]:
        """The expanded queries and what they find; of the hits, the first n, or n + 1, are used."""
        check(self.database, queries, hits, query_rows)
        expanded = np.empty_like(queries.data)
        first = self.config.n + 1
        size = max(1, _GATHERED // (first * max(1, queries.data.shape[1])))
        for start in range(0, len(queries), size):
            some = slice(start, start + size)
            near, own = hits.rows[some, :first], None if query_rows is None else query_rows[some]
            expanded[some] = self._expand(queries.data[some], near, own)
        made = Vectors(expanded)
        return made, self.database.search(made, hits.rows.shape[1])

    def _expand(self, queries: Floats, rows: Rows, query_rows: Rows | None) -> Floats:
        if query_rows is None:
            query_rows = rows_of_queries(self.database, queries, rows)
        others = without(rows, query_rows)[:, : self.config.n]
        return mean_with(self.database, queries, others, self.config.alpha)


class DatabaseAugmentation(Step):
    """Database augmentation. The distances are those to the augmented rows.

    The augmented vectors, 4 bytes a number, are kept in memory; they are the database of the steps after it.
    As it uses nothing of what steps before it have found, it is the first of several.

    Args:
        config: what to add.
        database: whose rows are to be augmented.
        threads: that a search may use.
        progress: called as rows are augmented.
    """

    def __init__(
        self,
        config: DatabaseAugmentationConfig,
        database: Database,
        *,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> None:
        count = len(database)
        augmented = np.empty((count, dimension_of(database)), np.float32)
        size = max(1, _GATHERED // ((config.n + 1) * max(1, augmented.shape[1])))
        for start in range(0, count, size):
            own = np.arange(start, min(start + size, count))
            vectors = database.vectors(own)
            near = database.search(Vectors(vectors), config.n + 1).rows
            augmented[own] = mean_with(database, vectors, without(near, own)[:, : config.n], config.alpha)
            if progress is not None:
                progress(len(own))
        super().__init__(HeldVectors(augmented, threads=threads), 0, given=database)

    def __call__(self, queries: Vectors, hits: Hits, query_rows: Rows | None = None) -> tuple[Vectors, Hits]:
        """The queries and what they find among the augmented rows; of the hits, only the number is used."""
        check(self.given, queries, hits, query_rows)
        return queries, self.database.search(queries, hits.rows.shape[1])


def without(rows: Rows, own: Rows) -> Rows:
    """Rows [q, m] without one of each query's, the others in their order; `NO_ROW` fills the last place."""
    order = np.argsort(rows == own[:, None], axis=1, kind="stable")
    moved = np.take_along_axis(rows, order, axis=1)
    return np.where(moved == own[:, None], NO_ROW, moved)


def mean_with(database: Database, vectors: Floats, rows: Rows, alpha: float) -> Floats:
    """float32 [q, d]: the vectors, each with its rows added and brought back to length 1.

    Sums are formed in float64, row by row, so that they do not depend on what other vectors are given.

    Args:
        database: that the rows are of.
        vectors: float32 [q, d].
        rows: int64 [q, n]; `NO_ROW` adds nothing.
        alpha: power of the cosine that is a row's weight.
    """
    if not (rows != NO_ROW).any():
        return vectors.copy()
    used, places = np.unique(rows, return_inverse=True)
    # `NO_ROW` has weight 0, so any row may stand in for it.
    held = database.vectors(np.maximum(used, 0))
    places = places.reshape(rows.shape)
    there = np.where(rows == NO_ROW, NO_ROW, places)
    cosines = 1 - distances_to(held, vectors, there).astype(np.float64) / 2
    weights = np.where(rows == NO_ROW, 0.0, np.maximum(cosines, 0) ** alpha)
    summed = vectors.astype(np.float64)
    for i in range(rows.shape[1]):
        summed += weights[:, i, None] * held[places[:, i]]
    summed /= np.sqrt((summed**2).sum(axis=1, keepdims=True))
    # What nothing is added to stays as it is, whatever vectors are beside it.
    alone = (rows == NO_ROW).all(axis=1, keepdims=True)
    return np.where(alone, vectors, summed.astype(np.float32))
