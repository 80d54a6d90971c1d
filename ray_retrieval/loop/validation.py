"""How a model is watched while it trains; test queries are never used for it."""

from typing import Literal

import numpy as np
from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.data.benchmark import Benchmark, have_relevant, places_in
from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import Codes, DescriptorKind, Descriptors, Vectors
from ray_retrieval.methods.base import Method, Rows
from ray_retrieval.metrics import retrieval
from ray_retrieval.metrics.hamming import mean_average_precision

ValidationMetric = Literal["map", "map@r", "recall@1", "accuracy"]

MEASURED: dict[DescriptorKind, tuple[ValidationMetric, ...]] = {
    DescriptorKind.CODES: ("map",),
    DescriptorKind.VECTORS: ("map", "map@r", "recall@1"),
    DescriptorKind.LOCAL: ("map", "map@r", "recall@1", "accuracy"),
}
"""What is measured on validation queries, by what the method makes of an image. Of local features it is what
`Method.compared` gives, and the accuracy of the validation images whose classes are trained."""


class ValidationConfig(Config):
    """What is measured on the validation queries, and when."""

    every: int | None = Field(default=1, ge=1)
    """Epochs between two measurements; the last step of a training is always measured. Unset: the end of an
    epoch is nothing special."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two measurements, for long epochs."""
    metric: ValidationMetric = "map"
    """What the best model has most of, and what a `plateau` schedule follows: `map`, or of vectors also
    `map@r` or `recall@1`, or of a method that learns from classes `accuracy`. All that the method's kind has
    are measured."""
    k: int | None = Field(default=None, ge=1)
    """Cut-off of the MAP of codes; unset: the benchmark's own."""


def rows_of_accuracy(method: Method, benchmark: Benchmark) -> Rows:
    """Rows of the validation database that the accuracy is measured by: those of trained classes.

    There are none where the method tells no classes, or the validation images are of other classes.
    """
    none = np.zeros(0, np.int64)
    if method.config.form.kind is not DescriptorKind.LOCAL:
        return none
    trained, asked = benchmark.train, benchmark.validation_database
    # Tables of other classes number them from 0 too: it is the list of classes that tells.
    if (trained.classes, trained.class_names) != (asked.classes, asked.class_names) or not len(asked):
        return none
    return np.flatnonzero(np.isin(asked.labels, trained.labels)) if asked.labels.ndim == 1 else none


def notes_on_accuracy(method: Method, benchmark: Benchmark) -> list[str]:
    """Says how many validation images the accuracy leaves out, where it is measured without some."""
    measured, images = len(rows_of_accuracy(method, benchmark)), len(benchmark.validation_database)
    if measured in (0, images):
        return []
    return [
        f"the accuracy leaves out {images - measured:,} of {images:,} validation images: "
        "no training image is of their class"
    ]


def rows_of_queries(queries: ImageTable, database: ImageTable) -> Rows | None:
    """Where each query stands in the database, int64 [queries]; None unless all are there, as they are.

    Ids tell where to look; paths, boxes and the bytes in the tables whether it is the same image.
    """
    if queries is database:
        return np.arange(len(database))
    rows = places_in(queries, database)
    if (rows < 0).any() or database.take(rows).fingerprint != queries.fingerprint:
        return None
    return rows


def has_an_answer(queries: ImageTable, database: ImageTable) -> bool:
    """Whether some query has a relevant image in the database other than itself; so it is without queries."""
    return not len(queries) or bool(have_relevant(queries, database).any())


def measure(
    queries: Descriptors,
    query_table: ImageTable,
    database: Descriptors,
    database_table: ImageTable,
    *,
    k: int | None,
    threads: int,
) -> dict[str, float]:
    """The metrics of `MEASURED`, but for the accuracy, for descriptors of the images of two tables.

    Codes: the MAP of the first `k`, ties by their expectation. Vectors: MAP of the full ranking, MAP@R and
    recall@1, a query itself not counted where it is in the database.
    """
    if isinstance(queries, Codes) and isinstance(database, Codes):
        metric = mean_average_precision(
            queries.data,
            query_table.labels,
            database.data,
            database_table.labels,
            k=k,
            ties="expected",
            bits=queries.bits,
            threads=threads,
        )
        return {"map": metric.value}
    assert isinstance(queries, Vectors)
    assert isinstance(database, Vectors)
    itself = query_table is database_table
    # Some of the database may be the queries: none counts for itself. Another image of the same id does.
    places = None if itself else places_in(query_table, database_table)
    found = retrieval.evaluate(
        queries.data,
        query_table.labels,
        None if itself else database.data,
        None if itself else database_table.labels,
        ks=(1,),
        query_ids=places,
        database_ids=None if itself else np.arange(len(database_table)),
        threads=threads,
    )
    return {name: found[name].value for name in MEASURED[DescriptorKind.VECTORS]}
