"""The order of a search's hits, and what clients are told of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes, Descriptors, Local, Vectors
from ray_retrieval.search import Hits, Index
from ray_retrieval.search.rerank import GeometricVerification
from ray_retrieval.search.rerank import rerank as rerank_hits
from ray_retrieval.search.rerank.verification import known_inliers
from ray_retrieval.search.vectors import distances_to
from ray_retrieval.serve.answers import Hit, Why
from ray_retrieval.serve.combining import Best, best, one
from ray_retrieval.serve.lookups import known, records_of
from ray_retrieval.serve.rerankings import Reranking


@dataclass(frozen=True)
class Ranked:
    """The hits of a search in their final order.

    Attributes:
        rows: int64 [m].
        distances: [m], in the search.
        examples: int64 [m]: which query each is nearest to.
        scores: float32 [m] of the re-ranking; None without.
        inliers: of verification, None for those not verified; None without it.
    """

    rows: npt.NDArray[np.int64]
    distances: npt.NDArray[Any]
    examples: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32] | None = None
    inliers: list[int | None] | None = None


def plain(found: Hits, k: int) -> Ranked:
    """The hits of a search as they are; of several queries those that any of them is nearest to."""
    chosen = best(found, k) if len(found) > 1 else one(found, k)
    return Ranked(chosen.rows, chosen.distances, chosen.rankings)


def reranked(
    index: Index, reranking: Reranking, queries: Descriptors, found: Hits, features: Local | None, k: int
) -> Ranked:
    """The hits after all steps, each query by itself; of several queries the best of their scores counts."""
    assert not isinstance(queries, Codes)
    ordered = rerank_hits(reranking.steps, queries, found, features=features)
    chosen: Best = best(ordered, k) if len(ordered) > 1 else one(ordered, k)
    last = reranking.steps[-1]
    inliers: list[int | None] | None = None
    if isinstance(last, GeometricVerification):
        inliers = known_inliers(chosen.distances, last.depth)
    distances = _own_distances(index, queries, found, chosen)
    return Ranked(chosen.rows, distances, chosen.rankings, chosen.distances, inliers)


def _own_distances(
    index: Index, queries: Vectors | Local, found: Hits, chosen: Best
) -> npt.NDArray[np.float32]:
    """How far the hits are in the search, whatever order re-ranking has brought them in."""
    if isinstance(queries, Vectors):
        places = np.tile(np.arange(len(chosen.rows)), (len(queries), 1))
        every = distances_to(index.vectors(chosen.rows), queries.data, places)
        return np.asarray(every[chosen.rankings, np.arange(len(chosen.rows))], np.float32)
    # Local features are re-ranked by verification alone, which brings nothing in.
    known_to = [
        dict(zip(*pair, strict=True))
        for pair in zip(found.rows.tolist(), found.distances.tolist(), strict=True)
    ]
    pairs = zip(chosen.rankings.tolist(), chosen.rows.tolist(), strict=True)
    return np.array([known_to[ranking][row] for ranking, row in pairs], np.float32)


def told_hits(name: str, index: Index, ranked: Ranked, why: list[Why | None] | None) -> list[Hit]:
    """What clients are told of the hits, in their order."""
    form = index.form
    records = records_of(index, ranked.rows.tolist())
    scores = [None] * len(records) if ranked.scores is None else ranked.scores.tolist()
    inliers = [None] * len(records) if ranked.inliers is None else ranked.inliers
    whys = [None] * len(records) if why is None else why
    hits = []
    for place, record in enumerate(records):
        distance = ranked.distances[place].item()
        unverified = ranked.inliers is not None and inliers[place] is None
        hits.append(
            Hit(
                rank=place + 1,
                distance=distance,
                similarity=form.similarity(distance),
                in_words="not verified" if unverified else form.in_words(distance, inliers[place]),
                score=scores[place],
                inliers=inliers[place],
                why=whys[place],
                **known(name, index, record),
            )
        )
    return hits
