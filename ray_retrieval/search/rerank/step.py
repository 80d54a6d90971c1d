"""What a step of re-ranking is given and returns; see the package."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Vectors
from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.vectors import (
    VectorSegment,
    check_unit_queries,
    distances_to,
    search_vectors,
    unit_error,
)

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Progress = Callable[[int], None]
"""Called with the number of rows of each block that is done; they add up to those of the database."""


@runtime_checkable
class Database(Protocol):
    """Unit vectors in rows 0, 1, … that can be read and searched."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def vectors(self, rows: Rows | None = None) -> Floats:
        """float32 [m, d]: those of some rows, int64 [m], in the order asked; all of them by default."""
        ...

    def search(self, queries: Vectors, k: int) -> Hits:
        """Hits [q, k]: the nearest rows of each query, float32 [q, d], sorted by (distance, row)."""
        ...


class HeldVectors:
    """Vectors in memory (or in a mapped file) as a database.

    Args:
        vectors: float32 [n, d], unit vectors.
        threads: that a search may use.

    Raises:
        ArtefactError: if the array is of another type or shape, or a row is not of length 1.
    """

    def __init__(self, vectors: Floats, *, threads: int = 1) -> None:
        self._vectors = np.ascontiguousarray(vectors)
        self._segment = VectorSegment(self._vectors, 0, unit_error(self._vectors))
        self._threads = threads

    def __len__(self) -> int:
        return len(self._vectors)

    def vectors(self, rows: Rows | None = None) -> Floats:
        """float32 [m, d]: some rows, int64 [m], in the order asked, or all of them."""
        return self._vectors if rows is None else self._vectors[rows]

    def search(self, queries: Vectors, k: int) -> Hits:
        """Hits [q, k]: the nearest rows of each query, float32 [q, d], exactly."""
        return search_vectors([self._segment], queries.data, k, threads=self._threads)


class Step(ABC):
    """One step of re-ranking over one database. It may be used by several threads at once.

    Attributes:
        database: what the step's hits are from and what the steps after it work on.
        given: what the hits are from that the step is given; the same, unless the step makes a database.
        depth: how many hits of the search it makes use of; a search with fewer may give another result.
        joint: whether what it returns for a query depends on the other queries of the call.
    """

    joint = False

    def __init__(self, database: Database, depth: int, *, given: Database | None = None) -> None:
        self.database = database
        self.given = database if given is None else given
        self.depth = depth

    @abstractmethod
    def __call__(self, queries: Vectors, hits: Hits, query_rows: Rows | None = None) -> tuple[Vectors, Hits]:
        """What the next step is to work on: the queries, and their hits in this step's order.

        Args:
            queries: those that the hits are of.
            hits: of a search in the database, or of another step; what is used of them are their rows.
            query_rows: int64 [q]: which row of the database each query is, or `NO_ROW`. None: the first of
                its nearest rows whose vector equals the query, if there is one.

        Returns:
            The queries as the step has made them, or those given; and as many hits for each, with the step's
            own float32 distances, sorted by (distance, row).

        Raises:
            ArtefactError: if queries and database are of different dimensions.
            QueryError: if a query is not of length 1, or hits or `query_rows` do not fit the queries or the
                database.
        """


def dimension_of(database: Database) -> int:
    """That of its vectors, also where it has none."""
    return int(database.vectors(np.zeros(0, np.int64)).shape[1])


def check(database: Database, queries: Vectors, hits: Hits, query_rows: Rows | None) -> None:
    """Check what a step is called with.

    Args:
        database: whose rows the hits are.
        queries: float32 [q, d], each of length 1.
        hits: of the queries, [q, k].
        query_rows: int64 [q]: the row that each query is, or `NO_ROW`; None where that is not said.

    Raises:
        ArtefactError: if queries and database are of different dimensions.
        QueryError: if a query is not of length 1, or hits or `query_rows` do not fit the queries or the
            database.
    """
    dimension = dimension_of(database)
    if queries.data.shape[1] != dimension:
        raise ArtefactError(
            f"the database has {dimension} dimensions, the queries {queries.data.shape[1]}",
            mend="encode the queries with the model that made the database",
        )
    check_unit_queries(queries.data)
    for what, rows in (("hits", hits.rows), ("query_rows", query_rows)):
        if rows is not None:
            check_rows(what, rows, len(queries), len(database))


def check_rows(what: str, rows: Rows, queries: int, count: int) -> None:
    """Check rows that are given for each query.

    Args:
        what: they are called.
        rows: int64 [q, …], or `NO_ROW`.
        queries: how many there are.
        count: rows of the database.

    Raises:
        QueryError: if they are of another number of queries, or not in the database.
    """
    if len(rows) != queries:
        raise QueryError(f"{queries} queries, but {what} of {len(rows)}")
    if rows.size and not NO_ROW <= rows.min() <= rows.max() < count:
        raise QueryError(f"{what} are rows of {count} or {NO_ROW}, got {rows.min()} to {rows.max()}")


def in_order(distances: Floats, rows: Rows) -> Hits:
    """Hits [q, k] sorted by (distance, row), of distances, float32 [q, k], and rows, int64 [q, k]."""
    order = np.lexsort((rows, distances), axis=1)
    return Hits(np.take_along_axis(distances, order, axis=1), np.take_along_axis(rows, order, axis=1))


def rows_of_queries(database: Database, queries: Floats, rows: Rows) -> Rows:
    """int64 [q]: the first of some rows, by number, whose vector equals the query; `NO_ROW` if none does.

    Args:
        database: that the rows are of.
        queries: float32 [q, d].
        rows: int64 [q, m]; `NO_ROW` where there is none.
    """
    used, places = np.unique(rows[rows != NO_ROW], return_inverse=True)
    local = np.full(rows.shape, NO_ROW, np.int64)
    local[rows != NO_ROW] = places.reshape(-1)
    equal = distances_to(database.vectors(used), queries, local) == 0
    missing = np.iinfo(np.int64).max
    first = np.where(equal, rows, missing).min(axis=1, initial=missing)
    return np.where(first == missing, NO_ROW, first)
