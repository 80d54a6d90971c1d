"""Tuples (query, positive, hard negatives) for an epoch: which images take part, and which are hard.

A plan is drawn from (seed, epoch) by a generator of its own, so that it is the same on every worker and for
any number of workers. The images that it names are described by the current network, each worker its share;
then the negatives of a query are the most similar images of the pool, at most one of each cluster and none
of its own, a cluster being all images of one thing.

The published rule walks down the pool sorted by similarity and takes an image when its cluster is new. The
same images are found without sorting: they are the best images of the clusters with the best images.

Reference: Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019, section 4.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ray_retrieval.errors import DataError

Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

_MINING = int.from_bytes(b"mining", "big")
"""Keeps these draws apart from others of the same seed and epoch."""

# Every product has this shape, with zeros where the vectors end: sums are then formed in one order whatever
# share of the queries is asked for.
_QUERIES, _ROWS = 128, 1024


class Plan(NamedTuple):
    """The images of one epoch, as rows of the training table.

    Attributes:
        queries: int64 [q].
        positives: int64 [q], the positive of each query.
        pool: int64 [n], ascending; the images among which negatives are looked for.
    """

    queries: Rows
    positives: Rows
    pool: Rows

    @property
    def described(self) -> Rows:
        """int64, ascending: the rows that mining needs descriptors of, each once."""
        return np.union1d(self.queries, self.pool)


class LabelPairs:
    """The pairs of images of one class, drawn without a list of them all.

    Args:
        labels: int64 [n], class numbers; below 0: the image has no class.

    Raises:
        DataError: if no class has two images.
    """

    def __init__(self, labels: Rows) -> None:
        known = np.flatnonzero(labels >= 0)
        self._rows = known[np.argsort(labels[known], kind="stable")]
        _, starts, sizes = np.unique(labels[self._rows], return_index=True, return_counts=True)
        self._starts, self._sizes = np.repeat(starts, sizes), np.repeat(sizes, sizes)
        self._queries = np.flatnonzero(self._sizes >= 2)
        if not len(self._queries):
            raise DataError(
                f"no class has two images that could be a pair, of {len(known):,} images with a class",
                mend="train on photographs of which several show the same thing",
            )

    def __len__(self) -> int:
        """How many images can be a query."""
        return len(self._queries)

    def draw(self, count: int, generator: np.random.Generator) -> Rows:
        """int64 [min(count, len(self)), 2]: queries and positives, as rows.

        Each image that has another one of its class is a query with the same probability, at most once; the
        positive is one of those others, each with the same probability.
        """
        query = generator.choice(self._queries, min(count, len(self)), replace=False)
        starts, sizes = self._starts[query], self._sizes[query]
        # A step of 1 to size − 1 around the class never comes back to the query.
        steps = generator.integers(1, sizes)
        positive = starts + (query - starts + steps) % sizes
        return np.stack([self._rows[query], self._rows[positive]], axis=1)


def pairs_of_labels(labels: Rows) -> LabelPairs:
    """The pairs of images that share a class number.

    Args:
        labels: int64 [n]; below 0: the image has no class.

    Raises:
        DataError: if no class has two images.
    """
    return LabelPairs(np.asarray(labels, np.int64))


def epoch_plan(
    pairs: Rows | LabelPairs,
    images: int,
    queries: int,
    pool: int,
    *,
    seed: int,
    epoch: int,
    repeat: int = 0,
) -> Plan:
    """The pairs and the pool of one epoch, drawn without replacement.

    Args:
        pairs: int64 [n, 2], rows of a query and of its positive; or `pairs_of_labels`, of which each image is
            a query at most once.
        images: number of rows of the training table.
        queries: how many pairs to draw; fewer where there are fewer.
        pool: how many images to draw for the pool; fewer where there are fewer.
        seed: of the training.
        epoch: epochs finished.
        repeat: how often tuples have been mined in this epoch already.

    Raises:
        DataError: if there is no pair, or a pair names a row that is not there.
    """
    generator = np.random.default_rng([seed, epoch, repeat, _MINING])
    if isinstance(pairs, LabelPairs):
        drawn = pairs.draw(queries, generator)
    else:
        if not len(pairs):
            raise DataError("there are no pairs of a query and a positive to train on")
        drawn = pairs[generator.choice(len(pairs), min(queries, len(pairs)), replace=False)]
    wrong = drawn[(drawn < 0) | (drawn >= images)]
    if len(wrong):
        raise DataError(
            f"a pair names image {wrong[0]:,} of {images:,}",
            mend="check that the pairs were made for this table",
        )
    chosen = generator.choice(images, min(pool, images), replace=False)
    return Plan(drawn[:, 0].astype(np.int64), drawn[:, 1].astype(np.int64), np.sort(chosen).astype(np.int64))


def hard_negatives(
    query_vectors: Vectors,
    query_clusters: Rows,
    pool_vectors: Vectors,
    pool_clusters: Rows,
    count: int,
    *,
    threads: int = 1,
) -> Rows:
    """The best image of each of the `count` best clusters for each query, its own cluster left out.

    Of equally similar images the one that comes first in the pool is the better. The result does not depend
    on the number of threads, nor on which other queries are asked for at once, so that workers can share the
    queries. A thread holds 4 bytes for each of 128 queries and each image of the pool.

    Args:
        query_vectors: float32 [q, d].
        query_clusters: int64 [q].
        pool_vectors: float32 [n, d].
        pool_clusters: int64 [n].
        count: negatives of each query; 0 or more.
        threads: how many work at once. While they do, other BLAS calls of this process have one thread.

    Returns:
        int64 [q, count]: positions in the pool, the most similar first.

    Raises:
        DataError: if the pool has too few clusters other than the query's, or a similarity is not a number.
    """
    if count == 0 or not len(query_vectors):
        return np.empty((len(query_vectors), count), np.int64)
    pool = _Pool(np.ascontiguousarray(pool_vectors, np.float32), pool_clusters)
    own = pool.segments_of(query_clusters)
    pool.check(own, count)
    found = np.empty((len(query_vectors), count), np.int64)

    def mine(start: int) -> None:
        block = slice(start, start + _QUERIES)
        found[block] = _mine(pool, query_vectors[block], own[block], count)

    starts = range(0, len(query_vectors), _QUERIES)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as executor:
        list(executor.map(mine, starts))
    return found


class _Pool:
    """The pool with its images grouped by cluster.

    Attributes:
        vectors: float32 [n, d], in the order given.
        order: int64 [n], positions in the pool, by cluster and within one ascending.
        places: int64 [n], where each image of the pool stands in `order`.
        clusters: int64 [c], ascending.
        starts: int64 [c], where each cluster begins in `order`.
        sizes: int64 [c].
    """

    def __init__(self, vectors: Vectors, clusters: Rows) -> None:
        clusters = np.asarray(clusters)
        assert len(vectors) == len(clusters), f"{len(vectors)} vectors, {len(clusters)} cluster numbers"
        self.vectors = vectors
        self.order = np.argsort(clusters, kind="stable")
        self.places = np.empty_like(self.order)
        self.places[self.order] = np.arange(len(self.order))
        self.clusters, self.starts, self.sizes = np.unique(
            clusters[self.order], return_index=True, return_counts=True
        )

    def segments_of(self, query_clusters: Rows) -> Rows:
        """int64 [q]: the place of each query's cluster in `clusters`; -1 where the pool has none of it."""
        query_clusters = np.asarray(query_clusters)
        if not len(self.clusters):
            return np.full(len(query_clusters), -1, np.int64)
        place = np.searchsorted(self.clusters, query_clusters).clip(max=len(self.clusters) - 1)
        return np.where(self.clusters[place] == query_clusters, place, -1)

    def check(self, own: Rows, count: int) -> None:
        """Raise where a query cannot have `count` negatives."""
        others = len(self.clusters) - int((own >= 0).any())
        if others < count:
            raise DataError(
                f"{count} negatives of different clusters are needed for each query, and the pool of "
                f"{len(self.order):,} images has {others} clusters other than the query's",
                mend=f"ask for at most {others} negatives, or take a larger pool or images of more things",
            )


def _mine(pool: _Pool, queries: Vectors, own: Rows, count: int) -> Rows:
    """int64 [b, count]: the negatives of at most 128 queries."""
    number = len(queries)
    similarities = _products(pool, queries)[:, :number]
    best = np.maximum.reduceat(similarities, pool.starts, axis=0)
    if not np.isfinite(best).all():
        raise DataError(
            "a descriptor has a value that is not a finite number",
            mend="the training has diverged: lower the learning rate",
        )
    inside = np.flatnonzero(own >= 0)
    best[own[inside], inside] = -np.inf
    least = np.partition(best, len(best) - count, axis=0)[len(best) - count]
    # `count` clusters for each query, and those that equal the last of them.
    query, cluster = np.nonzero((best >= least).T)
    position = _first_of_equals(pool, similarities, query, cluster, best[cluster, query])
    ranked = np.lexsort((position, -best[cluster, query], query))
    firsts = np.searchsorted(query, np.arange(number))
    negatives: Rows = position[ranked[firsts[:, None] + np.arange(count)]]
    return negatives


def _products(pool: _Pool, queries: Vectors) -> Vectors:
    """float32 [n, 128]: similarities of the pool's images, grouped by cluster, with at most 128 queries."""
    filled = np.zeros((_QUERIES, queries.shape[1]), np.float32)
    filled[: len(queries)] = queries
    similarities = np.empty((len(pool.order), _QUERIES), np.float32)
    tile = np.empty((_ROWS, _QUERIES), np.float32)  # Stays in the processor's cache until it is put in order.
    for start in range(0, len(pool.order), _ROWS):
        vectors = pool.vectors[start : start + _ROWS]
        if len(vectors) < _ROWS:
            vectors = np.concatenate(
                [vectors, np.zeros((_ROWS - len(vectors), vectors.shape[1]), np.float32)]
            )
        np.matmul(vectors, filled.T, out=tile)
        places = pool.places[start : start + _ROWS]
        similarities[places] = tile[: len(places)]
    return similarities


def _first_of_equals(pool: _Pool, similarities: Vectors, query: Rows, cluster: Rows, best: Vectors) -> Rows:
    """int64 [m]: the first position in the pool whose similarity is the cluster's best, pair by pair.

    Args:
        pool: of which `similarities` float32 [n, b] are, grouped by cluster.
        similarities: with a block of queries.
        query: int64 [m], columns.
        cluster: int64 [m], places in the pool's clusters.
        best: float32 [m].
    """
    sizes = pool.sizes[cluster]
    ends = np.cumsum(sizes)
    pair = np.repeat(np.arange(len(cluster)), sizes)
    place = np.arange(len(pair)) + np.repeat(pool.starts[cluster] - (ends - sizes), sizes)
    equal = np.flatnonzero(similarities[place, query[pair]] == best[pair])
    _, firsts = np.unique(pair[equal], return_index=True)
    found: Rows = pool.order[place[equal[firsts]]]
    return found


def shares_by_pixels(
    shapes: npt.NDArray[np.integer[Any]] | Sequence[tuple[int, int]], world: int
) -> list[Rows]:
    """What each worker describes: runs of the images sorted by shape, with nearly equal sums of pixels.

    Images of one shape stand side by side, so that they can be described together.

    Args:
        shapes: whole numbers [n, 2], height and width in pixels.
        world: number of workers.

    Returns:
        int64 arrays, one a worker: every row of `shapes` in exactly one of them. A share's sum of pixels is
        within one image of the mean; with few images a share may be empty.
    """
    height, width = np.asarray(shapes, np.int64).reshape(-1, 2).T
    order = np.lexsort((width, height))
    pixels = np.maximum(height * width, 1)[order]
    ends = np.cumsum(pixels)
    # The worker in whose part of all pixels the middle of an image lies.
    worker = (2 * ends - pixels) * world // (2 * ends[-1]) if len(ends) else ends
    cuts = np.searchsorted(worker, np.arange(1, world))
    return [np.asarray(share, np.int64) for share in np.split(order, cuts)]
