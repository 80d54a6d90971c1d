"""How well binary codes rank: mean average precision, precision, recall, by the Hamming distance.

For one query, the rows of the database are ranked by distance and those that share a label with the query
are relevant. With K the cut-off and rel(i) = 1 where the row at rank i is relevant,

    AP@K = Σ_{i ≤ K} rel(i) · precision(i) / Σ_{i ≤ K} rel(i),    precision(i) = Σ_{j ≤ i} rel(j) / i

The divisor is the number of relevant rows *found in the first K*, as everywhere in the deep-hashing
literature; a query that finds none counts 0. For K below the number of rows, this has a consequence worth
knowing: finding more can score less, since [+ - +] gives 5/6 and [+ - -] gives 1.

Few bits mean many rows at one distance, and AP depends on their order. The four policies are

    row          the order of the database: what an exact search returns. Reproducible, but a database that
                 is stored class by class moves it by a point or more at 12 bits.
    expected     the exact mean over all orders of equal rows: a property of the codes alone.
    optimistic   within each distance the relevant rows come first,
    pessimistic  or last.

For K = all rows, optimistic and pessimistic bound the other two. For smaller K they do not, by the divisor
above: for the codes of [+ | - | + -] with K = 3, optimistic is 5/6 and pessimistic is 1. They still name two
definite orders.

Everything comes from one pass per query over the database, never from a matrix of queries × database, and
from sums of integers: a database that is cut into shards gives the same numbers to the last digit
(`evaluate_shards`).

Reference: McSherry & Najork 2008 for ties; He et al. 2018, arXiv 1705.08562, for ties of binary codes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics.inputs import Inputs, checked_ranks, cut_off, prepare
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.metrics.parts import sum_of
from ray_retrieval.metrics.report import (
    TIES,
    HammingReport,
    PrecisionRecallCurve,
    Ties,
    map_metric,
    report_of,
    summarise,
)
from ray_retrieval.metrics.shards import (
    count_and_order_inputs,
    count_inputs,
    default_threads,
    order_inputs,
)

__all__ = [
    "DEFAULT_AT",
    "TIES",
    "HammingReport",
    "PrecisionRecallCurve",
    "Ties",
    "evaluate",
    "evaluate_shards",
    "mean_average_precision",
]

DEFAULT_AT = (1, 10, 100, 500, 1000, 2000, 5000, 10_000)
"""The n of precision@n and recall@n where none are asked for and the database has as many rows."""


def mean_average_precision(
    query_codes: npt.NDArray[np.uint8],
    query_labels: npt.NDArray[Any],
    database_codes: npt.NDArray[np.uint8],
    database_labels: npt.NDArray[Any],
    k: int | None = None,
    ties: Ties = "row",
    bits: int | None = None,
    *,
    threads: int | None = None,
) -> Metric:
    """Mean over the queries of AP@K by Hamming distance, divided by the relevant rows found in the first K.

    Args:
        query_codes: uint8 [queries, ceil(bits / 8)], packed as `numpy.packbits` does.
        query_labels: int64 [queries], relevant where equal, or 0/1 [queries, classes], relevant where a class
            is shared.
        database_codes: uint8 [rows, ceil(bits / 8)].
        database_labels: int64 [rows] or 0/1 [rows, classes].
        k: how many rows of a ranking count, at least 1; None or more than there are: all.
        ties: order of the rows at equal distance; see the module.
        bits: true length of the codes, where it is less than 8 · bytes; what lies beyond is ignored.
        threads: None: one for each core of this process, at most OMP_NUM_THREADS.

    Raises:
        MetricError: if codes, labels or options do not fit each other, or there is no query or no row.
    """
    if ties not in TIES:
        raise MetricError(f"unknown tie policy {ties!r}", mend=f"choose one of {', '.join(TIES)}")
    inputs = prepare(query_codes, query_labels, database_codes, database_labels, bits)
    used = default_threads(threads)
    cut_off(k, inputs.rows)
    if ties == "row":
        counts, order = count_and_order_inputs(inputs, k, (), used)
        return map_metric(order.average_precision(), k, counts, ties)
    counts = count_inputs(inputs, used)
    ap, _, _ = summarise(counts, k)
    return map_metric(ap[:, TIES.index(ties) - 1], k, counts, ties)


def evaluate(
    query_codes: npt.NDArray[np.uint8],
    query_labels: npt.NDArray[Any],
    database_codes: npt.NDArray[np.uint8],
    database_labels: npt.NDArray[Any],
    *,
    bits: int | None = None,
    k: int | None = None,
    at: Sequence[int] | None = None,
    radius: int = 2,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> HammingReport:
    """All Hamming metrics from one pass.

    Args:
        query_codes: uint8 [queries, ceil(bits / 8)], packed as `numpy.packbits` does.
        query_labels: int64 [queries], relevant where equal, or 0/1 [queries, classes], relevant where a class
            is shared.
        database_codes: uint8 [rows, ceil(bits / 8)].
        database_labels: int64 [rows] or 0/1 [rows, classes].
        bits: true length of the codes, where it is less than 8 · bytes; what lies beyond is ignored.
        k: how many rows of a ranking count for the average precision, at least 1; None or more than there
            are: all.
        at: the n of precision@n and recall@n, each at least 1; None: those of `DEFAULT_AT` that the database
            has rows for. Places beyond the database count as not relevant.
        radius: of the Hamming ball for `precision_within_radius`, at least 0.
        threads: None: one for each core of this process, at most OMP_NUM_THREADS. The result does not depend
            on it.
        progress: called in this thread with the number of queries of each block that is done.

    Raises:
        MetricError: if codes, labels or options do not fit each other, or there is no query or no row.
    """
    inputs = prepare(query_codes, query_labels, database_codes, database_labels, bits)
    at = _asked(k, at, radius, inputs.rows)
    counts, order = count_and_order_inputs(inputs, k, at, default_threads(threads), progress)
    return report_of(counts, order, radius=radius)


def evaluate_shards(
    query_codes: npt.NDArray[np.uint8],
    query_labels: npt.NDArray[Any],
    shards: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]],
    *,
    bits: int | None = None,
    k: int | None = None,
    at: Sequence[int] | None = None,
    radius: int = 2,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> HammingReport:
    """`evaluate` over a database in parts, one after another: the same report, bit for bit.

    What is held besides is the counts by distance, 16 bytes a query and bit, twice where there are several
    parts, and a few MiB, however many and however long the rows are.

    Args:
        query_codes: uint8 [queries, ceil(bits / 8)], packed as `numpy.packbits` does.
        query_labels: int64 [queries], relevant where equal, or 0/1 [queries, classes], relevant where a class
            is shared.
        shards: codes uint8 [rows, ceil(bits / 8)] and labels, int64 [rows] or 0/1 [rows, classes], of
            consecutive rows, in row order; a sequence that loads a shard when it is asked for holds one at a
            time. Each is asked for twice. Empty ones are allowed.
        bits: true length of the codes, where it is less than 8 · bytes; what lies beyond is ignored.
        k: how many rows of a ranking count for the average precision, at least 1; None or more than there
            are: all.
        at: the n of precision@n and recall@n, each at least 1; None: those of `DEFAULT_AT` that the database
            has rows for.
        radius: of the Hamming ball for `precision_within_radius`, at least 0.
        threads: for each shard; None: one for each core of this process, at most OMP_NUM_THREADS.
        progress: called with a number of queries, each of which counts twice for every shard.

    Raises:
        MetricError: if codes, labels or options do not fit each other, or there is no query or no row.
    """
    used, several = default_threads(threads), len(shards) > 1

    def inputs(codes: npt.NDArray[np.uint8], labels: npt.NDArray[Any]) -> Inputs:
        return prepare(query_codes, query_labels, codes, labels, bits, may_be_empty=True)

    total = None
    for shard in shards:
        total = count_inputs(inputs(*shard), used, progress, total)
    if total is None:
        raise MetricError("there is no shard to add up")
    at = _asked(k, at, radius, total.rows)
    earlier = np.zeros((total.queries if several else 1, total.bits + 1, 2), np.int64)
    orders = (
        order_inputs(inputs(*shard), total, earlier, k, at, used, progress, move_on=several)
        for shard in shards
    )
    return report_of(total, sum_of(orders), radius=radius)


def _asked(k: int | None, at: Sequence[int] | None, radius: int, rows: int) -> list[int]:
    """The n of precision@n and recall@n; and the other options are checked before the work begins."""
    cut_off(k, rows)
    if radius < 0:
        raise MetricError(f"a Hamming radius is at least 0, got {radius}")
    return [n for n in DEFAULT_AT if n <= rows] if at is None else checked_ranks(at)
