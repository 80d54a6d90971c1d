"""Mean average precision and precision at k as the Oxford and Paris benchmarks define them.

The ground truth of a query is lists of rows of the database; a protocol says which of them count:

    protocol    positive       ignored        negative
    easy        easy           hard, junk     all others
    medium      easy, hard     junk           all others
    hard        hard           easy, junk     all others
    classic     ok             junk           all others

Ignored rows are taken out of the ranking: they are neither right nor wrong. Let r_j be the positions, from 0,
of the positives in what is left, ascending, j = 0, 1, …, and R the number of positives. As means over the
queries that have a positive,

    map     (1/R) Σ_j ½ (j / r_j + (j + 1) / (r_j + 1)), with j / r_j = 1 where r_j = 0: the area under the
            precision-recall curve by trapezoids. It is below the sum of precisions at the positives divided
            by R, which others call mAP, by a point or two. Do not compare the two.
    mp@k    the number of r_j < K, divided by K, with K = min(k, 1 + the last position of a positive).
    mr@k    the number of r_j < k, divided by R.

A truncated ranking lacks positives: each counts 0 for map and mr@k, and stands behind the end for mp@k, so
that mp@k is that of the whole ranking where k is not beyond the end. (The published code takes the last
position of those found, and fails where there is none.)

`evaluate` takes rankings. `evaluate_vectors` makes none: what is measured needs the positions of the listed
rows only, and these are counted (`positions`), over a database in shards; distractors are further shards.

Reference: Radenovic et al. 2018, arXiv 1803.11285; Philbin et al. 2007, compute_ap, for the trapezoids.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics.ground_truth import LISTS, POSITIVE, GroundTruth, Lists, Protocol
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.metrics.positions import Vectors, Wanted, ranked_positions
from ray_retrieval.metrics.threads import Progress
from ray_retrieval.words import counted

__all__ = [
    "GroundTruth",
    "Protocol",
    "evaluate",
    "evaluate_reranked",
    "evaluate_vectors",
    "trapezoidal_average_precision",
]

Ints = npt.NDArray[np.int64]
Report = dict[str, dict[str, Metric]]

MISSING = np.iinfo(np.int64).max
"""The position of a row that a truncated ranking does not hold."""


def evaluate(
    ranks: npt.NDArray[np.integer[Any]],
    ground_truth: Lists,
    protocol: Protocol = "revisited",
    ks: Sequence[int] = (1, 5, 10),
    *,
    rows: int | None = None,
) -> Report:
    """`map`, `mp@k` and `mr@k` of rankings, by protocol: `easy`, `medium` and `hard`, or `classic`.

    Args:
        ranks: whole numbers [n, queries]: each column is the ranking of a query, the best row first. It may
            be truncated; -1 stands for no row, and is passed over.
        ground_truth: one mapping a query, of the lists `easy`, `hard` and `junk`, or of `ok` and `junk` for
            the classic protocol, to rows of the database, whole numbers; other keys are not looked at.
        protocol: revisited, or classic.
        ks: the k of mp@k and mr@k, each at least 1.
        rows: number of rows of the database, to check all rows against; None: any row may exist.

    Raises:
        MetricError: if rankings, ground truth or options are not what they should be, a ranking holds a row
            twice, or no query has a positive under one of the protocols.
    """
    truth = GroundTruth.of(ground_truth, protocol)
    ranks = np.asarray(ranks)
    count = len(truth.wanted.spans)
    if ranks.ndim != 2 or ranks.dtype.kind not in "iu" or ranks.shape[1] != count:
        raise MetricError(
            f"ranks are whole numbers [n, {count}], got {ranks.dtype} {list(ranks.shape)}",
            where="ranks",
            mend="one column a query, the best row first",
        )
    if rows is not None:
        truth.check_rows(rows)
    positions = np.full(len(truth.wanted.rows), MISSING, np.int64)
    for query, (start, stop) in enumerate(truth.wanted.spans):
        ranking = _checked_ranking(ranks[:, query], query, rows, "ranks")
        listed = truth.wanted.rows[start:stop]
        order = np.argsort(ranking, kind="stable")
        place = np.searchsorted(ranking, listed, sorter=order)
        there = place < len(ranking)
        there[there] = ranking[order[place[there]]] == listed[there]
        positions[start:stop][there] = order[place[there]]
    described = f"rankings as given, of {counted(len(ranks), 'row')}"
    return report_of(truth, positions, ks=ks, ranking=described)


def evaluate_vectors(
    queries: Vectors,
    database: Vectors | Sequence[Vectors],
    ground_truth: Lists,
    protocol: Protocol = "revisited",
    ks: Sequence[int] = (1, 5, 10),
    *,
    present: Ints | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """What `evaluate` measures of the rankings by inner product, equal rows in their order, by counting.

    Args:
        queries: float32 [queries, d], unit vectors.
        database: float32 [rows, d], unit vectors, or shards of them in row order; memory-mapped ones are
            read once. Distractors come after the rows that the ground truth is about.
        ground_truth: one mapping a query; see `GroundTruth.of`.
        protocol: revisited, or classic.
        ks: the k of mp@k and mr@k, each at least 1.
        present: int64 [rows], ascending: where images could not be encoded, the row in the ground truth's
            numbers that each vector has. Listed rows that are not present are never found. None: all are.
        threads: None: one for each core of this process, at most OMP_NUM_THREADS. The result depends neither
            on it nor on the cut into shards.
        progress: called in this thread with the number of rows of each product that is done.

    Raises:
        MetricError: if vectors, ground truth or options do not fit each other, a vector is not finite or not
            of unit length, or no query has a positive under one of the protocols.
    """
    truth, shards = GroundTruth.of(ground_truth, protocol), _shards(database)
    total = sum(map(len, shards))
    wanted, there = _present(truth, present, total)
    positions = np.full(len(there), MISSING, np.int64)
    positions[there] = ranked_positions(queries, shards, wanted, threads=threads, progress=progress)
    return report_of(truth, positions, ks=ks, ranking=_by_similarity(total))


def evaluate_reranked(
    queries: Vectors,
    database: Vectors | Sequence[Vectors],
    ground_truth: Lists,
    order: npt.NDArray[np.integer[Any]],
    protocol: Protocol = "revisited",
    ks: Sequence[int] = (1, 5, 10),
    *,
    present: Ints | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """What `evaluate_vectors` measures, of rankings that begin with the given rows.

    Args:
        queries: as in `evaluate_vectors`, as are all arguments but `order`.
        database: float32 [rows, d], or shards.
        ground_truth: one mapping a query.
        order: whole numbers [queries, m]: the rows of the database that come first for each query, in their
            order; -1 anywhere: none. All others follow by similarity, equal ones in row order.
        protocol: revisited, or classic.
        ks: the k of mp@k and mr@k.
        present: as in `evaluate_vectors`; `order` numbers the vectors that are there.
        threads: None: one for each core.
        progress: called with the number of rows of each product.

    Raises:
        MetricError: as `evaluate_vectors`; and if the order is of another type or shape, names a row that
            does not exist, or a row twice.
    """
    truth, shards = GroundTruth.of(ground_truth, protocol), _shards(database)
    total = sum(map(len, shards))
    wanted, there = _present(truth, present, total)
    spans = wanted.spans
    order = np.asarray(order)
    if order.ndim != 2 or order.dtype.kind not in "iu" or len(order) != len(spans):
        raise MetricError(
            f"an order is whole numbers [{len(spans)}, m], got {order.dtype} {list(order.shape)}",
            where="order",
        )
    first = [_checked_ranking(row, query, total, "order") for query, row in enumerate(order)]
    listed = [wanted.rows[start:stop] for start, stop in spans]
    both = Wanted.of(np.concatenate(pair) for pair in zip(listed, first, strict=True))
    by_similarity = ranked_positions(queries, shards, both, threads=threads, progress=progress)
    found = np.empty(len(wanted.rows), np.int64)
    for query, (start, stop) in enumerate(both.spans):
        found[slice(*spans[query])] = _after(
            first[query], listed[query], both.rows[start:stop], by_similarity[start:stop]
        )
    positions = np.full(len(there), MISSING, np.int64)
    positions[there] = found
    described = f"{_by_similarity(total)}, after the first {counted(order.shape[1], 'row')}, reranked"
    return report_of(truth, positions, ks=ks, ranking=described)


def _present(truth: GroundTruth, present: Ints | None, total: int) -> tuple[Wanted, npt.NDArray[np.bool_]]:
    """The listed rows that are there, in the numbers of the vectors; and which of all listed rows they are.

    Raises:
        MetricError: if a listed row does not exist, or `present` does not ascend or is not one row a vector.
    """
    if present is None:
        truth.check_rows(total)
        return truth.wanted, np.ones(len(truth.wanted.rows), np.bool_)
    present = np.asarray(present, np.int64)
    if len(present) != total or (np.diff(present) <= 0).any():
        raise MetricError(f"one row for each of {total:,} vectors is needed, ascending", where="present")
    there = np.isin(truth.wanted.rows, present)
    spans = [slice(start, stop) for start, stop in truth.wanted.spans]
    rows = [np.searchsorted(present, truth.wanted.rows[span][there[span]]) for span in spans]
    return Wanted.of(rows), there


def _after(first: Ints, listed: Ints, rows: Ints, positions: Ints) -> Ints:
    """Positions of listed rows where some rows are put before all others.

    Args:
        first: those rows, in their order.
        listed: ascending.
        rows: both, ascending, each once.
        positions: of `rows`, before.
    """
    taken = np.sort(positions[np.searchsorted(rows, first)])
    moved = positions - np.searchsorted(taken, positions) + len(first)
    moved[np.searchsorted(rows, first)] = np.arange(len(first))
    return moved[np.searchsorted(rows, listed)]


def _shards(database: Vectors | Sequence[Vectors]) -> list[Vectors]:
    return [database] if isinstance(database, np.ndarray) else list(database)


def _by_similarity(rows: int) -> str:
    return f"rows by inner product, equal ones in row order, {rows:,} in all"


def _checked_ranking(ranking: npt.NDArray[Any], query: int, rows: int | None, where: str) -> Ints:
    """The rows of a ranking, without what is none.

    Raises:
        MetricError: if a row does not exist or comes twice.
    """
    ranking = ranking[ranking != -1].astype(np.int64)
    ascending = np.sort(ranking)
    if len(ascending) and (ascending[0] < 0 or (rows is not None and ascending[-1] >= rows)):
        wrong = ascending[0] if ascending[0] < 0 else ascending[-1]
        raise MetricError(
            f"query {query:,} is given row {wrong:,}",
            where=where,
            mend="rows are numbered from 0" + ("" if rows is None else f" to {rows - 1:,}") + ", -1 for none",
        )
    twice = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(twice):
        raise MetricError(f"query {query:,} is given row {twice[0]:,} twice", where=where)
    return ranking


def report_of(truth: GroundTruth, positions: Ints, *, ks: Sequence[int], ranking: str) -> Report:
    """The metrics of each protocol.

    Args:
        truth: the ground truth.
        positions: int64 [w], of the listed rows in their query's ranking, from 0, nothing being ignored yet;
            `MISSING` where it is not known.
        ks: the k of mp@k and mr@k, each at least 1.
        ranking: how rows are ranked, in words, for the policies.

    Raises:
        MetricError: if a k is less than 1, or no query has a positive under one of the protocols.
    """
    wrong = [k for k in ks if k < 1]
    if wrong:
        raise MetricError(f"mp@k and mr@k need k of at least 1, got {wrong[0]}")
    names = LISTS[truth.protocol]
    return {
        protocol: _protocol_report(
            truth,
            np.isin(truth.lists, [names.index(name) for name in positive]),
            positions,
            ks,
            protocol,
            ranking,
        )
        for protocol, positive in POSITIVE[truth.protocol].items()
    }


def _protocol_report(
    truth: GroundTruth,
    positive: npt.NDArray[np.bool_],
    positions: Ints,
    ks: Sequence[int],
    protocol: str,
    ranking: str,
) -> dict[str, Metric]:
    queries = counted(len(truth.wanted.spans), "query")
    average, precision, recall = [], [], []
    cuts = np.array(ks, np.int64)
    for start, stop in truth.wanted.spans:
        wanted, of_query = positive[start:stop], positions[start:stop]
        if not wanted.any():
            continue
        left = _without_ignored(of_query[wanted], of_query[~wanted])
        found = left[left != MISSING]
        average.append(trapezoidal_average_precision(found, len(left)))
        # A positive that was not found is behind the end, and does not lower the divisor.
        divisors = np.minimum(cuts, left[-1] + 1 if len(found) == len(left) else MISSING)
        precision.append(np.searchsorted(found, divisors) / divisors)
        recall.append(np.searchsorted(found, cuts) / len(left))
    if not average:
        raise MetricError(
            f"none of {queries} has a positive under the protocol {protocol}",
            where="ground_truth",
        )
    lists = LISTS[truth.protocol]
    right = " and ".join(POSITIVE[truth.protocol][protocol])
    ignored = " and ".join(name for name in lists if name not in POSITIVE[truth.protocol][protocol])
    means = (
        f"mean over the {len(average):,} of {queries} that have a positive; "
        f"positive: {right}; removed from the ranking: {ignored}; {ranking}"
    )

    def mean(name: str, values: Sequence[float], policy: str) -> Metric:
        # The exact sum, rounded once: the order of the queries does not matter.
        return Metric(f"{name}/{protocol}", math.fsum(values) / len(values), f"{policy}: {means}")

    report = {
        "map": mean(
            "map", average, "average precision by trapezoids, divided by all R positives, missing ones 0"
        )
    }
    for place, k in enumerate(ks):
        last = f"min({k}, position of the last positive)"
        report[f"mp@{k}"] = mean(
            f"mp@{k}",
            [float(values[place]) for values in precision],
            f"positives among the first {last}, divided by that number",
        )
        report[f"mr@{k}"] = mean(
            f"mr@{k}",
            [float(values[place]) for values in recall],
            f"positives among the first {k}, divided by all R positives",
        )
    return report


def _without_ignored(positive: Ints, ignored: Ints) -> Ints:
    """Positions of the positives, ascending, where ignored rows are taken out; missing ones stay missing."""
    positive = np.sort(positive)
    moved = positive - np.searchsorted(np.sort(ignored), positive)
    return np.where(positive == MISSING, MISSING, moved)


def trapezoidal_average_precision(positions: Ints, positives: int) -> float:
    """Area under the precision-recall curve of one query, by trapezoids.

    Args:
        positions: int64 [p], ascending positions from 0 of the positives that were found, without
            ignored rows.
        positives: number of positives; those not found count 0.

    Raises:
        MetricError: if there are fewer positives than 1 or p.

    Reference: Philbin et al. 2007, compute_ap.
    """
    if positives < max(1, len(positions)):
        raise MetricError(f"{len(positions)} positives found of {positives}")
    before = np.arange(len(positions))
    # Where the first row is a positive, precision is 1 before it.
    left = np.where(positions == 0, 1.0, before / np.maximum(positions, 1))
    return math.fsum(((left + (before + 1) / (positions + 1)) / 2).tolist()) / positives
