"""Approximate search over unit vectors: a FAISS index names candidates, their exact distances rank them.

For each query, FAISS finds `k_factor` · k candidates in whatever structure its factory string describes, from
compressed vectors or a graph. Their distances are then measured exactly on the vectors themselves, which lie
in a memory-mapped file. So every distance is exact, hits are sorted by (distance, row), and what is
approximate is only that a near row may be missing: `recall` says how often.

An index is trained once, on a sample of all rows; each shard is filled from a copy of what was trained, with
its own rows numbered from 0. Searching every shard and merging is then as good as searching one.

How hard a search looks (`Effort`) goes with each call. An opened index is never changed, so searches may run
side by side. FAISS itself gets one thread a call: shards and blocks of queries are shared out instead.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import faiss as untyped_faiss
import numpy as np
import numpy.typing as npt
from pydantic import ByteSize, Field, field_validator

from ray_retrieval.config import Config
from ray_retrieval.errors import ArtefactError, MetricError, QueryError, RecipeError
from ray_retrieval.search.hits import NO_ROW, Hits, merge, no_hits
from ray_retrieval.search.threads import run_all
from ray_retrieval.search.vector_kernels import Floats
from ray_retrieval.search.vectors import VectorSegment, check_query_vectors, distances_to

faiss: Any = untyped_faiss  # Its own types leave out half of what is there.

EXACT_ROWS = 200_000
"""Up to so many rows `auto` searches exactly: a few milliseconds, no training, nothing missed."""

_ROWS_PER_CELL = 39  # FAISS warns below it, and k-means gets worse
_BLOCK_QUERIES = 64
_ROWS_AT_ONCE = 1 << 16
_MEND = "take another factory string, or 'auto'; see FAISS's wiki, 'The index factory'"


class Effort(Config):
    """How hard a search looks for candidates."""

    nprobe: int = Field(default=64, ge=1)
    """Cells that are visited, of kinds that divide the rows into cells (IVF)."""
    ef_search: int = Field(default=64, ge=1)
    """Length of the list of candidates in a graph (HNSW); never less than the candidates asked for."""
    k_factor: int | None = Field(default=None, ge=1)
    """Candidates per hit, which are then compared exactly. None: 2 where the structure holds the vectors as
    they are, 16 where it holds them compressed."""


class ApproximateConfig(Effort):
    """Which search an index of vectors is built for."""

    search: str = "exact"
    """`exact`; `auto`: by the number of rows; or a factory string of FAISS, such as `IVF1024,PQ64x4fs`."""
    train_rows: int = Field(default=131_072, ge=1)
    """Rows drawn at random to train on, at most."""
    memory: ByteSize | None = Field(default=None, gt=0)
    """Of the structure that `auto` chooses, over all shards; the vectors stay on disk and do not count."""
    recall_queries: int = Field(default=1000, ge=1)
    """Rows drawn at random as queries, to compare the hits with those of the exact search."""

    @field_validator("search")
    @classmethod
    def _not_empty(cls, search: str) -> str:
        if not search.strip():
            raise ValueError("it is 'exact', 'auto' or a factory string of FAISS")
        return search.strip()


class Choice(NamedTuple):
    """What `auto` comes to.

    Attributes:
        factory: string of FAISS; None for the exact search.
        why: in a sentence.
    """

    factory: str | None
    why: str


def choose(rows: int, dimension: int, memory: int | None = None, *, train_rows: int = 131_072) -> Choice:
    """The search for so many rows of a dimension.

    Above `EXACT_ROWS`, rows are divided into about √rows cells, and each is held as 4 bits for every 2
    dimensions, or for every 4, 8 or 16 where the memory is short.

    Args:
        rows: of the whole database.
        dimension: of the vectors.
        memory: bytes that the structure may take, over all shards; None: any.
        train_rows: rows that it will be trained on; each cell needs 39.

    Raises:
        RecipeError: if no structure fits the memory.
    """
    if rows <= EXACT_ROWS:
        return Choice(None, f"{rows:,} rows are searched exactly, as all databases up to {EXACT_ROWS:,} are")
    cells, sample = 2 ** round(math.log2(math.sqrt(rows))), min(train_rows, rows)
    as_many = "about √rows"
    while cells > 1 and cells * _ROWS_PER_CELL > sample:
        cells, as_many = cells // 2, f"as many as {sample:,} rows to train on allow"
    needed = 0
    for width in (2, 4, 8, 16):
        parts = 2 * -(-dimension // (2 * width))  # An even number, which is what FAISS stores.
        needed = rows * (parts // 2 + 8) + cells * 4 * dimension
        if memory is None or needed <= memory:
            filled = f"Pad{parts * width}," if parts * width != dimension else ""
            return Choice(
                f"{filled}IVF{cells},PQ{parts}x4fs",
                f"{rows:,} rows in {cells:,} cells ({as_many}), 4 bits for every {width} dimensions: "
                f"{parts // 2 + 8} bytes a row, {needed / 1e6:,.0f} MB in all",
            )
    raise RecipeError(
        f"approximate search over {rows:,} rows takes at least {needed:,} bytes, allowed are {memory:,}",
        mend="allow more memory, or search exactly: that takes none of its own",
    )


def train(factory: str, sample: Floats, seed: int) -> bytes:
    """An empty index that has been trained, in FAISS's file format; the same for the same arguments.

    Args:
        factory: string of FAISS.
        sample: float32 [m, d], rows drawn from the whole database.
        seed: of the order in which the sample is seen.

    Raises:
        RecipeError: if the string is not one of FAISS's, does not fit the dimension or the squared Euclidean
            distance, or needs a larger sample.
    """
    count, dimension = sample.shape
    shuffled = sample[np.random.default_rng(seed).permutation(count)]
    with _one_faiss_thread(), _refusing(factory):
        index = faiss.index_factory(dimension, factory, faiss.METRIC_L2)
        _check_sample(index, factory, count)
        index.train(shuffled)
        trained: bytes = faiss.serialize_index(index).tobytes()
        # Some kinds only say now that they cannot be filled, or searched.
        index.add(shuffled[:_ROWS_PER_CELL])
        candidates(index, shuffled[:1], 1, Effort())
    return trained


def _check_sample(index: Any, factory: str, count: int) -> None:
    ivf = faiss.try_extract_index_ivf(index)
    cells = 0 if ivf is None else ivf.nlist
    if count < max(cells, 1):
        raise RecipeError(
            f"'{factory}' has {cells:,} cells, and there are {count:,} rows to train on",
            where="search",
            mend="take fewer cells, or train on more rows",
        )


def fill(
    trained: bytes, vectors: "Floats | npt.NDArray[np.float16]", write: Callable[[bytes], object]
) -> None:
    """Write the index of one shard, in FAISS's file format; the same for the same arguments.

    Args:
        trained: by `train`.
        vectors: float32 or float16 [n, d]; candidates are places in it.
        write: takes the next bytes of the file.

    Raises:
        RecipeError: if the index cannot be filled so.
    """
    index = faiss.deserialize_index(np.frombuffer(trained, np.uint8))
    with _one_faiss_thread(), _refusing(type(index).__name__):
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            index.add(np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE], np.float32))
        faiss.write_index(index, faiss.PyCallbackIOWriter(write))


def emptied(path: str | Path) -> bytes:
    """What `train` gave, from a file that `fill` wrote of it.

    Raises:
        ArtefactError: if the file is missing or damaged.
    """
    with _reading(path):
        index = faiss.read_index(str(path))
    index.reset()
    trained: bytes = faiss.serialize_index(index).tobytes()
    return trained


def open_index(path: str | Path, rows: int, dimension: int) -> Any:
    """FAISS's index in a file that `fill` wrote; its codes are mapped into memory, not read, where it can.

    Raises:
        ArtefactError: if the file is missing, damaged, or not of so many vectors of this dimension.
    """
    with _reading(path):
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    if (index.ntotal, index.d) != (rows, dimension):
        raise ArtefactError(
            f"it holds {index.ntotal:,} vectors of {index.d} dimensions, the shard {[rows, dimension]}",
            where=path,
            mend="build the index again",
        )
    return index


class ApproximateSegment:
    """The index of one shard, opened for searching, beside its vectors.

    Args:
        path: of the file that `fill` wrote; see `open_index`.
        vectors: what it was filled with.

    Raises:
        ArtefactError: if the file is missing, damaged or of other vectors.
    """

    def __init__(self, path: str | Path, vectors: VectorSegment) -> None:
        self._index = open_index(path, *vectors.vectors.shape)
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: Floats, k: int, effort: Effort) -> Hits:
        """The `k` nearest rows for each query among the candidates, sorted by (distance, row).

        Args:
            queries: float32 [q, d], finite.
            k: hits per query; `NO_ROW` at infinity where there are fewer.
            effort: how hard to look.

        Returns:
            Hits [q, k] with exact float32 distances.

        Raises:
            ArtefactError: if the queries' type, shape or dimension does not fit.
            QueryError: if `k` < 1 or a query holds what is no finite number.
        """
        if k < 1:
            raise QueryError(f"k is the number of hits to return and at least 1, got {k}")
        check_query_vectors(queries, self._index.d)
        if len(self) == 0 or len(queries) == 0:
            return no_hits(len(queries), k, np.float32)
        factor = effort.k_factor or (2 if _holds_vectors(self._index) else 16)
        count = min(k * factor, len(self))
        found = candidates(self._index, np.ascontiguousarray(queries), count, effort).rows
        distances = distances_to(self.vectors.vectors, queries, found)
        rows = np.where(found == NO_ROW, NO_ROW, found + self.vectors.first_row)
        return merge([Hits(distances, rows)], k)


def search_approximate(
    segments: Sequence[ApproximateSegment], queries: Floats, k: int, effort: Effort, *, threads: int = 1
) -> Hits:
    """The `k` nearest candidates over several segments; see `ApproximateSegment.search`.

    Args:
        segments: without overlap of rows; an empty list is allowed.
        queries: float32 [q, d], finite.
        k: hits per query.
        effort: how hard to look in each segment.
        threads: to share the work among, at least 1; the result does not depend on it.
    """
    if not segments or len(queries) == 0:
        return no_hits(len(queries), k, np.float32)
    found = [no_hits(len(queries), k, np.float32) for _ in segments]
    starts = range(0, len(queries), _BLOCK_QUERIES)

    def search(start: int, number: int) -> None:
        some = slice(start, start + _BLOCK_QUERIES)
        hits, out = segments[number].search(queries[some], k, effort), found[number].take(some)
        out.distances[:], out.rows[:] = hits.distances, hits.rows

    run_all(search, [(start, number) for start in starts for number in range(len(segments))], threads)
    return found[0] if len(segments) == 1 else merge(found, k)


def recall(exact: Hits, found: Hits) -> float:
    """The share of the exact hits that another search found, over all queries.

    A hit at the distance of the last exact one counts, whichever of the rows at that distance it is.

    Args:
        exact: Hits [q, k] of the exact search.
        found: Hits [q, at least k] of the other one over the same rows, with exact distances.

    Raises:
        MetricError: if there are no exact hits, or fewer hits were asked for.
    """
    q, k = exact.rows.shape
    if len(found) != q or found.rows.shape[1] < k:
        raise MetricError(f"recall needs hits [{q}, {k}] of both searches, got {list(found.rows.shape)}")
    real = exact.rows != NO_ROW
    wanted = real.sum(axis=1)
    if wanted.sum() == 0:
        raise MetricError("there are no hits, so there is nothing to measure")
    last = exact.distances[np.arange(q), np.maximum(wanted - 1, 0)]
    near = (found.rows[:, :k] != NO_ROW) & (found.distances[:, :k] <= last[:, None])
    return float(np.minimum(near.sum(axis=1), wanted).sum() / wanted.sum())


def candidates(index: Any, queries: Floats, count: int, effort: Effort) -> Hits:
    """What is nearest by the structure alone, on one thread.

    The library is called past `Index.search`: other packages replace that for torch's tensors, and take no
    parameters any more.

    Args:
        index: of FAISS.
        queries: float32 [q, d], C-contiguous.
        count: candidates per query.
        effort: how hard to look.

    Returns:
        Hits [q, count]: places in what the index was filled with, and squared Euclidean distances to what it
        holds of them; `NO_ROW` at infinity where there are fewer.
    """
    found = no_hits(len(queries), count, np.float32)
    pointers = [faiss.swig_ptr(array) for array in (queries, found.distances, found.rows)]
    with _one_faiss_thread():
        parameters, _kept = _parameters(index, effort, count)
        index.search_c(len(queries), pointers[0], count, *pointers[1:], parameters)
    found.distances[found.rows == NO_ROW] = np.inf
    return found


def _holds_vectors(index: Any) -> bool:
    """Whether candidates are found by distances to the vectors themselves, not to something compressed."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return _holds_vectors(index.base_index)
    return isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexHNSWFlat | faiss.IndexNSGFlat)


def _parameters(index: Any, effort: Effort, count: int) -> tuple[Any, list[Any]]:
    """FAISS's parameters of one search for `count` candidates, and what they point to without owning it."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner, kept = _parameters(index.index, effort, count)
        made = None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    elif isinstance(index, faiss.IndexRefine):
        inner, kept = _parameters(index.base_index, effort, count)
        made = faiss.IndexRefineSearchParameters(k_factor=1.0, base_index_params=inner)
    elif isinstance(index, faiss.IndexIVF):
        nprobe = min(effort.nprobe, index.nlist)
        inner, kept = _parameters(index.quantizer, effort, nprobe)
        made = faiss.SearchParametersIVF(nprobe=nprobe, quantizer_params=inner)
    elif isinstance(index, faiss.IndexHNSW):
        made, kept = faiss.SearchParametersHNSW(efSearch=max(effort.ef_search, count)), []
    else:
        made, kept = None, []
    return made, [*kept, made]


@contextmanager
def _one_faiss_thread() -> Iterator[None]:
    """FAISS and its BLAS take one thread in calls of this thread; OpenMP keeps the number for each thread."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def _refusing(factory: str) -> Iterator[None]:
    """Say FAISS's errors in one line."""
    try:
        yield
    except RuntimeError as error:
        raise RecipeError(
            f"FAISS cannot build '{factory}': {_reason(error)}", where="search", mend=_MEND
        ) from None


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Say which file is damaged."""
    try:
        yield
    except RuntimeError as error:
        raise ArtefactError(
            f"damaged: {_reason(error)}", where=path, mend="restore the file, or build the index again"
        ) from None


def _reason(error: RuntimeError) -> str:
    """The last part of FAISS's message, which names functions, files and lines first."""
    text = " ".join(str(error).split())
    return re.sub(r".*(?:\.(?:cpp|h):\d+: |' failed: |Error: )", "", text) or text
