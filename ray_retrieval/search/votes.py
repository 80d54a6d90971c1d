"""Shortlists of local features by votes: each feature of a query votes for the images of its neighbours.

A feature i of the query has K nearest neighbours among the features of the whole database. An image d that
has some of them gets one vote, worth what its best one is better than the K-th:

    V(d) = Σ_i w_i · max over the neighbours n of i in d of (cos(i, n) − r_i)
    r_i = max(cos(i, K-th neighbour), 0), and 0 where there are fewer than K
    w_i = log(1 + N / m_i) / log(1 + N)
    similarity(d) = V(d) / (√n_d · Σ_i w_i (1 − r_i))

with N images in the database, m_i of them with a vote of i (w_i is 1 without any), and n_d features of d.
What V(d) is divided by is the most that it can be, so similarities are within [0, 1). Images without a vote
are no hits.

Neighbours of several shards are merged before anything is voted on (`neighbours`).

Reference: Jégou, Douze, Schmid 2009, On the burstiness of visual elements, on one vote of a feature for an
image; Boiman, Shechtman, Irani 2008, In defense of nearest-neighbor based image classification, on the best
feature of each; Jégou, Douze, Schmid 2011, Exploiting descriptor distances for precise image search, on what
a neighbour is better than the K-th.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.descriptors import Local
from ray_retrieval.errors import MetricError, RecipeError
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.hits import NO_ROW, Hits, check_k, no_hits
from ray_retrieval.search.local_kernels import cast_votes
from ray_retrieval.search.neighbours import AnyFeatures, Neighbours, nearest_features
from ray_retrieval.search.vector_kernels import Doubles, Rows

EXACT_FEATURES = 100_000
"""Up to so many features `auto` compares all of them: no training, nothing missed."""

MOST_WORDS = 65_536

ShortlistKind = Literal["votes", "exact", "asmk", "global"]
"""How an index of local features is searched: what a configuration comes to."""

_PER_CELL = 64  # features to train on; FAISS warns below 39, and uses no more than 256
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


class LocalSearchConfig(Config):
    """How a database of local features is searched for the images to look at closely: the shortlist."""

    shortlist: Literal["auto", "votes", "exact", "asmk", "global"] = "auto"
    """`votes`: votes of the nearest features, which an index of FAISS finds; `exact`: the same votes, all
    features compared; `asmk`: binary residuals, aggregated by visual word; `global`: the global vectors that
    come with the features; `auto`: `exact` for few features, else `votes`."""
    neighbours: int = Field(default=60, ge=2, le=2048)
    """Nearest features of the database that each feature of a query looks at (K)."""
    factory: str | None = None
    """FAISS's factory string for `votes`, such as `IVF4096,SQ8`. None: by the number of features."""
    nprobe: int = Field(default=16, ge=1)
    """Cells of that index that are visited for each feature of a query."""
    train_rows: int | None = Field(default=None, ge=1)
    """Features to train on, drawn at random. None: 64 for each cell or word."""
    recall_queries: int = Field(default=16, ge=1)
    """Images drawn at random as queries, to compare the shortlist with that of the exact votes."""
    words: int | None = Field(default=None, ge=1)
    """Visual words of `asmk`. None: by the number of features, at most 65,536."""
    multiple_assignment: int = Field(default=5, ge=1)
    """Nearest words that each feature of a query counts for in `asmk`; those of a database for one."""
    alpha: float = Field(default=3.0, gt=0)
    """Exponent of the similarity of two residuals in `asmk`."""
    tau: float = Field(default=0.0, ge=0, lt=1)
    """Similarities of residuals up to this count nothing in `asmk`."""

    @property
    def effort(self) -> Effort:
        """How hard FAISS looks."""
        return Effort(nprobe=self.nprobe)


class Shortlist(NamedTuple):
    """What a configuration comes to for a database.

    Attributes:
        kind: of search; never `auto`.
        factory: string of FAISS for `votes`, else None.
        words: visual words for `asmk`, else 0.
        train_rows: features to train on for `votes` and `asmk`, else 0.
        why: in a sentence.
    """

    kind: ShortlistKind
    factory: str | None
    words: int
    train_rows: int
    why: str


def choose_shortlist(config: LocalSearchConfig, *, features: int, vectors: int) -> Shortlist:
    """The search for a database.

    Args:
        config: what is asked for.
        features: of all images.
        vectors: dimension of the global vectors; 0 without any.

    Raises:
        RecipeError: if `global` is asked for and there are no global vectors, if there are no features to
            train on, or if a factory string is given to a search that has none.
    """
    kind, why = config.shortlist, "asked for"
    if kind == "auto":
        kind = "exact" if features <= EXACT_FEATURES and config.factory is None else "votes"
        few = f"all up to {EXACT_FEATURES:,} are compared"
        why = f"{features:,} features: {few if kind == 'exact' else 'too many to compare all of them'}"
    if config.factory is not None and kind != "votes":
        raise RecipeError(
            f"'{config.factory}' is an index of FAISS, the shortlist '{kind}' has none",
            where="factory",
            mend="leave it out, or set shortlist to votes",
        )
    if kind == "global" and vectors == 0:
        raise RecipeError(
            "the images have no global vectors besides their local features",
            where="shortlist",
            mend="set it to votes, or train a model with both",
        )
    if kind in ("exact", "global"):
        return Shortlist(kind, None, 0, 0, why)
    if features == 0:
        raise RecipeError(
            f"no image has a local feature, so there is nothing to train '{kind}' on",
            where="shortlist",
            mend="set it to exact",
        )
    cells = _cells(features, config.train_rows)
    words = (config.words or min(cells, MOST_WORDS)) if kind == "asmk" else 0
    factory = (config.factory or f"IVF{cells},SQ8") if kind == "votes" else None
    train_rows = min(features, config.train_rows or _PER_CELL * (words or cells))
    return Shortlist(kind, factory, words, train_rows, why)


def _cells(features: int, train_rows: int | None) -> int:
    """A power of two near 4 √features, with enough features to train each cell on."""
    cells = 2 ** round(math.log2(4 * math.sqrt(features)))
    while cells > 1 and cells * _PER_CELL > min(features, train_rows or features):
        cells //= 2
    return int(cells)


def search_votes(
    segments: Sequence[AnyFeatures],
    queries: Local,
    k: int,
    config: LocalSearchConfig,
    *,
    images: int,
    masks: "Sequence[npt.NDArray[np.bool_]] | None" = None,
    threads: int = 1,
) -> Hits:
    """The `k` images with the most votes, for each query.

    Args:
        segments: of the whole database, without overlap; `first_row` and `first_feature` ascend.
        queries: their features vote.
        k: hits per query.
        config: of the neighbours; not of the kind of search, which the segments have.
        images: in the database (N).
        masks: bool [images] of each segment, which of them are in the database at all; default all. No other
            features are neighbours, and `images` does not count them.
        threads: to share the work among, at least 1; the result does not depend on it.

    Returns:
        Hits [q, k]: float32 distances are similarities with the sign turned, sorted by (distance, row);
        `NO_ROW` at infinity where fewer images got a vote. A query without features has no hits.

    Raises:
        ArtefactError: if the queries' dimension is not that of the features.
        QueryError: if `k` < 1 or a query holds what is no finite number.
    """
    check_k(k)
    found = no_hits(len(queries), k, np.float32)
    for number in range(len(queries)):
        features = queries.data[queries.offsets[number] : queries.offsets[number + 1]].astype(np.float32)
        near = nearest_features(
            segments, features, config.neighbours, config.effort, masks=masks, threads=threads
        )
        own = cast(near, np.array([0, len(features)]), k, images=images)
        found.distances[number], found.rows[number] = own.distances[0], own.rows[0]
    return found


def cast(neighbours: Neighbours, offsets: Rows, k: int, *, images: int) -> Hits:
    """The votes of queries, whose features' neighbours in the whole database are known.

    Args:
        neighbours: of the features of all queries, one query after another; of K columns.
        offsets: int64 [q + 1]: which features are whose.
        k: hits per query.
        images: in the database (N).

    Returns:
        Hits [q, k], as those of `search_votes`.
    """
    check_k(k)
    found = no_hits(len(offsets) - 1, k, np.float32)
    width = neighbours.features.shape[1]
    among = np.maximum(np.arange(width + 1), 1)
    weights = np.log1p(max(images, 1) / among) / np.log1p(max(images, 1))
    for number in range(len(found)):
        some = neighbours.take(slice(offsets[number], offsets[number + 1]))
        real = some.images != NO_ROW
        rows, first, places = np.unique(some.images[real], return_index=True, return_inverse=True)
        votes = np.zeros(len(rows))
        numbers = np.full(real.shape, -1, np.int64)
        numbers[real] = places
        marks = np.full(len(rows), -1, np.int64)
        most = cast_votes(np.ascontiguousarray(some.distances), numbers, width, weights, marks, votes)
        voted = votes > 0
        similarities = votes[voted] / (np.sqrt(some.counts[real][first][voted]) * most)
        keep_best(similarities, rows[voted], found.take(slice(number, number + 1)))
    return found


def keep_best(similarities: Doubles, rows: Rows, out: Hits) -> None:
    """Write the images of the greatest similarity, as float32 below 1 with the sign turned.

    Args:
        similarities: float64 [n], within [0, 1].
        rows: int64 [n], ascending.
        out: Hits [1, k] of nothing; filled, sorted by (distance, row).
    """
    k = out.rows.shape[1]
    distances = -np.minimum(similarities.astype(np.float32), _BELOW_ONE)
    if len(rows) > k:
        near = distances <= np.partition(distances, k - 1)[k - 1]
        distances, rows = distances[near], rows[near]
    order = np.argsort(distances, kind="stable")[:k]
    out.distances[0, : len(order)], out.rows[0, : len(order)] = distances[order], rows[order]


def recall_of_votes(exact: Hits, found: Hits) -> float:
    """The share of the images of one shortlist that are in another, over all queries.

    Args:
        exact: Hits [q, k] of the exact votes.
        found: Hits [q, any number] of another shortlist of the same images.

    Raises:
        MetricError: if the queries are not as many, or the exact votes have no hits.
    """
    wanted = exact.rows != NO_ROW
    if len(exact) != len(found) or not wanted.any():
        raise MetricError(
            f"recall needs hits of the same queries, got those of {len(exact)} and {len(found)}, "
            f"{wanted.sum()} of them of the exact votes"
        )
    pairs = zip(exact.rows, found.rows, wanted, strict=True)
    there = sum(int(np.isin(rows[real], others).sum()) for rows, others, real in pairs)
    return there / int(wanted.sum())
