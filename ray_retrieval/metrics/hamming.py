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

Everything comes from one pass per query over the database, never from a matrix of queries × database.

Reference: McSherry & Najork 2008 for ties; He et al. 2018, arXiv 1705.08562, for ties of binary codes.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import kernels
from ray_retrieval.metrics.inputs import Inputs, checked_ranks, counted, cut_off, prepare
from ray_retrieval.metrics.metric import Metric

Ties = Literal["row", "expected", "optimistic", "pessimistic"]
TIES: tuple[Ties, ...] = get_args(Ties)
"""All tie policies, in the order of the kernels' columns."""

_ORDER = {
    "row": "rows at equal distance stay in database order",
    "expected": "exact mean over all orders of the rows at equal distance",
    "optimistic": "relevant rows come first among those at equal distance",
    "pessimistic": "relevant rows come last among those at equal distance",
}
DEFAULT_AT = (1, 10, 100, 500, 1000, 2000, 5000, 10_000)
# Enough queries to outweigh the start of a task, few enough for a lively progress bar.
_BLOCK = 64
# Where the policies differ by more than a tenth of a point, a result must say which one it is.
_TIE_GAP = 0.001


@dataclass(frozen=True)
class PrecisionRecallCurve:
    """Precision and recall of the Hamming ball around the query, by its radius, as means over the queries.

    Attributes:
        radius: int64 [bits + 1], 0…bits.
        precision: float64 [bits + 1]; an empty ball counts 0.
        recall: float64 [bits + 1], ascending; a query without a relevant row counts 0.
    """

    radius: npt.NDArray[np.int64]
    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]


@dataclass(frozen=True)
class HammingReport:
    """How well the codes of a database answer a set of queries.

    Attributes:
        map: mean average precision under each tie policy.
        precision_at: precision of the first n rows, in database order among ties, by n.
        recall_at: recall of the first n rows, likewise.
        precision_within_radius: precision of the Hamming ball that was asked for.
        pr_curve: precision and recall by radius.
        ap: float64 [queries], average precision of each query in database order.
        bits: length of the codes.
        queries: number of queries.
        rows: number of rows in the database.
        queries_without_relevant: queries that no row of the database is relevant to.
        queries_without_hits: queries with no relevant row among the first K, in database order; they count 0
            in `map` and include those without any relevant row.
    """

    map: dict[Ties, Metric]
    precision_at: dict[int, Metric]
    recall_at: dict[int, Metric]
    precision_within_radius: Metric
    pr_curve: PrecisionRecallCurve
    ap: npt.NDArray[np.float64]
    bits: int
    queries: int
    rows: int
    queries_without_relevant: int
    queries_without_hits: int

    @property
    def tie_gap(self) -> float:
        """How far the database order moves the mean average precision from its expectation, in -1…1."""
        return self.map["row"].value - self.map["expected"].value

    @property
    def ties_matter(self) -> bool:
        """Whether the order in which the database is stored moves the result by more than 0.1 point."""
        return abs(self.tie_gap) > _TIE_GAP

    @property
    def metrics(self) -> list[Metric]:
        """All single numbers, in the order to print them."""
        return [
            *self.map.values(),
            *self.precision_at.values(),
            *self.recall_at.values(),
            self.precision_within_radius,
        ]


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
    cut = cut_off(k, inputs.rows)
    column = TIES.index(ties)
    blocks = _score(inputs, cut, at=(), row_order=ties == "row", threads=_threads(threads), progress=None)
    ap = np.concatenate([block.average_precision[:, column] for block in blocks])
    return _map_metric(ap, k, inputs, ties)


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
    cut = cut_off(k, inputs.rows)
    at = [n for n in DEFAULT_AT if n <= inputs.rows] if at is None else checked_ranks(at)
    if radius < 0:
        raise MetricError(f"a Hamming radius is at least 0, got {radius}")
    precision, recall = np.zeros(inputs.bits + 1), np.zeros(inputs.bits + 1)
    kept: list[tuple[_Floats, _Ints, _Ints]] = []
    for block in _score(inputs, cut, at=at, row_order=True, threads=_threads(threads), progress=progress):
        # Query by query, because a sum of floats must not depend on where the blocks begin.
        for row in block.precision:
            precision += row
        for row in block.recall:
            recall += row
        kept.append((block.average_precision, block.tallies, block.hits_at))
    ap, tallies, hits_at = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    curve = PrecisionRecallCurve(
        np.arange(inputs.bits + 1), precision / inputs.queries, recall / inputs.queries
    )
    relevant = tallies[:, 0]
    return HammingReport(
        map={ties: _map_metric(ap[:, column], k, inputs, ties) for column, ties in enumerate(TIES)},
        precision_at={n: _precision_metric(hits_at[:, i], n, inputs) for i, n in enumerate(at)},
        recall_at={n: _recall_metric(hits_at[:, i], relevant, n, inputs) for i, n in enumerate(at)},
        precision_within_radius=_radius_metric(curve, radius, inputs),
        pr_curve=curve,
        ap=ap[:, 0].copy(),
        bits=inputs.bits,
        queries=inputs.queries,
        rows=inputs.rows,
        queries_without_relevant=int((relevant == 0).sum()),
        queries_without_hits=int((tallies[:, 1] == 0).sum()),
    )


# Policies ---------------------------------------------------------------------------------------------------


def _mean(values: npt.NDArray[np.float64]) -> float:
    return math.fsum(values.tolist()) / len(values)


def _map_metric(ap: npt.NDArray[np.float64], k: int | None, inputs: Inputs, ties: Ties) -> Metric:
    name = f"map@{'all' if k is None else k}"
    reach = f"all {inputs.rows:,} rows" if k is None else f"the first {k:,} of {counted(inputs.rows, 'row')}"
    policy = (
        f"mean over {counted(inputs.queries, 'query')} of the average precision over {reach} "
        f"by Hamming distance of {inputs.bits} bits, divided by the relevant rows found there; "
        f"a query that finds none counts 0; {_ORDER[ties]}"
    )
    return Metric(name if ties == "row" else f"{name}/{ties}", _mean(ap), policy)


def _precision_metric(hits: npt.NDArray[np.int64], n: int, inputs: Inputs) -> Metric:
    policy = (
        f"mean over {counted(inputs.queries, 'query')} of the share of relevant rows among the first {n:,} "
        f"by Hamming distance; {_ORDER['row']}"
    )
    return Metric(f"precision@{n}", int(hits.sum()) / (n * len(hits)), policy)


def _recall_metric(
    hits: npt.NDArray[np.int64], relevant: npt.NDArray[np.int64], n: int, inputs: Inputs
) -> Metric:
    policy = (
        f"mean over {counted(inputs.queries, 'query')} of the share of all relevant rows that is among the "
        f"first {n:,} by Hamming distance; a query without a relevant row counts 0; {_ORDER['row']}"
    )
    return Metric(f"recall@{n}", _mean(hits / np.maximum(1, relevant)), policy)


def _radius_metric(curve: PrecisionRecallCurve, radius: int, inputs: Inputs) -> Metric:
    policy = (
        f"mean over {counted(inputs.queries, 'query')} of the share of relevant rows among those within "
        f"Hamming distance {radius}; a query with no row that near counts 0"
    )
    return Metric(f"precision@radius{radius}", float(curve.precision[min(radius, inputs.bits)]), policy)


# The pass over blocks of queries ----------------------------------------------------------------------------

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


class _Block(NamedTuple):
    """What `kernels.score` returns for a block of queries."""

    average_precision: _Floats
    tallies: _Ints
    precision: _Floats
    recall: _Floats
    hits_at: _Ints


def _score(
    inputs: Inputs,
    k: int,
    *,
    at: Sequence[int],
    row_order: bool,
    threads: int,
    progress: Callable[[int], None] | None,
) -> Iterator[_Block]:
    """The scores of all queries, block after block in their order, worked out by several threads."""
    bins = sorted(set(at))
    bin_of_rank = kernels.frozen(
        np.searchsorted(bins, np.arange(1, bins[-1] + 1)) if bins else np.zeros(0, np.int64)
    )

    def work(start: int) -> _Block:
        stop = start + size
        scores = _Block(
            *kernels.score(
                inputs.query_words[start:stop],
                inputs.query_labels[start:stop],
                inputs.words,
                inputs.labels,
                inputs.single,
                inputs.bits,
                k,
                row_order,
                bin_of_rank,
                len(bins),
            )
        )
        # The kernel counts the hits between one n and the next.
        totals = np.cumsum(scores.hits_at, axis=1)[:, np.searchsorted(bins, at).astype(np.int64)]
        return scores._replace(hits_at=totals)

    def done(block: _Block) -> _Block:
        if progress is not None:
            progress(len(block.tallies))
        return block

    size = max(1, min(_BLOCK, -(-inputs.queries // (4 * threads))))
    starts = range(0, inputs.queries, size)
    if threads == 1 or len(starts) == 1:
        for start in starts:
            yield done(work(start))
        return
    # The kernels hold no lock, so threads do; a window bounds what waits for a slow block ahead of it.
    with ThreadPoolExecutor(min(threads, len(starts)), thread_name_prefix="hamming") as pool:
        window: deque[Future[_Block]] = deque()
        try:
            for start in starts:
                window.append(pool.submit(work, start))
                if len(window) > 2 * threads:
                    yield done(window.popleft().result())
            while window:
                yield done(window.popleft().result())
        finally:
            for future in window:
                future.cancel()


def _threads(threads: int | None) -> int:
    if threads is not None:
        if threads < 1:
            raise MetricError(f"at least one thread is needed, got {threads}")
        return threads
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only.
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    # Ray sets this to the cores that it gave to the process; whoever shares a machine does the same.
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(allowed)) if allowed.isdigit() and int(allowed) else cores
