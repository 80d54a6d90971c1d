"""Embeddings against the benchmark's protocol."""

import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.descriptors import Codes, DescriptorKind, Local, Vectors
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.evaluate_local import of_local
from ray_retrieval.evaluation import (
    Rows,
    Side,
    check_features,
    depth_of,
    features_of,
    ignored_rows,
    in_order,
    named_reranked,
    notes_on_missing,
    own_rows,
    plain,
    ranking_depth,
    rows_in,
    side,
)
from ray_retrieval.metrics import hamming, retrieval, revisited
from ray_retrieval.search import Index
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.rerank import (
    DatabaseAugmentationConfig,
    GeometricVerificationConfig,
    HeldVectors,
    QueryExpansionConfig,
    RerankConfigs,
    build_all,
    rankings,
)

_AT = (1, 10, 100, 1000)
_RERANKED = 4096
"""Queries that are re-ranked at a time: bounds the memory of their hits."""


class EvaluateConfig(Config):
    """What is measured."""

    k: int | None = Field(default=None, ge=1)
    """Cut-off of the MAP of codes; unset: the benchmark's own."""
    at: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Numbers of hits at which precision and recall of codes, recall@k of vectors, and mp@k and mr@k of
    benchmarks with a ground truth are measured; unset: the benchmark's own, else 1, 10, 100, 1000."""
    radius: int = Field(default=2, ge=0)
    """Hamming radius of the precision within a ball."""
    both: bool = True
    """Measure the last model as well as the best one, where they differ."""
    rerank: RerankConfigs = ()
    """Steps of re-ranking for vectors and local features, measured beside the plain search:
    `[{name: k_reciprocal}]`."""


def evaluate(
    queries: Embeddings,
    database: Embeddings,
    config: EvaluateConfig,
    benchmark: Benchmark,
    *,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
    index: Index | None = None,
    features: Embeddings | None = None,
) -> dict[str, Any]:
    """The metrics of one model as plain values.

    Codes are measured as deep hashing does (`metrics.hamming`), vectors as metric learning does
    (`metrics.retrieval`), where a query that is in the database does not count for itself. Where the
    benchmark draws its gallery several times, each metric is its mean over the draws. Where it has a ground
    truth, that is what vectors are measured by (`metrics.revisited`): images of the database without a
    vector are never found, and queries without one do not count. Local features are measured by the rankings
    of their index, which end where no image has anything in common with the query.

    Geometric verification takes the first hits of those that count: what a protocol ignores, and the query
    itself, is left out before. It gives a ranking for each protocol then, by which that one is measured.

    Args:
        queries: of the test queries.
        database: of the database, made by the same model; the same as `queries` where these are the database.
        config: what to measure.
        benchmark: whose protocol it is: cut-offs, draws of the gallery.
        threads: processor threads.
        progress: called with the number of queries done, of each draw anew. Where results are re-ranked,
            each query counts four times: when it is measured, as the steps are prepared, when it is
            re-ranked, and when that is measured.
        index: of the database; local features need it.
        features: of the queries, local ones, for steps that verify by another index, made by its model.

    Returns:
        {"test": [{"name", "value", "policy"}, …], "pr_curve": {"radius", "recall", "precision"} or None where
        there is none, "notes"}.

    Raises:
        ArtefactError: if the two were made by different models, or of other images than the benchmark's, or
            the features by another than that of the index by which hits are verified.
        DataError: if one of them has no labels, or codes are to be measured by a ground truth.
    """
    if queries.model != database.model:
        raise ArtefactError(
            f"queries were encoded by model {queries.model}, the database by {database.model}",
            mend="encode both with the same model",
        )
    check_features(config.rerank, features)
    if queries.form.kind is DescriptorKind.LOCAL:
        assert index is not None, "local features are measured by their index"
        at = config.at or benchmark.ks or _AT
        return of_local(queries, database, index, config.rerank, at, benchmark, threads, progress, features)
    if benchmark.ground_truth is not None:
        local = None if features is None else features_of(queries, features)
        return _by_ground_truth(queries, database, config, benchmark, threads, progress, local)
    asked = side(queries, features)
    found = asked if queries.folder.uri == database.folder.uri else side(database)
    if benchmark.gallery_draws:
        return _over_draws(found, config, benchmark, threads, progress)
    return _measure(asked, found, config, benchmark, threads, progress)


def _measure(
    queries: Side,
    database: Side,
    config: EvaluateConfig,
    benchmark: Benchmark,
    threads: int,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    at = config.at or benchmark.ks or _AT
    if isinstance(queries.descriptors, Codes):
        return _of_codes(queries, database, config, benchmark.k, at, threads, progress)
    assert isinstance(queries.descriptors, Vectors)
    assert isinstance(database.descriptors, Vectors)
    itself = queries is database
    # Two folders may call different images the same: ids tell only where queries are rows of the database.
    told_by_ids = not itself and benchmark.queries_in_database
    asked: dict[str, Any] = {
        "queries": queries.descriptors.data,
        "query_labels": queries.labels,
        "database": None if itself else database.descriptors.data,
        "database_labels": None if itself else database.labels,
        "ks": at,
        "query_ids": queries.ids if told_by_ids else None,
        "database_ids": database.ids if told_by_ids else None,
        "threads": threads,
    }
    metrics = list(retrieval.evaluate(**asked, progress=progress).values())
    if config.rerank:
        own = [np.zeros(0, np.int64)] * len(queries)
        if itself:
            own = list(np.arange(len(queries))[:, None])
        elif told_by_ids:
            own = own_rows(queries.ids.tolist(), database.ids.tolist())
        rows = np.array([row[0] if len(row) else NO_ROW for row in own], np.int64)
        (order,) = _reranked(queries, database, rows, [own], config, max(at), threads, progress)
        again = retrieval.evaluate_reranked(**asked, order=order, progress=progress)
        metrics += named_reranked(again.values(), config.rerank, itself=itself)
    return plain(metrics, [])


def _by_ground_truth(
    queries: Embeddings,
    database: Embeddings,
    config: EvaluateConfig,
    benchmark: Benchmark,
    threads: int,
    progress: Callable[[int], None] | None,
    features: Local | None,
) -> dict[str, Any]:
    assert benchmark.ground_truth is not None
    assert benchmark.protocol is not None
    asked, found = queries.descriptors, database.descriptors
    if not isinstance(asked, Vectors) or not isinstance(found, Vectors):
        raise DataError(
            f"{benchmark.name} is measured with vectors, these are codes",
            where=queries.folder,
            mend="take a method that makes vectors, such as gem",
        )
    query_rows, present = rows_in(queries, benchmark.queries), rows_in(database, benchmark.database)
    lists = [benchmark.ground_truth[row] for row in query_rows.tolist()]
    at = config.at or benchmark.ks or _AT
    measured: dict[str, Any] = {
        "queries": asked.data,
        "database": found.data,
        "ground_truth": lists,
        "protocol": benchmark.protocol,
        "ks": at,
        "present": present,
        "threads": threads,
    }
    counts = len(asked), len(found)
    metrics = in_order(revisited.evaluate_vectors(**measured, progress=_in_queries(progress, *counts)))
    if config.rerank:
        # A query is a part of a photograph: it is no row of the database, even where the whole is one.
        own = np.full(len(asked), NO_ROW)
        sides = [
            Side(some, np.zeros(len(some), np.int64), np.array(given.ids, np.str_), local)
            for some, given, local in ((asked, queries, features), (found, database, None))
        ]
        ignored = ignored_rows(lists, benchmark.protocol, present)
        if not any(isinstance(step, GeometricVerificationConfig) for step in config.rerank):
            ignored = {"": [np.zeros(0, np.int64)] * len(asked)}  # one ranking for all protocols
        orders = _reranked(
            sides[0], sides[1], own, list(ignored.values()), config, max(at), threads, progress
        )
        tick = _in_queries(progress, counts[0], counts[1] * len(orders))
        again: revisited.Report = {}
        for protocol, order in zip(ignored, orders, strict=True):
            report = revisited.evaluate_reranked(**measured, order=order, progress=tick)
            again |= {protocol: report[protocol]} if protocol else report
        metrics += named_reranked(in_order(again), config.rerank)
    notes = notes_on_missing(benchmark, query_rows, lists, present)
    return plain(metrics, notes)


def _in_queries(
    progress: Callable[[int], None] | None, queries: int, rows: int
) -> Callable[[int], None] | None:
    """A function that takes numbers of rows, of `rows` in all, and tells `progress` that share of queries."""
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if progress is not None:
            progress(queries * done // rows - queries * before // rows)

    return None if progress is None else tick


def _reranked(
    queries: Side,
    database: Side,
    own: Rows,
    ignored: Sequence[Sequence[Rows]],
    config: EvaluateConfig,
    at: int,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> list[npt.NDArray[np.int32]]:
    """The first rows of each query's ranking after all steps, for each protocol; others follow by similarity.

    Each is int32 [queries, as deep as the steps look]; `NO_ROW` instead of rows that were left out.

    Args:
        queries: of the test.
        database: what they search.
        own: which row of the database each query is, or `NO_ROW`.
        ignored: for each protocol and query the rows that are left out before geometric verification.
        config: the steps.
        at: the largest cut-off that is measured.
        threads: processor threads.
        progress: called with the number of queries done; each counts twice, the first time as its share of
            the rows that the steps have prepared.
    """
    assert isinstance(queries.descriptors, Vectors)
    assert isinstance(database.descriptors, Vectors)
    held, count = HeldVectors(database.descriptors.data, threads=threads), len(queries)
    prepared = shared = 0

    def prepare(rows: int) -> None:
        nonlocal prepared, shared
        prepared += rows
        before, shared = shared, count * prepared // (len(config.rerank) * len(held))
        if progress is not None:
            progress(shared - before)

    steps = build_all(config.rerank, held, ids=database.ids.tolist(), threads=threads, progress=prepare)
    if progress is not None:
        progress(count - shared)  # of steps that prepare nothing
    # What searches anew has an order of its own behind any depth, and reads no vectors of the hits there.
    anew = all(isinstance(step, QueryExpansionConfig | DatabaseAugmentationConfig) for step in config.rerank)
    depth = ranking_depth(len(held), count, at, *(depth_of(step, ignored) for step in steps), longer=anew)
    orders = [np.full((count, depth), NO_ROW, np.int32) for _ in ignored]
    # Queries do not depend on each other, but for a step that looks at all of them together.
    block = count if any(step.joint for step in steps) else _RERANKED
    for start in range(0, count, block):
        some = np.arange(start, min(start + block, count))
        part = queries.descriptors.take(some)
        local = None if queries.features is None else queries.features.take(some)
        left_out = [rows[start : start + block] for rows in ignored]
        made = rankings(steps, part, held.search(part, depth), left_out, own[some], local)
        for order, hits in zip(orders, made, strict=True):
            order[some] = hits.rows
        if progress is not None:
            progress(len(part))
    return orders


def _of_codes(
    queries: Side,
    database: Side,
    config: EvaluateConfig,
    k: int | None,
    at: tuple[int, ...],
    threads: int,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    assert isinstance(queries.descriptors, Codes)
    assert isinstance(database.descriptors, Codes)
    report = hamming.evaluate(
        queries.descriptors.data,
        queries.labels,
        database.descriptors.data,
        database.labels,
        bits=queries.descriptors.bits,
        k=config.k or k,
        at=at,
        radius=config.radius,
        threads=threads,
        progress=progress,
    )
    curve = report.pr_curve
    return {
        "test": [
            {"name": metric.name, "value": metric.value, "policy": metric.policy} for metric in report.metrics
        ],
        "pr_curve": {
            "radius": curve.radius.tolist(),
            "recall": curve.recall.tolist(),
            "precision": curve.precision.tolist(),
        },
        "notes": _notes(report),
    }


def _over_draws(
    images: Side,
    config: EvaluateConfig,
    benchmark: Benchmark,
    threads: int,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Means over the benchmark's draws of the gallery; every image that is not drawn is a query."""
    place = {identifier: row for row, identifier in enumerate(images.ids.tolist())}
    drawn = []
    for gallery in benchmark.gallery_draws:
        # An image that could not be decoded has no row.
        ids = [benchmark.database.ids[row] for row in gallery]
        rows = np.array(sorted(place[name] for name in ids if name in place), np.int64)
        rest = np.setdiff1d(np.arange(len(images)), rows)
        drawn.append(_measure(images.take(rest), images.take(rows), config, benchmark, threads, progress))
    count = len(drawn)
    metrics = []
    for number, metric in enumerate(drawn[0]["test"]):
        values = [one["test"][number]["value"] for one in drawn]
        deviation = statistics.stdev(values) if count > 1 else 0.0
        policy = (
            f"{metric['policy']}; mean over {count} draws of the gallery, their deviation {deviation:.4f}"
        )
        metrics.append({"name": metric["name"], "value": statistics.fmean(values), "policy": policy})
    return {"test": metrics, "pr_curve": None, "notes": drawn[0]["notes"]}


def _notes(report: hamming.HammingReport) -> list[str]:
    notes = []
    if report.ties_matter:
        notes.append(
            f"the order in which the database is stored moves the MAP by {100 * report.tie_gap:+.2f} points"
            " from its expectation over ties: quote the expected one"
        )
    if report.queries_without_relevant:
        notes.append(f"{report.queries_without_relevant} queries have no relevant image in the database")
    return notes
