"""The nearest features of a database, wherever in its shards they lie, for features of queries.

They are found exactly, among the float16 features as they are stored, or by an index of FAISS over them,
which compares the query with what it holds (`IVF4096,SQ8`: 8 bits a dimension). What several shards give is
merged by (distance, number of the feature in the whole database), so how a database is cut into shards does
not change a result. Only where an index cannot tell features of different cells apart at the K-th place may
it name one or the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Vectors
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search import faiss_index
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.faiss_index import candidates, open_index, selects, settings_of
from ray_retrieval.search.hits import NO_ROW, Hits, merge, no_hits
from ray_retrieval.search.selection import search_blocks
from ray_retrieval.search.threads import run_all
from ray_retrieval.search.vector_kernels import Floats, Rows
from ray_retrieval.search.vectors import VectorSegment, check_query_vectors, norm_error

Mask = npt.NDArray[np.bool_]

_BLOCK_QUERIES = 64
_FEW = 20_000  # features that a filter leaves; then no index is needed
_BYTES_AT_ONCE = 1 << 26  # of features as float32, for comparing all of them


@dataclass(frozen=True)
class FeatureSegment:
    """The features of consecutive images; searched as it is, all of them are compared.

    Attributes:
        offsets: int64 [n + 1], ascending from 0 to m: features of image i are offsets[i] to offsets[i + 1].
        data: float16 [m, d], of length 1 but for the rounding; a read-only memory-mapped file is welcome.
        first_row: row number of the first image.
        first_feature: features of all the images before it in the database.

    Raises:
        ArtefactError: if the arrays' shapes or types do not fit together.
    """

    offsets: Rows
    data: npt.NDArray[np.float16]
    first_row: int
    first_feature: int

    def __post_init__(self) -> None:
        offsets, data = self.offsets, self.data
        if data.dtype != np.float16 or data.ndim != 2:
            raise ArtefactError(f"features are float16 [m, d], got {data.dtype} {list(data.shape)}")
        if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) == 0:
            raise ArtefactError(f"offsets are int64 [n + 1], got {offsets.dtype} {list(offsets.shape)}")
        if offsets[0] != 0 or offsets[-1] != len(data):
            raise ArtefactError(f"offsets go from 0 to {len(data)}, got {offsets[0]} to {offsets[-1]}")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.offsets) - 1

    @property
    def features(self) -> "FeatureSegment":
        """Itself: what an index of features has too."""
        return self

    def nearest(
        self,
        queries: Floats,
        count: int,
        effort: Effort,  # noqa: ARG002
        *,
        mask: Mask | None = None,
        threads: int = 1,
    ) -> Hits:
        """The nearest `count` features for each query feature, exactly, as places in `data`.

        Args:
            queries: float32 [q, d].
            count: hits per query feature.
            effort: not looked at.
            mask: bool [n], whose features count; default those of all images.
            threads: to share the work among; the result does not depend on it.
        """
        blocks = (
            (places, 0, VectorSegment(vectors, 0, norm_error(vectors)))
            for places, vectors in self._blocks(mask)
        )
        return search_blocks(blocks, Vectors(queries), count, threads=threads)

    def features_of(self, mask: Mask) -> Mask:
        """Bool [m]: which features are of the images of a mask."""
        return np.repeat(mask, np.diff(self.offsets))

    def _blocks(self, mask: Mask | None) -> Iterator[tuple[Rows, Floats]]:
        """The features as float32, some at a time, each with its places; empty blocks are left out."""
        step = max(1, _BYTES_AT_ONCE // (4 * max(1, self.data.shape[1])))
        chosen = None if mask is None else self.features_of(mask)
        for start in range(0, len(self.data), step):
            block = self.data[start : start + step]
            places = np.arange(start, start + len(block))
            if chosen is not None:
                own = chosen[start : start + step]
                block, places = block[own], places[own]
            if len(block):
                yield places, block.astype(np.float32)


class IndexedFeatures:
    """A segment of features with the index of FAISS that `fill` wrote for it.

    Args:
        path: of the file; see `faiss_index.open_index`.
        features: what it was filled with.

    Attributes:
        features: the same.
        settings: names of the fields of `Effort` that make a difference to what it finds.

    Raises:
        ArtefactError: if the file is missing, damaged or of other features.
    """

    def __init__(self, path: str | Path, features: FeatureSegment) -> None:
        self._index = open_index(path, *features.data.shape)
        self.features = features
        self.settings = settings_of(self._index)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.features)

    def nearest(
        self,
        queries: Floats,
        count: int,
        effort: Effort,
        *,
        mask: Mask | None = None,
        threads: int = 1,
    ) -> Hits:
        """As `FeatureSegment.nearest`, by what the index holds, as hard as `effort` says.

        Where FAISS cannot look for some of the features only, they are all compared.
        """
        found = no_hits(len(queries), count, np.float32)
        if len(self.features.data) == 0:
            return found
        bitmap = None
        if mask is not None and not mask.all():
            if not selects(self._index):
                return self.features.nearest(queries, count, effort, mask=mask, threads=threads)
            bitmap = np.packbits(self.features.features_of(mask), bitorder="little")
        queries = np.ascontiguousarray(queries)

        def search(start: int, stop: int) -> None:
            hits = merge([candidates(self._index, queries[start:stop], count, effort, bitmap)], count)
            found.distances[start:stop], found.rows[start:stop] = hits.distances, hits.rows

        starts = range(0, len(queries), _BLOCK_QUERIES)
        run_all(search, [(start, min(start + _BLOCK_QUERIES, len(queries))) for start in starts], threads)
        return found


AnyFeatures = FeatureSegment | IndexedFeatures


@dataclass(frozen=True)
class Neighbours:
    """The nearest features of a database, or of shards of it, for some features of queries.

    Attributes:
        distances: float32 [q, K], squared Euclidean, ascending; infinity where there is none.
        features: int64 [q, K], numbers in the whole database; `NO_ROW` where there is none. They ascend where
            distances are equal.
        images: int64 [q, K], rows of their images; `NO_ROW` where there is none.
        counts: int64 [q, K], how many features their images have.
    """

    distances: Floats
    features: Rows
    images: Rows
    counts: Rows

    def take(self, some: slice) -> "Neighbours":
        """Those of some of the query features."""
        return Neighbours(self.distances[some], self.features[some], self.images[some], self.counts[some])


def sample_features(segments: Sequence[FeatureSegment], count: int, seed: int) -> Floats:
    """At most `count` features of a whole database, drawn at random without replacement.

    Args:
        segments: all of the database's, at least one, in ascending order of rows.
        count: to draw.
        seed: of the draw.

    Returns:
        float32 [at most count, d] in the order of the database; the same however that is cut into segments.
    """
    total = sum(len(segment.data) for segment in segments)
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(total, count), replace=False))
    parts = []
    for segment in segments:
        places = drawn - segment.first_feature
        places = places[(places >= 0) & (places < len(segment.data))]
        parts.append(segment.data[places].astype(np.float32))
    return np.concatenate(parts)


def fill(trained: bytes, features: FeatureSegment, write: Callable[[bytes], object]) -> None:
    """Write FAISS's index of one segment's features, the same for the same arguments.

    Args:
        trained: by `faiss_index.train`, on `sample_features` of all segments.
        features: to be found.
        write: takes the next bytes of the file.

    Raises:
        RecipeError: if the index cannot be filled so.
    """
    faiss_index.fill(trained, features.data, write)


def nearest_features(
    segments: Sequence[AnyFeatures],
    queries: Floats,
    count: int,
    effort: Effort,
    *,
    masks: Sequence[Mask] | None = None,
    compare_few: bool = True,
    threads: int = 1,
) -> Neighbours:
    """The K nearest features of some segments, for each of the queries' features.

    Args:
        segments: of the database or of a part of it.
        queries: float32 [q, d], features of one or more queries.
        count: K.
        effort: how hard an index looks.
        masks: bool [images] of each segment, whose features count; default those of all images.
        compare_few: where `few_features` count, they are compared with the queries' one by one, whatever the
            segments are. What is merged must have been found in one way: distances of an index are others.
        threads: to share the work among.

    Raises:
        ArtefactError: if the queries' dimension is not that of the features.
        QueryError: if a query holds what is no finite number.
    """
    check_query_vectors(queries, *{segment.features.data.shape[1] for segment in segments})
    if compare_few and few_features(segments, masks) is not None:
        segments = [segment.features for segment in segments]
    parts = []
    for number, segment in enumerate(segments):
        mask = None if masks is None else masks[number]
        hits = segment.nearest(queries, count, effort, mask=mask, threads=threads)
        parts.append(_placed(hits, segment.features))
    return merge_neighbours(parts or [_no_neighbours(len(queries), count)], count)


def few_features(segments: Sequence[AnyFeatures], masks: Sequence[Mask] | None) -> int | None:
    """How many features count, where they are so few that no index is needed to find them.

    Args:
        segments: of the database or of a part of it.
        masks: as for `nearest_features`.

    Returns:
        None where they are more, where all count, and where there is no index that could be left out.
    """
    if masks is None or all(isinstance(segment, FeatureSegment) for segment in segments):
        return None
    counted = zip(segments, masks, strict=True)
    kept = sum(int(np.diff(segment.features.offsets)[mask].sum()) for segment, mask in counted)
    return kept if are_few(kept) else None


def are_few(features: int) -> bool:
    """Whether so many features are compared one by one where others are left out."""
    return features <= _FEW


def merge_neighbours(parts: Sequence[Neighbours], count: int) -> Neighbours:
    """The nearest `count` of what disjoint parts of a database gave for the same features.

    Args:
        parts: at least one, in any order, each with its own nearest `count`.
        count: K.
    """
    if len(parts) == 1 and parts[0].features.shape[1] == count:
        return parts[0]
    arrays = [
        np.concatenate([getattr(part, name) for part in parts], axis=1)
        for name in ("distances", "features", "images", "counts")
    ]
    # What is no neighbour is infinitely far: it comes last, whatever its number.
    order = np.lexsort((arrays[1], arrays[0]), axis=1)[:, :count]
    return Neighbours(*(np.take_along_axis(array, order, axis=1) for array in arrays))


def _placed(hits: Hits, segment: FeatureSegment) -> Neighbours:
    """Neighbours of hits that are places in a segment's features."""
    real = hits.rows != NO_ROW
    places = hits.rows[real]
    images = np.searchsorted(segment.offsets, places, side="right") - 1
    found = _no_neighbours(*hits.rows.shape)
    found.distances[:] = hits.distances
    found.features[real] = places + segment.first_feature
    found.images[real] = images + segment.first_row
    found.counts[real] = segment.offsets[images + 1] - segment.offsets[images]
    return found


def _no_neighbours(queries: int, count: int) -> Neighbours:
    nothing = partial(np.full, (queries, count), NO_ROW, np.int64)
    return Neighbours(np.full((queries, count), np.inf, np.float32), nothing(), nothing(), nothing())
