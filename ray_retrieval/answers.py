"""What a search answers: images found, with what the index knows of them and how near they are."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import RetrievalError
from ray_retrieval.pictures import Example, Shown
from ray_retrieval.search import Hits, Index
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.rerank import GeometricVerification, Step
from ray_retrieval.search.rerank.verification import known_inliers


@dataclass(frozen=True)
class Hit:
    """One image found.

    Attributes:
        rank: 1 is the nearest.
        id: of the image.
        distance: in the search, before any re-ranking: Hamming distance in bits, squared Euclidean distance
            of unit vectors, or of local features the score with the sign turned.
        similarity: share of equal bits, cosine, or of local features the score: see `descriptors.Form`.
        score: by which re-ranking has put it in its place, the lowest first; None where there is none.
        inliers: where it was verified last, how many features agree on where things are, 0 where they are
            too few to mean anything; None where it was not, or is too deep in the ranking.
        labels: names of its classes, or their numbers where they have no names; empty where unknown.
        path: of the image file, or None where the index holds the image itself.
        row: of the index.
    """

    rank: int
    id: str
    distance: float
    similarity: float
    labels: list[str]
    path: str | None
    row: int
    score: float | None = None
    inliers: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def in_words(self, form: Form) -> str:
        """How near it is, as people read it: `37 inliers` or `no match` where it was verified."""
        if self.inliers is None and self.score is not None and form.kind is DescriptorKind.LOCAL:
            return "not verified"
        return form.in_words(self.distance, self.inliers)


@dataclass(frozen=True)
class Answer:
    """What a search finds for one image.

    Attributes:
        hits: nearest first.
        notes: what a reader has to know: why there are none, or that none is a match.
    """

    hits: list[Hit]
    notes: list[str]


def label_names(label: int | list[int] | None, class_names: list[str] | None) -> list[str]:
    """Names of a row's classes; their numbers where they have no names."""
    numbers = [] if label is None else label if isinstance(label, list) else [label]
    return [class_names[number] if class_names else str(number) for number in numbers]


def example(index: Index, query: Shown, hits: list[Hit]) -> Example:
    """A query and its hits as pictures show them; a hit is right where it shares a label with the query."""
    known = set(query.labels)
    shown = [
        Shown(
            _image_of(index, hit.row),
            hit.id,
            hit.labels,
            hit.in_words(index.form),
            bool(known & set(hit.labels)) if known and hit.labels else None,
        )
        for hit in hits
    ]
    return Example(query, shown)


def _image_of(index: Index, row: int) -> bytes | None:
    try:
        data: bytes = index.image_bytes(row)
        return data
    except RetrievalError:
        return None  # the file has gone since: the picture shows a placeholder


def hits_of(index: Index, hits: Hits, query: int) -> list[Hit]:
    """The hits of one query with what the index knows of them, nearest first."""
    rows = hits.rows[query]
    rows = rows[rows >= 0]
    records = index.records(rows).to_pylist()
    return [
        Hit(
            rank,
            record["id"],
            distance.item(),
            index.form.similarity(distance.item()),
            label_names(record.get("label"), index.class_names),
            record.get("path"),
            int(row),
        )
        for rank, (record, row, distance) in enumerate(
            zip(records, rows, hits.distances[query], strict=False), start=1
        )
    ]


def verified(index: Index, found: Hits, ordered: Hits, step: Step, query: int, k: int) -> list[Hit]:
    """The first hits of one query after re-ranking an index of local features.

    Args:
        index: that was searched.
        found: by the search: what distance and similarity are of.
        ordered: as the last step has put them.
        step: the last one.
        query: number of the query.
        k: how many hits.
    """
    assert isinstance(step, GeometricVerification), "local features are re-ranked by verification alone"
    rows = ordered.rows[query, :k]
    rows = rows[rows != NO_ROW]
    places = {row: place for place, row in enumerate(found.rows[query].tolist())}
    own = found.distances[query, [places[row] for row in rows.tolist()]]
    hits = hits_of(index, Hits(own[None], rows[None]), 0)
    return scored(hits, ordered.distances[query, : len(rows)], step)


def scored(hits: list[Hit], scores: npt.NDArray[np.float32], step: Step) -> list[Hit]:
    """Hits with the last step's scores, float32 [hits], and the inliers where it verifies."""
    if not isinstance(step, GeometricVerification):
        return [replace(hit, score=score) for hit, score in zip(hits, scores.tolist(), strict=True)]
    scored = zip(hits, scores.tolist(), known_inliers(scores, step.depth), strict=True)
    return [replace(hit, score=score, inliers=number) for hit, score, number in scored]
