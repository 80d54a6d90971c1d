"""Which rows of a database are relevant to a query, by label, and which do not count for it, by id."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics.labels import check_alike, described, shaped
from ray_retrieval.words import counted

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[Any] | Sequence[str] | Sequence[int]


class RowsOf:
    """For each query some rows of the database: those that have its value, or share one of its values.

    Args:
        queries: int64 [queries], or bool [queries, values].
        rows: int64 [rows], or bool [rows, values].
    """

    def __init__(self, queries: npt.NDArray[Any], rows: npt.NDArray[Any]) -> None:
        self._rows = len(rows)
        self._hot: npt.NDArray[np.bool_] | None = None
        if rows.ndim == 1:
            self._grouped = np.argsort(rows, kind="stable")
            ordered = rows[self._grouped]
            starts = np.searchsorted(ordered, queries, side="left")
            stops = np.searchsorted(ordered, queries, side="right")
            self._spans = np.stack([starts, stops], axis=1).astype(np.int64)
            return
        self._hot = queries
        # Value by value, so that no table of rows × values larger than the caller's is made.
        self._rows_with = [np.flatnonzero(rows[:, value]) for value in range(rows.shape[1])]

    def of(self, block: slice) -> tuple[Ints, Ints]:
        """Numbers of rows, int64 [m], and the span of each query of the block in them, int64 [queries, 2]."""
        if self._hot is None:
            return self._grouped, self._spans[block]
        found, stops = [], [0]
        for values in self._hot[block]:
            flags = np.zeros(self._rows, np.bool_)
            for value in np.flatnonzero(values):
                flags[self._rows_with[value]] = True
            found.append(np.flatnonzero(flags))
            stops.append(stops[-1] + len(found[-1]))
        spans = np.stack([stops[:-1], stops[1:]], axis=1).astype(np.int64)
        return np.concatenate(found), spans


def checked_labels(labels: npt.NDArray[Any], rows: int, where: str) -> npt.NDArray[Any]:
    """Labels as int64 [n], or bool [n, classes].

    Raises:
        MetricError: if they are neither, or are not as many as the vectors.
    """
    labels = shaped(labels, rows, "vector", where)
    if labels.ndim == 1:
        return labels.astype(np.int64, copy=False)
    if labels.dtype == np.bool_:
        return labels
    hot: npt.NDArray[np.bool_] = labels == 1
    if not ((labels == 0) | hot).all():
        raise MetricError(
            f"labels [n, classes] are 0 or 1 each, got {described(labels)} with other values",
            where=where,
            mend="give one class number for each row as [n]",
        )
    return hot


def relevant_rows(query_labels: npt.NDArray[Any], database_labels: npt.NDArray[Any]) -> RowsOf:
    """The rows that share a label with each query.

    Args:
        query_labels: int64 [q], or multi-hot [q, classes], as `checked_labels` returns them.
        database_labels: int64 [n], or multi-hot [n, classes], likewise.

    Raises:
        MetricError: if one is a list of class numbers and the other is not, or their classes differ.
    """
    check_alike(query_labels, database_labels)
    return RowsOf(query_labels, database_labels)


def rows_with_the_id(query_ids: Ids | None, database_ids: Ids | None, queries: int, rows: int) -> RowsOf:
    """The rows that have the id of each query; none where no ids are given.

    Raises:
        MetricError: if ids are given on one side only, are not one for each vector, or are text on one side
            and numbers on the other.
    """
    if query_ids is None and database_ids is None:
        return RowsOf(np.zeros(queries, np.int64), np.ones(rows, np.int64))
    if query_ids is None or database_ids is None:
        missing = "query_ids" if query_ids is None else "database_ids"
        raise MetricError(
            "ids are needed on both sides to remove a query from its own ranking", where=missing
        )
    of_queries = _checked_ids(query_ids, queries, "query_ids")
    of_rows = _checked_ids(database_ids, rows, "database_ids")
    if of_queries.dtype.kind != of_rows.dtype.kind:
        raise MetricError(
            f"ids of the queries are {of_queries.dtype} and those of the database {of_rows.dtype}",
            mend="give both as text, or both as whole numbers",
        )
    names = np.unique(of_rows)
    numbers = np.searchsorted(names, of_rows)
    place = np.minimum(np.searchsorted(names, of_queries), len(names) - 1)
    return RowsOf(np.where(names[place] == of_queries, place, -1), numbers)


def ids_of_itself(query_ids: Ids | None, database_ids: Ids | None, count: int) -> tuple[Ids, Ids]:
    """Ids of the queries and of the rows, which are the same.

    Raises:
        MetricError: if they are given on both sides and differ.
    """
    ids = next((ids for ids in (query_ids, database_ids) if ids is not None), np.arange(count))
    for other in (query_ids, database_ids):
        if other is not None and not np.array_equal(np.asarray(other), np.asarray(ids)):
            raise MetricError("the queries are the database, but their ids differ", where="database_ids")
    return ids, ids


def _checked_ids(ids: Ids, count: int, where: str) -> npt.NDArray[Any]:
    array = np.asarray(ids)
    if array.dtype == np.object_ and all(isinstance(one, str) for one in array.flat):
        array = array.astype(np.str_)
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        raise MetricError(
            f"ids are text or whole numbers [n], got {array.dtype} {list(array.shape)}", where=where
        )
    if len(array) != count:
        raise MetricError(f"{counted(count, 'vector')} but {counted(len(array), 'id')}", where=where)
    # One type, so that text is never compared with numbers, nor numbers by their width.
    return array if array.dtype.kind == "U" else array.astype(np.int64)
