"""An index of local features against the benchmark's protocol: its search, and after re-ranking."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.descriptors import Local
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.evaluation import Rows, in_order, named_reranked, notes_on_missing, plain, rows_in
from ray_retrieval.metrics import rankings, revisited
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.search import Index
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.rerank import RerankConfigs, build_all, rerank

_DEPTH = 1000
"""Images of each query's ranking, at the least; what is not among them is never found."""
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
    before, after = _rankings(queries, index, steps, max(_DEPTH, *at), threads, progress)
    measured = _by_ground_truth if benchmark.ground_truth is not None else _by_labels
    metrics, notes = measured(before, queries, database, at, benchmark)
    if after is not None:
        metrics += named_reranked(measured(after, queries, database, at, benchmark)[0], steps)
    return plain(metrics, notes)


def _rankings(
    queries: Embeddings,
    index: Index,
    steps: RerankConfigs,
    depth: int,
    threads: int,
    progress: Callable[[int], None] | None,
) -> tuple[Rows, Rows | None]:
    """Rows of the index for each query, int64 [queries, m]: as it finds them, and after the steps if any."""
    features = queries.descriptors
    assert isinstance(features, Local)
    built = build_all(steps, index, threads=threads) if steps else []
    # One more than is asked for: the query itself may be among them.
    depth = min(index.rows, max([depth, *(step.depth for step in built)]) + 1)
    before, after = [], []
    for start in range(0, len(features), _AT_ONCE):
        some = features.take(np.arange(start, min(start + _AT_ONCE, len(features))))
        hits = index.search(some, depth)
        before.append(hits.rows)
        if built:
            after.append(rerank(built, some, hits).rows)
        if progress is not None:
            progress(len(some) * (4 if built else 1))
    return np.concatenate(before), np.concatenate(after) if after else None


def _by_labels(
    order: Rows, queries: Embeddings, database: Embeddings, at: Sequence[int], benchmark: Benchmark
) -> tuple[list[Metric], list[str]]:
    labels, rows = queries.labels, database.labels
    if labels is None or rows is None:
        raise DataError("evaluation needs labels of queries and database", where=queries.folder)
    ids = (queries.ids, database.ids) if benchmark.queries_in_database else (None, None)
    return list(rankings.evaluate(order, labels, rows, at, *ids).values()), []


def _by_ground_truth(
    order: Rows, queries: Embeddings, database: Embeddings, at: Sequence[int], benchmark: Benchmark
) -> tuple[list[Metric], list[str]]:
    assert benchmark.ground_truth is not None
    assert benchmark.protocol is not None
    asked, present = rows_in(queries, benchmark.queries), rows_in(database, benchmark.database)
    lists = [benchmark.ground_truth[row] for row in asked.tolist()]
    # Rows of the benchmark, whose ground truth counts images that could not be decoded, too.
    named = np.where(order == NO_ROW, NO_ROW, present[order])
    report = revisited.evaluate(named.T, lists, benchmark.protocol, at, rows=len(benchmark.database))
    return in_order(report), notes_on_missing(benchmark, asked, lists, present)
