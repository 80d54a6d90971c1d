"""What the 8 bits of an export cost: by the metric of the field, and in how near its answers are."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ray_retrieval.data.mixed import MixedImages, groups_of
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.descriptors import Codes, Descriptors, Local, Vectors, assembled
from ray_retrieval.engines import Exported, parity
from ray_retrieval.engines.graphs import CodeGraph, Engine, Graph
from ray_retrieval.methods.base import Method
from ray_retrieval.metrics import hamming, retrieval
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.search.neighbours import FeatureSegment
from ray_retrieval.search.votes import LocalSearchConfig, search_votes

LEAST_MEASURED = 10
"""Images with labels that a loss is measured on, at least."""
ENOUGH = 100
"""Images from which those that were calibrated on are left out."""
_MEASURED_IMAGES = 1000
_QUERIES = 5
"""One of so many images asks for the others."""
_BATCH = 16


def agreement(one: Engine, other: Engine, graph: Graph, samples: parity.Samples) -> float:
    """How near the answers of two files of a graph are: 1 where they are equal.

    Of codes the share of equal bits, one half by chance; of vectors and of local features at one scale the
    mean cosine. NaN where a value is none.

    Args:
        one: runs the first file.
        other: runs the second.
        graph: of both.
        samples: at least one image, as the graph takes it.
    """
    found: list[float] = []
    for image in samples.images:
        first, second = one(np.asarray(image)[None]), other(np.asarray(image)[None])
        if isinstance(graph, CodeGraph):
            found.append(1 - float(np.unpackbits(np.bitwise_xor(first[0], second[0])).sum()) / first[1].size)
            if not np.isfinite(second[1]).all():
                return float("nan")
        else:
            found.append(float((first[0].astype(np.float64) * second[0]).sum(axis=-1).mean()))
    return float(np.mean(found))


def measured_rows(images: ImageTable, calibrated: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """At most 1,000 rows with a label, several of a class; none calibrated on if 100 others are left.

    Args:
        images: to measure on.
        calibrated: int64 [m], rows of them that the ranges of the file come from.

    Returns:
        int64 [k], ascending; empty where no image has a label.
    """
    labelled = labelled_rows(images)
    others = np.setdiff1d(labelled, calibrated)
    rows = others if len(others) >= ENOUGH else labelled
    if len(rows) == 0:
        return rows
    labels = images.take(rows).labels
    if labels.ndim > 1:
        return rows[parity.spread(len(rows), _MEASURED_IMAGES)]
    order = np.argsort(labels, kind="stable")
    classes = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    classes = [places for places in classes if len(places) > 1] or [order]
    each = min(max(_QUERIES, _MEASURED_IMAGES // len(classes)), max(map(len, classes)))
    chosen = [classes[number] for number in parity.spread(len(classes), _MEASURED_IMAGES // each)]
    return np.sort(np.concatenate([rows[places[parity.spread(len(places), each)]] for places in chosen]))


def labelled_rows(images: ImageTable) -> npt.NDArray[np.int64]:
    """int64 [m], ascending: the rows that have a label."""
    if not images.has_labels:
        return np.zeros(0, np.int64)
    return np.setdiff1d(np.arange(len(images)), images.unlabelled)


def measure(
    method: Method, exported: Exported, images: ImageTable, calibrated: npt.NDArray[np.int64]
) -> dict[str, Any] | None:
    """The field's metric by the model and by the file, as `quantise.Int8` has it.

    Args:
        method: the model, in evaluation mode, on the processor.
        exported: the file.
        images: to measure on.
        calibrated: int64 [m], rows of them that the ranges of the file come from.

    Returns:
        None where fewer than `LEAST_MEASURED` images have a label and can be decoded, or no two of those
        that were chosen share one.
    """
    chosen = measured_rows(images, calibrated)
    parts: list[tuple[npt.NDArray[np.int64], Descriptors, Descriptors]] = []
    kept: list[int] = []
    for rows, batch in _batches(images, chosen, method.preprocessing):
        for places, some in groups_of(batch):
            with torch.inference_mode():
                pair = method.describe(some), exported.describe(some)
            parts.append((len(kept) + places, *pair))
        kept += rows
    if len(kept) < LEAST_MEASURED:
        return None
    form = method.config.form
    mine = assembled(form, len(kept), [(places, one) for places, one, _ in parts])
    theirs = assembled(form, len(kept), [(places, other) for places, _, other in parts])
    labels = images.take(np.array(kept, np.int64)).labels
    queries, database = _divided(labels)
    if len(queries) == 0:
        return None

    def metric(asking: Descriptors, asked: Descriptors) -> Metric:
        return field_metric(
            asking.take(queries),
            labels[queries],
            asked.take(database),
            labels[database],
            vectors_by=method.config.vectors_by,
        )

    own, both, alone = metric(mine, mine), metric(theirs, theirs), metric(theirs, mine)
    return {
        "measured_on": f"{len(queries)} queries and a database of {len(database)}, of {len(images)} images "
        f"of {images.name}, {len(np.intersect1d(kept, calibrated))} of them calibrated on",
        "metric": own.name,
        "policy": own.policy,
        "model": own.value,
        "int8": both.value,
        "int8_queries": alone.value,
        "loss": own.value - min(both.value, alone.value),
    }


def _divided(labels: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the queries, each of which has an image of its labels to find, and of the database."""
    order = np.argsort(labels, kind="stable") if labels.ndim == 1 else np.arange(len(labels))
    asks = np.zeros(len(labels), bool)
    asks[order[::_QUERIES]] = True
    queries, database = np.flatnonzero(asks), np.flatnonzero(~asks)
    finds = [
        _share_a_label(np.broadcast_to(labels[one], labels[database].shape), labels[database]).any()
        for one in queries
    ]
    return queries[np.array(finds, bool)], database


def field_metric(
    queries: Descriptors,
    query_labels: npt.NDArray[Any],
    database: Descriptors,
    database_labels: npt.NDArray[Any],
    *,
    vectors_by: str = "recall@1",
) -> Metric:
    """What the field compares such descriptors by: MAP of codes, recall@1 of local features.

    Args:
        queries: descriptors of n images.
        query_labels: int64 [n], or bool multi-hot [n, classes].
        database: descriptors of m images, of the same form.
        database_labels: as the queries'.
        vectors_by: the key of the metric of vectors, among those of `metrics.retrieval.evaluate` with k = 1.

    Raises:
        MetricError: of vectors, if no query shares a label with an image of the database.
    """
    if isinstance(queries, Codes) and isinstance(database, Codes):
        return hamming.mean_average_precision(
            queries.data, query_labels, database.data, database_labels, ties="expected", bits=queries.bits
        )
    if isinstance(queries, Vectors) and isinstance(database, Vectors):
        found = retrieval.evaluate(queries.data, query_labels, database.data, database_labels, ks=(1,))
        return found[vectors_by]
    assert isinstance(queries, Local)
    assert isinstance(database, Local)
    segment = FeatureSegment(database.offsets, database.data, 0, 0)
    hits = search_votes([segment], queries, 1, LocalSearchConfig(), images=len(database))
    rows = hits.rows[:, 0]
    same = _share_a_label(query_labels, database_labels[np.maximum(rows, 0)]) & (rows >= 0)
    policy = (
        "share of all queries whose image with the most votes of local features, all of them compared and "
        "without geometric verification, has a label of theirs; a query without votes counts 0"
    )
    return Metric("recall@1", float(same.mean()), policy)


def _share_a_label(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether labels [n] or [n, classes] meet row by row: bool [n]."""
    if one.ndim == 1:
        return np.asarray(one == other)
    return np.asarray((one.astype(bool) & other.astype(bool)).any(axis=1))


def _batches(
    images: ImageTable, rows: npt.NDArray[np.int64], preprocessing: Preprocessing
) -> "Iterator[tuple[list[int], torch.Tensor | MixedImages]]":
    """Rows and prepared images; what cannot be decoded is left out."""
    for start in range(0, len(rows), _BATCH):
        found = list(parity.decoded(images, rows[start : start + _BATCH], preprocessing, []))
        if found:
            kept, prepared = [row for row, _ in found], [image for _, image in found]
            square = preprocessing.square
            yield kept, torch.from_numpy(np.stack(prepared)) if square else MixedImages(prepared)
