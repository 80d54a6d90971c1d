"""What evaluations of all kinds of descriptors share: labels, rows of the ground truth, and plain results."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.config import Config
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import Descriptors, Local, assembled
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.metrics import revisited
from ray_retrieval.metrics.ground_truth import LISTS, POSITIVE, Protocol
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.search import Index
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.rerank import (
    GeometricVerification,
    GeometricVerificationConfig,
    KReciprocalConfig,
    Step,
)

Rows = npt.NDArray[np.int64]

_DEPTH = 1000
"""Hits of each query's ranking, at the least."""
_PLACES = 1 << 22
"""Hits of all queries together, up to which rankings are longer: those of Oxford and Paris are whole."""


@dataclass(frozen=True)
class Side:
    """Queries or database: descriptors, their labels, the ids of their images, and local features beside."""

    descriptors: Descriptors
    labels: npt.NDArray[Any]
    ids: npt.NDArray[np.str_]
    features: Local | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Rows) -> "Side":
        """Some of the rows, in the order asked."""
        features = None if self.features is None else self.features.take(rows)
        return Side(self.descriptors.take(rows), self.labels[rows], self.ids[rows], features)


def side(embeddings: Embeddings, features: Embeddings | None = None) -> Side:
    """Those of an embeddings directory, and the local features of the same images in another.

    Raises:
        DataError: if an image has no label.
    """
    local = None if features is None else features_of(embeddings, features)
    return Side(embeddings.descriptors, labels_of(embeddings), np.array(embeddings.ids, np.str_), local)


def labels_of(embeddings: Embeddings) -> npt.NDArray[Any]:
    """int64 [n] class numbers, or bool [n, classes] for images of several.

    Raises:
        DataError: if an image has no label.
    """
    labels = embeddings.labels
    if labels is None:
        raise DataError(
            "evaluation needs a label of every image",
            where=embeddings.folder,
            mend="give images with labels, and encode them again",
        )
    return labels


def features_of(embeddings: Embeddings, features: Embeddings) -> Local:
    """The local features of the images of an embeddings directory; none of those that are not there."""
    given = features.descriptors
    assert isinstance(given, Local)
    places = {name: row for row, name in enumerate(embeddings.ids)}
    both = [(places[name], row) for row, name in enumerate(features.ids) if name in places]
    rows = np.array(both, np.int64).reshape(-1, 2)
    found = assembled(features.form, embeddings.rows, [(rows[:, 0], given.take(rows[:, 1]))])
    assert isinstance(found, Local)
    return found


def check_features(steps: Iterable[Config], features: Embeddings | None) -> None:
    """Raise ArtefactError where steps verify by an index of another model than the queries' features."""
    for step in steps:
        if not isinstance(step, GeometricVerificationConfig) or step.local is None:
            continue
        made_by = Index.open(step.local).model
        if features is None or features.model != made_by:
            found = "there are none" if features is None else f"those given are of {features.model}"
            raise ArtefactError(
                f"the index is of model {made_by}; of the queries' local features {found}",
                where=step.local,
                mend="encode the queries with the model that made the index",
            )


def ignored_rows(
    lists: Sequence[Mapping[str, Rows]], protocol: Protocol, present: Rows
) -> dict[str, list[Rows]]:
    """By protocol, for each query the rows that are removed from its ranking: int64 [m].

    Args:
        lists: of the ground truth, one mapping a query.
        protocol: which lists there are.
        present: int64 [n], ascending: the row in the ground truth's numbers of each row that is there.
    """
    found = {}
    for name, positive in POSITIVE[protocol].items():
        others = [key for key in LISTS[protocol] if key not in positive]
        found[name] = [
            _places(present, np.concatenate([np.asarray(one[key], np.int64) for key in others]))
            for one in lists
        ]
    return found


def _places(present: Rows, rows: Rows) -> Rows:
    """Where some rows are in an ascending list; those that are not there are left out."""
    places = np.searchsorted(present, rows)
    there = places < len(present)
    there[there] = present[places[there]] == rows[there]
    return places[there]


def depth_of(step: Step, ignored: Iterable[Sequence[Rows]]) -> int:
    """How many hits of a search a step makes use of, where a protocol ignores some before it verifies."""
    most = max((len(rows) for of_protocol in ignored for rows in of_protocol), default=0)
    return step.depth + (most if isinstance(step, GeometricVerification) else 0)


def ranking_depth(rows: int, queries: int, *least: int, longer: bool = True) -> int:
    """How many hits of a search each query's ranking is made of: one more, as the query may be among them.

    Args:
        rows: of the database.
        queries: how many there are.
        least: what is needed: cut-offs, and what steps of re-ranking look at.
        longer: than that, where queries are so few that there is memory for it.
    """
    allowed = _PLACES // max(1, queries) if longer else 0
    return min(rows, max(_DEPTH, allowed, *least) + 1)


def own_rows(ids: Sequence[str], database_ids: Sequence[str]) -> list[Rows]:
    """For each query the row of the database that is the query itself, int64 [1], or none."""
    places = {identifier: row for row, identifier in enumerate(database_ids)}
    return [np.array([places[name]] if name in places else [], np.int64) for name in ids]


def named_reranked(
    metrics: Iterable[Metric], steps: Iterable[Config], *, itself: bool = False
) -> list[Metric]:
    """The metrics under names of their own, with the steps in their policies."""
    # A query that is a row of the database joins it only once an earlier step has changed it.
    words = ", then ".join(
        _in_words(step, alone=number > 0 or not itself) for number, step in enumerate(steps)
    )
    return [
        Metric(f"{metric.name}/reranked", metric.value, f"re-ranked by {words}: {metric.policy}")
        for metric in metrics
    ]


def plain(metrics: Iterable[Metric], notes: list[str]) -> dict[str, Any]:
    """The result of an evaluation without curves; see `evaluate.evaluate`."""
    return {
        "test": [{"name": metric.name, "value": metric.value, "policy": metric.policy} for metric in metrics],
        "pr_curve": None,
        "notes": notes,
    }


def rows_in(embeddings: Embeddings, table: ImageTable) -> Rows:
    """int64 [n], ascending: the rows of a table that have a descriptor, one for each row of the embeddings.

    Raises:
        ArtefactError: if the images of the embeddings are not those of the table, in their order.
    """
    place = {name: row for row, name in enumerate(table.ids)}
    rows = np.array([place.get(name, NO_ROW) for name in embeddings.ids], np.int64)
    if (rows == NO_ROW).any() or (np.diff(rows) <= 0).any():
        raise ArtefactError(
            f"the images are not those of {table.name}, in their order",
            where=embeddings.folder,
            mend="encode the benchmark's images",
        )
    return rows


def in_order(report: revisited.Report) -> list[Metric]:
    """The metrics with those that are compared most first."""
    protocols = [name for name in ("medium", "hard", "easy", "classic") if name in report]
    return [report[protocol][name] for name in report[protocols[0]] for protocol in protocols]


def notes_on_missing(
    benchmark: Benchmark, asked: Rows, lists: Sequence[Mapping[str, Rows]], present: Rows
) -> list[str]:
    """What a reader has to know where images of a benchmark with a ground truth cannot be decoded.

    Args:
        benchmark: whose images they are.
        asked: the queries that can be.
        lists: of the ground truth of these queries.
        present: the rows of the database that can be.
    """
    notes = []
    lost = len(benchmark.queries) - len(asked)
    if lost:
        notes.append(f"{lost} of {len(benchmark.queries)} queries cannot be decoded and do not count")
    total = len(benchmark.database)
    if len(present) < total:
        listed = np.unique(
            np.concatenate([rows for one in lists for name, rows in one.items() if name != "junk"])
        )
        positives = int((~np.isin(listed, present)).sum())
        notes.append(
            f"{total - len(present):,} of {total:,} images of the database cannot be decoded; those of them "
            f"that are positive for a query, {positives:,}, count as never found"
        )
    return notes


def as_text(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Metrics of the Oxford and Paris benchmarks in the layout of the DELF authors' code: `mAP.txt`.

    One block a protocol, in the order of their names, in percent with two decimals; re-ranked results have
    blocks of their own.

    Args:
        metrics: name and value of each, as `map/medium`, `mp@10/medium/reranked`.
    """
    found: dict[str, dict[str, float]] = {}
    for metric in metrics:
        name, _, protocol = metric["name"].partition("/")
        found.setdefault(protocol, {})[name] = round(100 * metric["value"], 2)
    blocks = []
    for protocol in sorted(found):
        values = found[protocol]
        ks = [name.removeprefix("mp@") for name in values if name.startswith("mp@")]
        lines = [protocol, f"  mAP={values['map']:.2f}"]
        for kind, key in (("mP", "mp"), ("mR", "mr")):
            listed = " ".join(f"{values[f'{key}@{k}']:.2f}" for k in ks)
            lines.append(f"  {kind}@k[{' '.join(ks)}] [{listed}]")
        blocks.append("\n".join(lines))
    return "\n".join(blocks) + "\n"


def _in_words(step: Config, *, alone: bool) -> str:
    """A step with its settings: `k_reciprocal (k1 20, k2 6, …)`.

    Args:
        step: its configuration.
        alone: whether queries are no rows of the database, so that k-reciprocal re-ranking has to say what
            it takes them with; published numbers are those of all queries together.
    """
    settings = step.model_dump()
    name = settings.pop("name")
    words = [f"{key} {value}" for key, value in settings.items()]
    if alone and isinstance(step, KReciprocalConfig) and not step.joint:
        words.append("each query is re-ranked alone with the database")
    if isinstance(step, GeometricVerificationConfig):
        words.append("rows that do not count for a query are left out before the first are taken")
    return f"{name} ({', '.join(words)})"
