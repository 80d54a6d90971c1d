"""Exact search over unit vectors under the squared Euclidean distance: one pass, no index, sorted results.

The distance of a query q and a row x is the sum of (q_j - x_j)² in float64, added up in one fixed order and
rounded to float32. So it does not depend on shards, batches, threads, libraries or machines, it is exactly 0
for equal vectors, and rows at the same distance stand in their own order.

Such a sum for every pair would be slow. A BLAS library multiplies groups of queries with panels of rows
first, and only pairs whose product says that they may be near enough are summed up: those with

    q·x  ≥  (|q|² + |x|² - limit) / 2

where the limit is the k-th smallest distance so far, less all that the product and this comparison can be off
by. A float32 product of d terms in any order, with fused operations or without, is off by no more than
γ |q| |x|, γ = d u / (1 - d u), u = 2⁻²⁴ (Higham 2002, Accuracy and Stability of Numerical Algorithms, section
3.1). |x|² is 1 but for the segment's `norm_error`. Nothing that belongs to the nearest is ever missed; what
is looked at in vain costs a little time: most, where nearly all rows are equally far.

The rows (or the queries) are shared out among threads. Each share is exact and shares are merged exactly.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.metrics.compiled import frozen
from ray_retrieval.search.hits import NO_ROW, Hits, check_k, merge, no_hits
from ray_retrieval.search.threads import one_blas_thread, run_all
from ray_retrieval.search.vector_kernels import (
    MOST_ROWS,
    NO_KEY,
    Doubles,
    Floats,
    Rows,
    collect,
    collect_for_few,
    distances_of,
    largest_norm_error,
    write_hits,
)

_GROUP = 512  # queries that are multiplied together; twice as many gain nothing
_PANEL_ROWS = 512
_FEW = 24  # Up to so many queries our own product is faster than that of BLAS, which rearranges its factors.
_PANEL_BYTES = 1 << 18  # of a panel that stays in the second-level cache while few queries pass over it
_SMALLEST_WORK = 1 << 20  # products of two numbers; for fewer, waking a thread costs more than it saves
_BUFFERED_HITS = 1 << 23  # of one group of queries: bounds its memory to 64 MiB
_UNIT_ROUNDOFF = 2.0**-24
_LONGEST = 1e6  # Far below it, float32 products and sums do not overflow.
_UNIT = 1e-2  # By how much a squared length may differ from 1: rounding to bfloat16 makes it differ by less.


@dataclass(frozen=True)
class VectorSegment:
    """Consecutive rows to search.

    Attributes:
        vectors: float32 [n, d], C-contiguous; a read-only memory-mapped file is welcome.
        first_row: the row number of the first of them.
        norm_error: what `norm_error` says of them, or more. Where it is too small, hits may be missed.

    Raises:
        ArtefactError: if the array is of another type, shape or layout, or holds what is no finite number.
    """

    vectors: Floats
    first_row: int
    norm_error: float

    def __post_init__(self) -> None:
        _check(self.vectors, "vectors to search")
        if not self.vectors.flags.c_contiguous:
            raise ArtefactError("vectors to search lie row after row", mend="use numpy.ascontiguousarray")
        if not self.norm_error <= _LONGEST**2:
            raise ArtefactError(
                "vectors to search are finite and of length 1", mend="divide each by its length"
            )

    def __len__(self) -> int:
        return len(self.vectors)


def norm_error(vectors: Floats) -> float:
    """The largest | |x|² - 1 | of the rows x, in float64; 0 without rows.

    Args:
        vectors: float32 [n, d].

    Raises:
        ArtefactError: if the array is of another type or shape, or a row holds what is no finite number.
    """
    _check(vectors, "vectors")
    largest, wrong = largest_norm_error(frozen(vectors))
    if wrong >= 0:
        raise ArtefactError(
            f"the vector in row {wrong:,} holds what is no finite number",
            mend="encode again; if it stays, training has diverged",
        )
    return float(largest)


def unit_error(vectors: Floats) -> float:
    """`norm_error` of vectors that have to be of length 1, but for rounding.

    Args:
        vectors: float32 [n, d].

    Raises:
        ArtefactError: as `norm_error`, and if one is of another length.
    """
    error = norm_error(vectors)
    if error > _UNIT:
        squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
        worst = np.sqrt(squares[np.argmax(np.abs(squares - 1))])
        raise ArtefactError(
            f"vectors to search are of length 1, one of these is of length {worst:.4g}",
            mend="divide each by its length where it is made",
        )
    return error


def search_vectors(segments: Sequence[VectorSegment], queries: Floats, k: int, *, threads: int = 1) -> Hits:
    """The `k` nearest rows over several segments for each query, exactly.

    Args:
        segments: without overlap of rows, all of the queries' dimension; empty ones and an empty list are
            allowed.
        queries: float32 [q, d], finite.
        k: hits per query.
        threads: to share the work among, at least 1. While it runs, BLAS calls of the process that are not
            its own have one thread too.

    Returns:
        Hits [q, k], float32 distances, sorted by (distance, row); the same for any cut into segments, any
        batch of queries and any number of threads. Past the n-th place of a small database stand `NO_ROW`
        and infinity.

    Raises:
        ArtefactError: if the queries' type, shape or dimension does not fit.
        QueryError: if `k` < 1 or a query holds what is no finite number.
    """
    check_k(k)
    squares = check_query_vectors(queries, *{segment.vectors.shape[1] for segment in segments})
    rows = sum(map(len, segments))
    if rows == 0 or len(queries) == 0:
        return no_hits(len(queries), k, np.float32)
    queries, kept = frozen(queries), min(k, rows)
    threads = max(1, min(threads, rows * queries.size // _SMALLEST_WORK))
    groups = _groups(len(queries), max(1, min(_GROUP, _BUFFERED_HITS // kept)), threads)
    # The rows are shared out where there are few queries: products of groups that are too small take longer.
    shares = max(1 if len(groups) >= threads else min(threads, rows), -(-rows // MOST_ROWS))
    parts = [_share(segments, rows * i // shares, rows * (i + 1) // shares) for i in range(shares)]
    found = [no_hits(len(queries), kept, np.float32) for _ in parts]

    def search(number: int, share: int) -> None:
        some = groups[number]
        _search(parts[share], queries[some], squares[some], found[share].take(some))

    with one_blas_thread():
        run_all(search, [(i, j) for i in range(len(groups)) for j in range(shares)], threads)
    return found[0] if shares == 1 and kept == k else merge(found, k)


def distances_to(vectors: Floats, queries: Floats, rows: Rows, *, threads: int = 1) -> Floats:
    """The distances of queries to some rows, as `search_vectors` gives them.

    Args:
        vectors: float32 [n, d].
        queries: float32 [q, d].
        rows: int64 [q, m], places in `vectors` for each query; `NO_ROW` where there is none.
        threads: to share the queries among.

    Returns:
        float32 [q, m]; infinity beside `NO_ROW`.

    Raises:
        ArtefactError: if types, shapes or dimensions do not fit, or a row is not one of the vectors'.
    """
    _check(vectors, "vectors")
    _check(queries, "queries")
    _check_dimension(vectors.shape[1], queries)
    if rows.dtype != np.int64 or rows.ndim != 2 or len(rows) != len(queries):
        raise ArtefactError(f"rows are int64 [{len(queries)}, m], got {rows.dtype} {list(rows.shape)}")
    if rows.size and not NO_ROW <= rows.min() <= rows.max() < len(vectors):
        raise ArtefactError(
            f"rows are places in {len(vectors)} vectors or {NO_ROW}, got {rows.min()} to {rows.max()}"
        )
    found = np.empty(rows.shape, np.float32)
    vectors, queries, rows = frozen(vectors), frozen(queries), frozen(rows)
    threads = max(1, min(threads, len(rows), rows.size * vectors.shape[1] // _SMALLEST_WORK))

    def measure(start: int, stop: int) -> None:
        distances_of(vectors, queries[start:stop], rows[start:stop], found[start:stop])

    cuts = [len(rows) * i // threads for i in range(threads + 1)]
    run_all(measure, list(itertools.pairwise(cuts)), threads)
    return found


def check_query_vectors(queries: Floats, *dimensions: int) -> Doubles:
    """The squared lengths of queries, float64 [q].

    Args:
        queries: float32 [q, d], finite.
        dimensions: that of the vectors to search, if there are any.

    Raises:
        ArtefactError: if the queries' type, shape or dimension does not fit.
        QueryError: if a query holds what is no finite number, or is far too long.
    """
    _check(queries, "queries")
    for dimension in dimensions:
        _check_dimension(dimension, queries)
    squares: Doubles = np.einsum("qd,qd->q", queries, queries, dtype=np.float64)
    wrong = np.flatnonzero(~(squares <= _LONGEST**2))
    if len(wrong):
        raise QueryError(f"query {wrong[0]} is not a finite vector of length 1")
    return squares


def check_unit_queries(queries: Floats) -> None:
    """Raise QueryError if a query, float32 [q, d], is not of length 1, but for rounding.

    Its nearest rows may be the same, but neither are their distances those of cosines, nor does what is made
    of both re-rank as it should.
    """
    squares = check_query_vectors(queries)
    wrong = np.flatnonzero(np.abs(squares - 1) > _UNIT)
    if len(wrong):
        raise QueryError(
            f"query {wrong[0]} is a vector of length {np.sqrt(squares[wrong[0]]):.4g}, not 1",
            mend="divide each vector by its length",
        )


def _check(vectors: Floats, what: str) -> None:
    if vectors.dtype != np.float32 or vectors.ndim != 2:
        raise ArtefactError(f"{what} are float32 [n, d], got {vectors.dtype} {list(vectors.shape)}")


def _check_dimension(dimension: int, queries: Floats) -> None:
    if dimension != queries.shape[1]:
        raise ArtefactError(
            f"the vectors have {dimension} dimensions, the queries {queries.shape[1]}",
            mend="encode the queries with the model that made the vectors",
        )


def _groups(queries: int, most: int, threads: int) -> list[slice]:
    """Queries in groups of nearly the same size: as many for each thread, if there is one for each at all."""
    count = -(-queries // most)
    if count > 1:
        count = min(-(-count // threads) * threads, queries)
    return [slice(queries * i // count, queries * (i + 1) // count) for i in range(count)]


def _share(segments: Sequence[VectorSegment], start: int, stop: int) -> list[VectorSegment]:
    """The rows from place `start` to `stop` of the concatenated segments."""
    share: list[VectorSegment] = []
    before = 0
    for segment in segments:
        low, high = max(start - before, 0), min(stop - before, len(segment))
        if low < high:
            vectors = frozen(segment.vectors[low:high])
            share.append(VectorSegment(vectors, segment.first_row + low, segment.norm_error))
        before += len(segment)
    return share


def _search(segments: list[VectorSegment], queries: Floats, squares: Doubles, out: Hits) -> None:
    """Fill `out` with the nearest rows of a group of queries."""
    k, dimension = out.rows.shape[1], queries.shape[1]
    heaps = np.full((len(queries), k + 1), NO_KEY)
    heaps[:, k] = 0
    few = len(queries) <= _FEW
    rows = max(1, min(_PANEL_ROWS, _PANEL_BYTES // (4 * max(1, dimension)))) if few else _PANEL_ROWS
    room = np.empty(0 if few else len(queries) * rows, np.float32)
    places = np.cumsum([0, *map(len, segments)])
    for segment, place in zip(segments, places.tolist(), strict=False):
        vectors, bases = segment.vectors, _bases(squares, segment)
        if few:
            collect_for_few(vectors, place, rows, queries, bases, heaps)
            continue
        for start in range(0, len(segment), rows):
            panel = vectors[start : start + rows]
            products = room[: len(queries) * len(panel)].reshape(len(queries), len(panel))
            np.matmul(queries, panel.T, out=products)
            collect(products, panel, place + start, queries, bases, heaps)
    first_rows = np.array([segment.first_row for segment in segments], np.int64)
    write_hits(heaps, places[:-1], first_rows, out.distances, out.rows)


def _bases(squares: Doubles, segment: VectorSegment) -> Doubles:
    """For each query, half the least that |q|² + |x|² can be, less all that a product can be off by.

    Args:
        squares: float64 [q], |q|² of the queries.
        segment: to be multiplied with.

    Returns:
        float64 [q]; a row whose product is below this less half the limit is beyond the limit (`_threshold`).
    """
    dimension = segment.vectors.shape[1]
    gamma = dimension * _UNIT_ROUNDOFF / (1 - dimension * _UNIT_ROUNDOFF)
    query, row = np.sqrt(squares), np.sqrt(1 + segment.norm_error)
    # Then what float64 rounds away here and in the exact sums, and what processors may take for zero.
    rounding = 2.0**-40 * (squares + row**2) + 2.0**-124 * dimension * (1 + query + row)
    bases: Doubles = (squares + 1 - segment.norm_error) / 2 - gamma * query * row - rounding
    return bases
