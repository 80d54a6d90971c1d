"""From the sums over all shards to the numbers that are reported, each with its policy."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import ties as order_free
from ray_retrieval.metrics.compiled import frozen
from ray_retrieval.metrics.inputs import cut_off
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.metrics.parts import DistanceCounts, RowOrder
from ray_retrieval.words import counted

Ties = Literal["row", "expected", "optimistic", "pessimistic"]
TIES: tuple[Ties, ...] = get_args(Ties)
"""All tie policies, in the order of the kernels' columns."""

_ORDER = {
    "row": "rows at equal distance stay in database order",
    "expected": "exact mean over all orders of the rows at equal distance",
    "optimistic": "relevant rows come first among those at equal distance",
    "pessimistic": "relevant rows come last among those at equal distance",
}
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


def report_of(counts: DistanceCounts, order: RowOrder, *, radius: int = 2) -> HammingReport:
    """The report on a database from the sums over all its shards.

    Args:
        counts: the sum of the first pass.
        order: the sum of the second pass, which names the cut-off and the n of precision@n and recall@n.
        radius: of the Hamming ball for `precision_within_radius`, at least 0.

    Raises:
        MetricError: if there is no row.
    """
    if radius < 0:
        raise MetricError(f"a Hamming radius is at least 0, got {radius}")
    assert (counts.rows, counts.queries) == (order.of_rows, len(order.hits))
    ap, relevant, curve = summarise(counts, order.k)
    ap = np.column_stack([order.average_precision(), ap])
    return HammingReport(
        map={ties: map_metric(ap[:, column], order.k, counts, ties) for column, ties in enumerate(TIES)},
        precision_at={n: _precision_metric(order.hits_at[:, i], n, counts) for i, n in enumerate(order.at)},
        recall_at={
            n: _recall_metric(order.hits_at[:, i], relevant, n, counts) for i, n in enumerate(order.at)
        },
        precision_within_radius=_radius_metric(curve, radius, counts),
        pr_curve=curve,
        ap=ap[:, 0].copy(),
        bits=counts.bits,
        queries=counts.queries,
        rows=counts.rows,
        queries_without_relevant=int((relevant == 0).sum()),
        queries_without_hits=int((order.hits == 0).sum()),
    )


def summarise(
    counts: DistanceCounts, k: int | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], PrecisionRecallCurve]:
    """(float64 [queries, 3], AP expected, optimistic, pessimistic; int64 [queries], relevant rows; curve).

    Raises:
        MetricError: if there is no row.
    """
    if counts.rows == 0:
        raise MetricError("there is nothing to compare: no shard has a row")
    cut = cut_off(k, counts.rows)
    ap, relevant, precision, recall = order_free.summarise(frozen(counts.counts), cut)
    radius = np.arange(counts.bits + 1)
    curve = PrecisionRecallCurve(radius, precision / counts.queries, recall / counts.queries)
    return ap, relevant, curve


def _mean(values: npt.NDArray[np.float64]) -> float:
    return math.fsum(values.tolist()) / len(values)


def map_metric(ap: npt.NDArray[np.float64], k: int | None, counts: DistanceCounts, ties: Ties) -> Metric:
    """The mean average precision, with its policy in words.

    Args:
        ap: float64 [queries], at least one.
        k: rows of each query that count, None for all.
        counts: of what was compared.
        ties: the order of rows at the same distance.
    """
    name = f"map@{'all' if k is None else k}"
    reach = f"all {counts.rows:,} rows" if k is None else f"the first {k:,} of {counted(counts.rows, 'row')}"
    policy = (
        f"mean over {counted(counts.queries, 'query')} of the average precision over {reach} "
        f"by Hamming distance of {counts.bits} bits, divided by the relevant rows found there; "
        f"a query that finds none counts 0; {_ORDER[ties]}"
    )
    return Metric(name if ties == "row" else f"{name}/{ties}", _mean(ap), policy)


def _precision_metric(hits: npt.NDArray[np.int64], n: int, counts: DistanceCounts) -> Metric:
    policy = (
        f"mean over {counted(counts.queries, 'query')} of the share of relevant rows among the first {n:,} "
        f"by Hamming distance; {_ORDER['row']}"
    )
    return Metric(f"precision@{n}", int(hits.sum()) / (n * len(hits)), policy)


def _recall_metric(
    hits: npt.NDArray[np.int64], relevant: npt.NDArray[np.int64], n: int, counts: DistanceCounts
) -> Metric:
    policy = (
        f"mean over {counted(counts.queries, 'query')} of the share of all relevant rows that is among the "
        f"first {n:,} by Hamming distance; a query without a relevant row counts 0; {_ORDER['row']}"
    )
    return Metric(f"recall@{n}", _mean(hits / np.maximum(1, relevant)), policy)


def _radius_metric(curve: PrecisionRecallCurve, radius: int, counts: DistanceCounts) -> Metric:
    policy = (
        f"mean over {counted(counts.queries, 'query')} of the share of relevant rows among those within "
        f"Hamming distance {radius}; a query with no row that near counts 0"
    )
    return Metric(f"precision@radius{radius}", float(curve.precision[min(radius, counts.bits)]), policy)
