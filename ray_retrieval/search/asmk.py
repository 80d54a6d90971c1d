"""Shortlists of local features by ASMK*: signs of residuals, aggregated by visual word, in inverted files.

A codebook of visual words c divides the features x of an image X into cells. Those of one word become D bits:

    b_c(X) = [Σ_{x in X: q(x) = c} (x − c) > 0]
    similarity(X, Y) = Σ_{c in X and Y} s(1 − 2 h(b_c(X), b_c(Y)) / D) / √(n_X n_Y)
    s(u) = u^alpha where u > tau, else 0

with h the number of different bits and n the number of words that an image has. So it is 1 for equal images,
and within [0, 1). Each feature of the database belongs to its nearest word, those of a query to the nearest
`multiple_assignment`. Images with nothing above tau are no hits.

Each shard has one file, little-endian, whose sections begin at multiples of 8 bytes:

    header      64 bytes: `RRASMK01`; words, dimension as 32-bit numbers; images, postings as 64-bit numbers
    codebook    float32 [words, dimension], the same for all shards
    offsets     int64 [words + 1]: the postings of each word
    counts      int32 [images]: words of each image
    images      int32 [postings]: places in the shard, ascending within a word
    bits        uint64 [postings, ceil(dimension / 64)]; bit j of the vector is bit j mod 64 of number j // 64

Reference: Tolias, Avrithis, Jégou 2016, Image search with selective match kernels, sections 3 and 4; Tolias,
Jenicek, Chum 2020, Learning and aggregating deep local descriptors, section 3, on multiple assignment.
"""

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Local
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search import faiss_index
from ray_retrieval.search.hits import Hits, check_k, merge, no_hits
from ray_retrieval.search.local_kernels import Words, score_postings
from ray_retrieval.search.neighbours import FeatureSegment
from ray_retrieval.search.threads import run_all
from ray_retrieval.search.vector_kernels import Doubles, Floats, Rows
from ray_retrieval.search.vectors import VectorSegment, check_query_vectors, norm_error, search_vectors
from ray_retrieval.search.votes import LocalSearchConfig, keep_best

faiss: Any = untyped_faiss  # Its own types leave out half of what is there.

_HEADER = struct.Struct("<8sIIQQ32x")
_MAGIC = b"RRASMK01"
_FEATURES_AT_ONCE = 1 << 16
_MEND = "restore the file, or build the index again"


def train(words: int, sample: Floats, seed: int) -> bytes:
    """A codebook by k-means: float32 [words, d], row after row; the same for the same arguments.

    Args:
        words: of the codebook.
        sample: float32 [m, d], by `sample_features`; best 64 for each word.
        seed: of the order in which the sample is seen.

    Raises:
        RecipeError: if the sample has fewer features than the codebook words.
    """
    # The cells of an inverted file are what is wanted.
    trained = faiss_index.train(f"IVF{words},Flat", sample, seed)
    index = faiss.deserialize_index(np.frombuffer(trained, np.uint8))
    centres = np.empty((words, sample.shape[1]), np.float32)
    # Into an array that is given: with faiss.contrib.torch_utils imported, FAISS would make a tensor.
    index.quantizer.reconstruct_n(0, words, centres)
    return centres.tobytes()


@dataclass(frozen=True)
class Codebook:
    """Visual words.

    Attributes:
        centres: float32 [words, d].
    """

    centres: Floats

    def nearest(self, features: Floats, count: int, *, threads: int = 1) -> Rows:
        """The words at the least Euclidean distances; the same for any batch of features.

        Args:
            features: float32 [m, d].
            count: words for each feature.
            threads: to share the work among.

        Returns:
            int64 [m, min(count, words)], nearest first.
        """
        count = min(count, len(self.centres))
        ones = np.ones((len(features), 1), np.float32)
        asked = np.concatenate([features, ones, 0 * ones], axis=1)
        return search_vectors([self._on_sphere], asked, count, threads=threads).rows

    @cached_property
    def _on_sphere(self) -> VectorSegment:
        """The words as unit vectors, which are the nearest to (x, 1, 0) in the same order as words to x.

        |x − c|² is |x|² − 2 (x·c − |c|²/2): the words are ordered by the product of (x, 1) and (c, −|c|²/2).
        A common factor changes nothing, nor does one more number that gives each the length 1.
        """
        centres = self.centres.astype(np.float64)
        longer = np.concatenate([centres, -0.5 * np.sum(centres**2, axis=1, keepdims=True)], axis=1)
        squares = np.sum(longer**2, axis=1, keepdims=True)
        longest = max(float(squares.max()), 1e-30)
        vectors = np.concatenate([longer, np.sqrt(longest - squares)], axis=1) / np.sqrt(longest)
        rounded = vectors.astype(np.float32)
        return VectorSegment(rounded, 0, norm_error(rounded))


@dataclass(frozen=True)
class Aggregated:
    """What images have of visual words, ascending by (image, word).

    Attributes:
        images: int64 [p].
        words: int64 [p].
        bits: uint64 [p, ceil(d / 64)].
    """

    images: Rows
    words: Rows
    bits: Words


def aggregate(codebook: Codebook, features: Floats, images: Rows, words: Rows) -> Aggregated:
    """The signs of the sums of residuals.

    Args:
        codebook: of the words.
        features: float32 [m, d].
        images: int64 [m], ascending: whose feature each is.
        words: int64 [m, a]: the words that each counts for.

    Returns:
        One row for each word of an image.
    """
    number, assigned = len(codebook.centres), words.shape[1]
    keys = (images[:, None] * number + words).ravel()
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    residuals = features[order // assigned].astype(np.float64) - codebook.centres[words.ravel()[order]]
    sums = np.add.reduceat(residuals, starts, axis=0) if len(starts) else residuals
    return Aggregated(keys[starts] // number, keys[starts] % number, _packed(sums > 0))


def fill(
    trained: bytes, features: FeatureSegment, write: Callable[[bytes], object], *, threads: int = 1
) -> None:
    """Write the inverted file of one segment's features, the same for the same `trained` and features.

    It takes about 60 bytes of memory for each word of each image, and for more than 64 dimensions more.

    Args:
        trained: by `train`.
        features: of the images to be found.
        write: takes the next bytes of the file.
        threads: to share the work among.
    """
    dimension = features.data.shape[1]
    codebook = Codebook(np.frombuffer(trained, np.float32).reshape(-1, dimension))
    parts = [_aggregated(codebook, features, rows, threads) for rows in _blocks(features)]
    images = np.concatenate([part.images for part in parts])
    words = np.concatenate([part.words for part in parts])
    order = np.argsort(words, kind="stable")
    offsets = np.searchsorted(words[order], np.arange(len(codebook.centres) + 1))
    sections: list[npt.NDArray[Any]] = [
        codebook.centres,
        offsets.astype(np.int64),
        np.bincount(images, minlength=len(features)).astype(np.int32),
        images[order].astype(np.int32),
        np.concatenate([part.bits for part in parts])[order],
    ]
    write(_HEADER.pack(_MAGIC, len(codebook.centres), dimension, len(features), len(words)))
    for section in sections:
        write(section.tobytes())
        write(bytes(-section.nbytes % 8))


def codebook_of(path: str | Path) -> bytes:
    """What `train` gave, from a file that `fill` wrote with it.

    Raises:
        ArtefactError: if the file is missing or damaged.
    """
    with _reading(path):
        data: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        _, words, dimension, _, _ = _HEADER.unpack(data[: _HEADER.size].tobytes())
    return data[_HEADER.size : _HEADER.size + 4 * words * dimension].tobytes()


class AsmkSegment:
    """The inverted file of one shard, mapped into memory.

    Args:
        path: of the file that `fill` wrote.
        features: what it was filled with.

    Raises:
        ArtefactError: if the file is missing, damaged or of other features.
    """

    def __init__(self, path: str | Path, features: FeatureSegment) -> None:
        self.first_row = features.first_row
        with _reading(path):
            data: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
            magic, words, dimension, images, postings = _HEADER.unpack(data[: _HEADER.size].tobytes())
        if magic != _MAGIC or (images, dimension) != (len(features), features.data.shape[1]):
            raise ArtefactError(
                f"it is no inverted file of {len(features):,} images with features of "
                f"{features.data.shape[1]} dimensions",
                where=path,
                mend="build the index again",
            )
        place = _HEADER.size

        def section(dtype: Any, *shape: int) -> npt.NDArray[Any]:
            nonlocal place
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            if place + size > len(data):
                raise ArtefactError(f"it ends after {len(data):,} bytes", where=path, mend=_MEND)
            start, place = place, place + size + -size % 8
            found: npt.NDArray[Any] = data[start : start + size].view(np.ndarray).view(dtype)
            return found.reshape(shape)

        self.codebook = Codebook(section(np.float32, words, dimension))
        self.offsets: Rows = section(np.int64, words + 1)
        self.counts: npt.NDArray[np.int32] = section(np.int32, images)
        self.images: npt.NDArray[np.int32] = section(np.int32, postings)
        self.bits: Words = section(np.uint64, postings, -(-dimension // 64))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.counts)

    def search(
        self,
        query: Aggregated,
        k: int,
        similarities: Doubles,
        mask: npt.NDArray[np.bool_] | None = None,
    ) -> Hits:
        """The `k` most similar images for one query.

        Args:
            query: its words.
            k: hits.
            similarities: float64 [d + 1], s(1 − 2h/D) by the number h of different bits.
            mask: bool [images], which of them may be hits; default all.

        Returns:
            Hits [1, k], as those of `search_asmk`.
        """
        scores = np.zeros(len(self))
        score_postings(query.words, query.bits, self.offsets, self.images, self.bits, similarities, scores)
        if mask is not None:
            scores[~mask] = 0
        places = np.flatnonzero(scores)
        divisors = np.sqrt(np.float64(len(query.words)) * self.counts[places])
        found = no_hits(1, k, np.float32)
        keep_best(scores[places] / divisors, places + self.first_row, found)
        return found


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Say which file is damaged."""
    try:
        yield
    except (OSError, ValueError, struct.error) as error:
        raise ArtefactError(f"damaged: {error}", where=path, mend=_MEND) from None


def search_asmk(
    segments: Sequence[AsmkSegment],
    queries: Local,
    k: int,
    config: LocalSearchConfig,
    *,
    masks: Sequence[npt.NDArray[np.bool_]] | None = None,
    threads: int = 1,
) -> Hits:
    """The `k` most similar images over several segments, for each query.

    Args:
        segments: without overlap of rows, all with the same codebook; an empty list is allowed.
        queries: images with or without features.
        k: hits per query.
        config: alpha, tau and the words for each feature of a query.
        masks: bool [images] of each segment, which of them may be hits; default all.
        threads: to share the work among, at least 1; the result does not depend on it.

    Returns:
        Hits [q, k]: float32 distances are similarities with the sign turned, sorted by (distance, row);
        `NO_ROW` at infinity where fewer images are similar at all.

    Raises:
        ArtefactError: if the queries' dimension is not that of the features.
        QueryError: if `k` < 1 or a query holds what is no finite number.
    """
    check_k(k)
    if not segments or len(queries) == 0:
        return no_hits(len(queries), k, np.float32)
    features, codebook = queries.data.astype(np.float32), segments[0].codebook
    check_query_vectors(features, codebook.centres.shape[1])
    words = codebook.nearest(features, config.multiple_assignment, threads=threads)
    asked = []
    for start, stop in itertools.pairwise(queries.offsets.tolist()):
        one = np.zeros(stop - start, np.int64)
        asked.append(aggregate(codebook, features[start:stop], one, words[start:stop]))
    similarities = _selective(features.shape[1], config.alpha, config.tau)
    parts = [no_hits(len(queries), k, np.float32) for _ in segments]

    def search(query: int, number: int) -> None:
        mask = None if masks is None else masks[number]
        hits = segments[number].search(asked[query], k, similarities, mask)
        parts[number].distances[query], parts[number].rows[query] = hits.distances[0], hits.rows[0]

    run_all(search, [(i, j) for i in range(len(queries)) for j in range(len(segments))], threads)
    return parts[0] if len(segments) == 1 else merge(parts, k)


def _selective(bits: int, alpha: float, tau: float) -> Doubles:
    """float64 [bits + 1]: s(1 − 2h/D) for each number h of different bits."""
    similarities = 1 - 2 * np.arange(bits + 1) / bits
    powers: Doubles = np.where(similarities > tau, np.maximum(similarities, 0) ** alpha, 0.0)
    return powers


def _packed(signs: npt.NDArray[np.bool_]) -> Words:
    """Signs [p, d] as uint64 [p, ceil(d / 64)], the first in the lowest bit; the rest are zeros."""
    rows, bits = signs.shape
    room = np.zeros((rows, -(-bits // 64) * 8), np.uint8)
    room[:, : -(-bits // 8)] = np.packbits(signs, axis=1, bitorder="little")
    return room.view(np.uint64)


def _blocks(features: FeatureSegment) -> list[slice]:
    """Images in groups with some number of features, or a bit more; at least one group."""
    cuts = [0]
    while cuts[-1] < len(features):
        most = features.offsets[cuts[-1]] + _FEATURES_AT_ONCE
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(features.offsets, most, side="right")) - 1))
    return [slice(a, b) for a, b in itertools.pairwise(cuts)] or [slice(0, 0)]


def _aggregated(codebook: Codebook, segment: FeatureSegment, rows: slice, threads: int) -> Aggregated:
    """Of some images of a segment, which are numbered as there."""
    start, stop = segment.offsets[rows.start], segment.offsets[rows.stop]
    features = segment.data[start:stop].astype(np.float32)
    counts = np.diff(segment.offsets[rows.start : rows.stop + 1])
    images = np.repeat(np.arange(rows.start, rows.stop), counts)
    return aggregate(codebook, features, images, codebook.nearest(features, 1, threads=threads))
