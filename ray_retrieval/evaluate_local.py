"""An index of local features against the benchmark's protocol: its search, and after re-ranking."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.descriptors import Local
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.evaluation import (
    Rows,
    depth_of,
    features_of,
    ignored_rows,
    in_order,
    labels_of,
    named_reranked,
    notes_on_missing,
    own_rows,
    plain,
    ranking_depth,
    rows_in,
)
from ray_retrieval.metrics import rankings as by_rankings
from ray_retrieval.metrics import revisited
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.search import Index
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.rerank import RerankConfigs, build_all, rankings

_AT_ONCE = 16
"""Queries that are searched for together: bounds the memory of their features' neighbours."""


def of_local(
    queries: Embeddings,
    database: Embeddings,
    index: Index,
    steps: RerankConfigs,
    at: Sequence[int],
    benchmark: Benchmark,
    threads: int,
    progress: Callable[[int], None] | None,
    features: Embeddings | None = None,
) -> dict[str, Any]:
    """The metrics of one model as plain values; see `evaluate.evaluate`.

    Args:
        queries: of the test queries.
        database: of the database.
        index: of `database`.
        steps: of re-ranking, measured beside the index's own search.
        at: cut-offs.
        benchmark: whose protocol it is.
        threads: processor threads.
        progress: called with the number of queries done; see `evaluate.evaluate`.
        features: of the queries, for steps that verify by another index.

    Raises:
        ArtefactError: if the index is of other embeddings.
        DataError: if there are neither labels nor a ground truth, or the gallery is drawn several times.
    """
    if index.manifest.embeddings != database.fingerprint:
        raise ArtefactError(
            "the index was built from other embeddings", where=index.folder, mend="build it again"
        )
    if benchmark.gallery_draws:
        raise DataError(
            f"the gallery of {benchmark.name} is drawn several times, which needs one index a draw",
            where=queries.folder,
            mend="take a method that makes vectors",
        )
    truth = None if benchmark.ground_truth is None else _Truth.of(queries, database, benchmark)
    ignored = _ignored(queries, database, benchmark, truth)
    local = None if features is None else features_of(queries, features)
    before, after = _rankings(queries, index, steps, ignored, at, local, threads, progress)

    def measured(orders: Mapping[str, Rows]) -> list[Metric]:
        if truth is None:
            return _by_labels(orders, queries, database, at, benchmark)
        return _by_ground_truth(orders, truth, at, benchmark)

    metrics = measured(dict.fromkeys(ignored, before))
    if steps:
        metrics += named_reranked(measured(after), steps)
    notes = [] if truth is None else notes_on_missing(benchmark, truth.asked, truth.lists, truth.present)
    return plain(metrics, notes)


@dataclass(frozen=True)
class _Truth:
    """The ground truth of the queries that have descriptors.

    Attributes:
        asked: int64, their rows among the benchmark's queries.
        present: int64, the rows of the benchmark's database that have descriptors: one a row of the index.
        lists: of each query.
    """

    asked: Rows
    present: Rows
    lists: list[Mapping[str, Rows]]

    @staticmethod
    def of(queries: Embeddings, database: Embeddings, benchmark: Benchmark) -> "_Truth":
        assert benchmark.ground_truth is not None
        asked = rows_in(queries, benchmark.queries)
        lists = [benchmark.ground_truth[row] for row in asked.tolist()]
        return _Truth(asked, rows_in(database, benchmark.database), lists)


def _ignored(
    queries: Embeddings, database: Embeddings, benchmark: Benchmark, truth: _Truth | None = None
) -> dict[str, list[Rows]]:
    """By protocol, for each query the rows of the index that do not count; one protocol without a truth."""
    if truth is not None:
        assert benchmark.protocol is not None
        return ignored_rows(truth.lists, benchmark.protocol, truth.present)
    if benchmark.queries_in_database:
        return {"labels": own_rows(queries.ids, database.ids)}
    return {"labels": [np.zeros(0, np.int64)] * queries.rows}


def _rankings(
    queries: Embeddings,
    index: Index,
    steps: RerankConfigs,
    ignored: Mapping[str, list[Rows]],
    at: Sequence[int],
    features: Local | None,
    threads: int,
    progress: Callable[[int], None] | None,
) -> tuple[Rows, dict[str, Rows]]:
    """Rows of the index for each query, int64 [queries, m]: as found, and by protocol after the steps.

    What is not among them is never found.

    Args:
        queries: of the test.
        index: that is searched.
        steps: of re-ranking; there may be none.
        ignored: by protocol, for each query the rows that do not count.
        at: cut-offs, which the rankings reach.
        features: of the queries, for steps that verify by another index.
        threads: processor threads.
        progress: called with the number of queries done.
    """
    given = queries.descriptors
    assert isinstance(given, Local)
    built = build_all(steps, index, threads=threads) if steps else []
    looked_at = (depth_of(step, ignored.values()) for step in built)
    depth = ranking_depth(index.rows, len(given), *at, *looked_at)
    before: list[Rows] = []
    after: dict[str, list[Rows]] = {name: [] for name in ignored}
    for start in range(0, len(given), _AT_ONCE):
        part = np.arange(start, min(start + _AT_ONCE, len(given)))
        some = given.take(part)
        hits = index.search(some, depth)
        before.append(hits.rows)
        if built:
            left_out = [rows[start : start + _AT_ONCE] for rows in ignored.values()]
            local = None if features is None else features.take(part)
            made = rankings(built, some, hits, left_out, features=local)
            for name, found in zip(ignored, made, strict=True):
                after[name].append(found.rows)
        if progress is not None:
            progress(len(some) * (4 if built else 1))
    return np.concatenate(before), {name: np.concatenate(rows) for name, rows in after.items() if rows}


def _by_labels(
    orders: Mapping[str, Rows],
    queries: Embeddings,
    database: Embeddings,
    at: Sequence[int],
    benchmark: Benchmark,
) -> list[Metric]:
    labels, rows = labels_of(queries), labels_of(database)
    ids = (queries.ids, database.ids) if benchmark.queries_in_database else (None, None)
    (order,) = orders.values()
    return list(by_rankings.evaluate(order, labels, rows, at, *ids).values())


def _by_ground_truth(
    orders: Mapping[str, Rows], truth: _Truth, at: Sequence[int], benchmark: Benchmark
) -> list[Metric]:
    assert benchmark.protocol is not None
    report = {}
    for name, order in orders.items():
        # Rows of the benchmark, whose ground truth counts images that could not be decoded, too.
        named = np.where(order == NO_ROW, NO_ROW, truth.present[order])
        rows = len(benchmark.database)
        report[name] = revisited.evaluate(named.T, truth.lists, benchmark.protocol, at, rows=rows)[name]
    return in_order(report)
