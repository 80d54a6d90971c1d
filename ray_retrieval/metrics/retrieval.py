"""How well vectors rank: recall@k, mean average precision, MAP@R, R-precision, by inner product.

For one query, the rows of the database are ranked by their similarity to it, equal ones in their own order,
and those that share a label with it are relevant: R of them. With rel(i) = 1 where the row at rank i is
relevant and precision(i) = Σ_{j ≤ i} rel(j) / i, and as means over the queries that have a relevant row,

    recall@k       1 where one of the first k is relevant, else 0. So the field has it (elsewhere: CMC, hit
                   rate); it is not the share of the relevant rows that are found.
    map            (1/R) Σ_i rel(i) · precision(i) over the whole ranking.
    map@r          (1/R) Σ_{i ≤ R} rel(i) · precision(i). Never above `map`; do not compare the two.
    r_precision    (1/R) Σ_{i ≤ R} rel(i)

The query itself does not count where it is in the database: it is taken out of its ranking by its id, or its
row number, wherever it stands. Taking out the first row instead, as is often done, takes out another one
where the database holds the same image twice.

No ranking is ever made. The ranks of the relevant rows are all that is needed, and a rank is 1 plus the
number of better rows, which is counted in one pass over the similarities of a query (`ranks`). These are held
for a block of queries per thread; nothing of the size queries × database is.

Which numbers repeat. The similarities are float32 sums that a BLAS library forms, in an order that depends on
the shape of the product. So every product has one shape, with zeros where the vectors end, and runs in one
thread: on one machine with one library, the result is the same to the last bit for any number of threads and
any block. Another processor or library may round otherwise, and so order two rows that are equal but for
rounding differently. Nor do all libraries give equal vectors equal similarities wherever they stand: a row
that repeats an earlier one is given the similarity of that.

`evaluate_reranked` measures rankings whose first rows another method has put in order (`search.rerank`); the
other rows follow by similarity. The similarities of the first rows are raised, in their order, above all
others; the rest is the same.

Reference: Musgrave et al. 2020, arXiv 2003.08505, for R-precision and MAP@R.
"""

import math
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import ranks
from ray_retrieval.metrics.compiled import frozen
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.metrics.products import QUERIES, ROWS, checked_vectors, copies_in, filled_up
from ray_retrieval.metrics.relevance import (
    Ids,
    RowsOf,
    checked_labels,
    ids_of_itself,
    relevant_rows,
    rows_with_the_id,
)
from ray_retrieval.metrics.shards import default_threads
from ray_retrieval.metrics.threads import each
from ray_retrieval.words import counted

__all__ = ["evaluate", "evaluate_reranked"]

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[Any]
Order = npt.NDArray[np.integer[Any]]

# Raised similarities are whole numbers above this, which those of unit vectors are not. float32 has them all.
_RAISED, _MOST_RAISED = 2, 1 << 23


def evaluate(
    queries: Vectors,
    query_labels: Labels,
    database: Vectors | None = None,
    database_labels: Labels | None = None,
    ks: Sequence[int] = (1, 5, 10),
    query_ids: Ids | None = None,
    database_ids: Ids | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    block: int = QUERIES,
) -> dict[str, Metric]:
    """`recall@k` for each k, `map`, `map@r` and `r_precision`, each with its policy; see the module.

    Args:
        queries: float32 [queries, d], unit vectors.
        query_labels: int64 [queries], relevant where equal, or 0/1 [queries, classes], relevant where a class
            is shared.
        database: float32 [rows, d], unit vectors. None, or the same array as `queries`: the queries are the
            database, and no query counts for itself.
        database_labels: int64 [rows] or 0/1 [rows, classes]. Not needed where the queries are the database.
        ks: the k of recall@k, each at least 1.
        query_ids: text or whole numbers [queries]. A row of the database with the id of a query never counts
            for that query.
        database_ids: likewise [rows]; given together with `query_ids`, or not needed where the queries are
            the database. Without ids, only a database that is the queries has rows that do not count.
        threads: None: one for each core of this process, at most OMP_NUM_THREADS. The result does not depend
            on it. While they run, other BLAS calls of this process have one thread.
        progress: called in this thread with the number of queries of each block that is done.
        block: how many queries a thread compares at once, rounded up to a multiple of 128; the result does
            not depend on it. A thread holds 4 bytes for each of them and each row of the database.

    Raises:
        MetricError: if vectors, labels, ids or options do not fit each other, a vector is not finite or not
            of unit length, there is no query or no row, or no query has a relevant row.
    """
    pass_ = _prepare(queries, query_labels, database, database_labels, query_ids, database_ids)
    return _measure(pass_, ks, threads, progress, block)


def evaluate_reranked(
    queries: Vectors,
    query_labels: Labels,
    database: Vectors | None,
    database_labels: Labels | None,
    order: Order,
    ks: Sequence[int] = (1, 5, 10),
    query_ids: Ids | None = None,
    database_ids: Ids | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    block: int = QUERIES,
) -> dict[str, Metric]:
    """What `evaluate` measures, of rankings that begin with the given rows.

    Args:
        queries: as in `evaluate`, as are all arguments but `order`.
        query_labels: int64 [queries] or 0/1 [queries, classes].
        database: float32 [rows, d], or None.
        database_labels: int64 [rows] or 0/1 [rows, classes], or None.
        order: whole numbers [queries, m]: the rows of the database that come first for each query, in their
            order; -1 anywhere: none. All others follow by similarity, equal ones in row order. The query
            itself, where it is among them, is taken out by its id too.
        ks: the k of recall@k.
        query_ids: text or whole numbers [queries], or None.
        database_ids: likewise [rows].
        threads: None: one for each core.
        progress: called with the number of queries of each block.
        block: how many queries a thread compares at once.

    Raises:
        MetricError: as `evaluate`; and if the order is of another type or shape, names a row that does not
            exist, or a row twice.
    """
    pass_ = _prepare(queries, query_labels, database, database_labels, query_ids, database_ids)
    pass_.put_first(order)
    return _measure(pass_, ks, threads, progress, block)


def _measure(
    pass_: "_Pass",
    ks: Sequence[int],
    threads: int | None,
    progress: Callable[[int], None] | None,
    block: int,
) -> dict[str, Metric]:
    wrong = [k for k in ks if k < 1]
    if wrong:
        raise MetricError(f"recall@k needs k of at least 1, got {wrong[0]}")
    if block < 1:
        raise MetricError(f"a block has at least one query, got {block}")
    pass_.run(-(-block // QUERIES) * QUERIES, default_threads(threads), progress)
    return pass_.metrics(ks)


def _prepare(
    queries: Vectors,
    query_labels: Labels,
    database: Vectors | None,
    database_labels: Labels | None,
    query_ids: Ids | None,
    database_ids: Ids | None,
) -> "_Pass":
    """The arguments of `evaluate`, checked."""
    given, queries = queries, checked_vectors(queries, "queries")
    labels = checked_labels(query_labels, len(queries), "query_labels")
    if database is None or database is given:
        rows, removed = queries, "the query itself does not count"
        row_labels = (
            labels
            if database_labels is None
            else checked_labels(database_labels, len(rows), "database_labels")
        )
        if not np.array_equal(labels, row_labels):
            raise MetricError(
                "the queries are the database, but their labels differ", where="database_labels"
            )
        query_ids, database_ids = ids_of_itself(query_ids, database_ids, len(rows))
    else:
        rows = checked_vectors(database, "database")
        if database_labels is None:
            raise MetricError("a database of its own needs labels of its own", where="database_labels")
        row_labels = checked_labels(database_labels, len(rows), "database_labels")
        removed = "every row counts" if query_ids is None else "rows with the id of the query do not count"
    if rows.shape[1] != queries.shape[1]:
        raise MetricError(
            f"queries have {queries.shape[1]} dimensions and the database {rows.shape[1]}",
            mend="encode both with the same model",
        )
    return _Pass(
        queries,
        rows,
        relevant_rows(labels, row_labels),
        rows_with_the_id(query_ids, database_ids, len(queries), len(rows)),
        f"{removed}; rows by inner product",
    )


class _Pass:
    """One pass over the similarities of all queries, in blocks shared out among threads.

    Args:
        queries: float32 [queries, d], contiguous.
        rows: float32 [rows, d], contiguous.
        relevant: for each query the rows that share a label with it.
        removed: for each query the rows that do not count.
        ranking: which rows count and how they are ranked, in words.
    """

    def __init__(
        self, queries: Vectors, rows: Vectors, relevant: RowsOf, removed: RowsOf, ranking: str
    ) -> None:
        self.queries, self.rows, self.relevant, self.removed = queries, rows, relevant, removed
        self.ranking = ranking
        self.order: Order = np.zeros((len(queries), 0), np.int64)
        count = len(queries)
        self.counts, self.first = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.precisions, self.precisions_at_r = np.zeros(count), np.zeros(count)
        self.found_at_r = np.zeros(count, np.int64)
        whole = len(rows) // ROWS * ROWS
        self.tiles = [rows[start : start + ROWS] for start in range(0, whole, ROWS)]
        if whole < len(rows):
            self.tiles.append(filled_up(rows[whole:], ROWS))
        self.copies, self.originals = copies_in(rows)

    def put_first(self, order: Order) -> None:
        """Have each query's ranking begin with some rows, whatever their similarities.

        Raises:
            MetricError: if they are no such rows.
        """
        order, count = np.asarray(order), len(self.rows)
        shape = f"{order.dtype} {list(order.shape)}"
        if order.ndim != 2 or order.dtype.kind not in "iu" or len(order) != len(self.queries):
            raise MetricError(
                f"an order is whole numbers [{len(self.queries)}, m], got {shape}", where="order"
            )
        if order.shape[1] > _MOST_RAISED:
            raise MetricError(f"at most {_MOST_RAISED:,} rows can come first, got {shape}", where="order")
        for start in range(0, len(order), QUERIES):
            some = np.sort(order[start : start + QUERIES], axis=1)
            if some.size and not -1 <= some[:, 0].min() <= some[:, -1].max() < count:
                raise MetricError(f"an order has rows 0 to {count - 1:,} or -1 for none", where="order")
            twice = (some[:, 1:] == some[:, :-1]) & (some[:, 1:] >= 0)
            if twice.any():
                query = start + int(np.flatnonzero(twice.any(axis=1))[0])
                raise MetricError(f"the order of query {query:,} has a row twice", where="order")
        self.order = order
        self.ranking += f" after the first {counted(order.shape[1], 'row')}, which are reranked"

    def run(self, size: int, threads: int, progress: Callable[[int], None] | None) -> None:
        """Go over all queries; each block writes to its own part of the results."""
        count = len(self.queries)
        blocks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        threads = min(threads, len(blocks))
        rooms: SimpleQueue[Vectors] = SimpleQueue()
        for _ in range(threads):
            rooms.put(np.empty((size, len(self.tiles) * ROWS), np.float32))

        def work(block: slice) -> int:
            room = rooms.get()
            try:
                self._block(block, room)
            finally:
                rooms.put(room)
            return len(self.queries[block])

        with threadpool_limits(1, user_api="blas"):
            each(work, blocks, threads, progress, name="retrieval")

    def _block(self, block: slice, similarities: Vectors) -> None:
        """Rank for some queries. `similarities`: float32, room for whole products."""
        for start in range(block.start, block.stop, QUERIES):
            queries = filled_up(self.queries[start : min(start + QUERIES, block.stop)], QUERIES)
            for number, tile in enumerate(self.tiles):
                place = slice(start - block.start, start - block.start + QUERIES)
                columns = slice(number * ROWS, (number + 1) * ROWS)
                np.matmul(queries, tile.T, out=similarities[place, columns])
        for similarity in similarities[: block.stop - block.start]:
            similarity[self.copies] = similarity[self.originals]
        self._raise_first(block, similarities)
        relevant, relevant_spans = self.relevant.of(block)
        removed, removed_spans = self.removed.of(block)
        ranks.rank_queries(
            similarities,
            block.stop - block.start,
            len(self.rows),
            frozen(relevant),
            frozen(relevant_spans),
            frozen(removed),
            frozen(removed_spans),
            ranks.FEW,
            self.counts[block],
            self.first[block],
            self.precisions[block],
            self.precisions_at_r[block],
            self.found_at_r[block],
        )

    def _raise_first(self, block: slice, similarities: Vectors) -> None:
        """Put the rows that are to come first above all others."""
        order = self.order[block]
        raised = np.arange(_RAISED + order.shape[1], _RAISED, -1, dtype=np.float32)
        for query, rows in enumerate(order):
            there = rows >= 0
            similarities[query, rows[there]] = raised[there]

    def metrics(self, ks: Sequence[int]) -> dict[str, Metric]:
        """Means over the queries that have a relevant row.

        Raises:
            MetricError: if there is none.
        """
        valid = self.counts > 0
        counts, number = self.counts[valid], int(valid.sum())
        if number == 0:
            raise MetricError(
                f"none of {counted(len(valid), 'query')} has a relevant row, so there is nothing to measure",
                mend="check that queries and database have labels in common; a query never counts for itself",
            )
        means = (
            f"mean over the {number:,} of {counted(len(valid), 'query')} that have a relevant row; "
            f"{self.ranking}, equal ones in row order, {len(self.rows):,} in all"
        )

        def mean(name: str, sums: npt.NDArray[np.float64], policy: str) -> Metric:
            # The exact sum, rounded once: the order of the queries does not matter.
            return Metric(name, math.fsum((sums[valid] / counts).tolist()) / number, f"{policy}: {means}")

        found = {
            f"recall@{k}": Metric(
                f"recall@{k}",
                int((self.first[valid] <= k).sum()) / number,
                f"1 where one of the first {k} rows is relevant, else 0 (not the share found): {means}",
            )
            for k in ks
        }
        return found | {
            "map": mean(
                "map",
                self.precisions,
                "sum of precisions at all relevant rows of the full ranking, divided by their number R",
            ),
            "map@r": mean(
                "map@r",
                self.precisions_at_r,
                "sum of precisions at the relevant rows among the first R, divided by R",
            ),
            "r_precision": mean(
                "r_precision",
                self.found_at_r.astype(np.float64),
                "relevant rows among the first R, divided by R",
            ),
        }
