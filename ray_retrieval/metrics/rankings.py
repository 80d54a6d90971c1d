"""What `retrieval` measures of vectors, measured of rankings that are given and may be truncated.

For descriptors that have no similarity with every row of the database, such as sets of local features: a
ranking ends where no row has anything in common with the query, and what it lacks is never found.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.metrics.relevance import Ids, checked_labels, relevant_rows, rows_with_the_id
from ray_retrieval.words import counted

__all__ = ["evaluate"]


def evaluate(
    order: npt.NDArray[np.integer[Any]],
    query_labels: npt.NDArray[Any],
    database_labels: npt.NDArray[Any],
    ks: Sequence[int] = (1, 5, 10),
    query_ids: Ids | None = None,
    database_ids: Ids | None = None,
) -> dict[str, Metric]:
    """`recall@k` for each k, `map`, `map@r` and `r_precision` of rankings as they are, each with its policy.

    What they mean is said in `retrieval`; a relevant row that a ranking lacks is never found.

    Args:
        order: whole numbers [queries, m]: each row the ranking of a query, the best row of the database
            first; -1 stands for no row, and is passed over.
        query_labels: int64 [queries], relevant where equal, or 0/1 [queries, classes], relevant where a class
            is shared.
        database_labels: int64 [rows] or 0/1 [rows, classes].
        ks: the k of recall@k, each at least 1.
        query_ids: text or whole numbers [queries]. A row of the database with the id of a query never counts
            for that query.
        database_ids: likewise [rows].

    Raises:
        MetricError: if rankings, labels, ids or options do not fit each other, a ranking holds a row twice,
            or no query has a relevant row.
    """
    order = np.asarray(order)
    if order.ndim != 2 or order.dtype.kind not in "iu":
        raise MetricError(
            f"an order is whole numbers [queries, m], got {order.dtype} {list(order.shape)}", where="order"
        )
    if any(k < 1 for k in ks):
        raise MetricError(f"recall@k needs k of at least 1, got {min(ks)}")
    queries, rows = len(order), len(database_labels)
    wanted = relevant_rows(
        checked_labels(query_labels, queries, "query_labels"),
        checked_labels(database_labels, rows, "database_labels"),
    )
    own = rows_with_the_id(query_ids, database_ids, queries, rows)
    found: list[tuple[int, npt.NDArray[np.int64]]] = []
    for query in range(queries):
        relevant, removed = (_rows(of, query) for of in (wanted, own))
        ranking = _checked(order[query], query, rows)
        ranking = ranking[~np.isin(ranking, removed)]
        relevant = np.setdiff1d(relevant, removed)
        if len(relevant):
            found.append((len(relevant), np.flatnonzero(np.isin(ranking, relevant))))
    if not found:
        raise MetricError(
            f"none of {counted(queries, 'query')} has a relevant row, so there is nothing to measure",
            mend="check that queries and database have labels in common; a query never counts for itself",
        )
    itself = "every row counts" if query_ids is None else "rows with the id of the query do not count"
    means = (
        f"mean over the {len(found):,} of {counted(queries, 'query')} that have a relevant row; "
        f"{itself}; rankings as given, of up to {counted(order.shape[1], 'row')} of {rows:,}, "
        "relevant rows beyond their ends are never found"
    )

    def mean(name: str, values: list[float], policy: str) -> Metric:
        return Metric(name, math.fsum(values) / len(values), f"{policy}: {means}")

    measured = {
        f"recall@{k}": mean(
            f"recall@{k}",
            [float(len(places) > 0 and places[0] < k) for _, places in found],
            f"1 where one of the first {k} rows is relevant, else 0 (not the share found)",
        )
        for k in ks
    }
    return measured | {
        "map": mean(
            "map",
            [_precisions(places) / count for count, places in found],
            "sum of precisions at the relevant rows of the ranking, divided by R, those of the database",
        ),
        "map@r": mean(
            "map@r",
            [_precisions(places[places < count]) / count for count, places in found],
            "sum of precisions at the relevant rows among the first R, divided by R",
        ),
        "r_precision": mean(
            "r_precision",
            [(places < count).sum().item() / count for count, places in found],
            "relevant rows among the first R, divided by R",
        ),
    }


def _rows(of: Any, query: int) -> npt.NDArray[np.int64]:
    numbers, spans = of.of(slice(query, query + 1))
    rows: npt.NDArray[np.int64] = numbers[spans[0, 0] : spans[0, 1]]
    return rows


def _checked(ranking: npt.NDArray[Any], query: int, rows: int) -> npt.NDArray[np.int64]:
    kept: npt.NDArray[np.int64] = ranking[ranking != -1].astype(np.int64)
    if len(kept) and not 0 <= kept.min() <= kept.max() < rows:
        raise MetricError(f"an order has rows 0 to {rows - 1:,} or -1 for none", where="order")
    if len(np.unique(kept)) < len(kept):
        raise MetricError(f"the order of query {query:,} has a row twice", where="order")
    return kept


def _precisions(places: npt.NDArray[np.int64]) -> float:
    """Sum of the precisions at ascending positions, counted from 0, of relevant rows."""
    precisions: npt.NDArray[np.float64] = (np.arange(len(places)) + 1) / (places + 1)
    return math.fsum(precisions.tolist())
