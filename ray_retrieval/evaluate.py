"""Embeddings against the benchmark's protocol."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.metrics import hamming
from ray_retrieval.search.embeddings import Embeddings


class EvaluateConfig(Config):
    """What is measured."""

    k: int | None = Field(default=None, ge=1)
    """Cut-off of the MAP; unset: the benchmark's own."""
    at: tuple[Annotated[int, Field(ge=1)], ...] = (1, 10, 100, 1000)
    """Numbers of hits at which precision and recall are measured."""
    radius: int = Field(default=2, ge=0)
    """Hamming radius of the precision within a ball."""
    both: bool = True
    """Measure the last model as well as the best one, where they differ."""


def evaluate(
    queries: Embeddings,
    database: Embeddings,
    config: EvaluateConfig,
    *,
    k: int | None = None,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The metrics of one model as plain values.

    Args:
        queries: of the test queries.
        database: of the database, made by the same model.
        config: what to measure.
        k: the benchmark's cut-off of the MAP; None: the whole database.
        threads: processor threads.
        progress: called with the number of queries done.

    Returns:
        {"test": [{"name", "value", "policy"}, …], "pr_curve": {"radius", "recall", "precision"}, "notes"}.

    Raises:
        ArtefactError: if the two were made by different models.
        DataError: if one of them has no labels.
    """
    if queries.model != database.model:
        raise ArtefactError(
            f"queries were encoded by model {queries.model}, the database by {database.model}",
            mend="encode both with the same model",
        )
    query_labels, database_labels = queries.labels, database.labels
    if query_labels is None or database_labels is None:
        raise DataError("evaluation needs labels of queries and database")
    report = hamming.evaluate(
        queries.codes.data,
        query_labels,
        database.codes.data,
        database_labels,
        bits=queries.bits,
        k=config.k or k,
        at=config.at,
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
