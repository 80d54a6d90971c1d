"""FAISS's indices over vectors: trained, filled, opened, and asked for candidates.

An index is trained once, on a sample of all rows; each shard is filled from a copy of what was trained, with
its own rows numbered from 0. How hard a search looks goes with each call: an opened index is never changed,
so searches may run side by side. FAISS itself gets one thread a call: shards and blocks of queries are shared
out instead.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import ArtefactError, RecipeError
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.hits import NO_ROW, Hits, no_hits
from ray_retrieval.search.kmeans import centres_of
from ray_retrieval.search.vector_kernels import Floats

faiss: Any = untyped_faiss  # Its own types leave out half of what is there.

ROWS_PER_CELL = 39
"""To train on: FAISS warns below it, and k-means gets worse."""

_ROWS_AT_ONCE = 1 << 16
_TOO_FEW_LINKS = re.compile(r"HNSW0*[01](?!\d)")
"""With fewer than 2, FAISS ends the process."""
_MEND = "take another factory string, or 'auto'; see FAISS's wiki, 'The index factory'"


def train(factory: str, sample: Floats, seed: int, *, threads: int = 1) -> bytes:
    """An empty index that has been trained, in FAISS's file format; the same for the same arguments.

    Args:
        factory: string of FAISS.
        sample: float32 [m, d], rows drawn from the whole database.
        seed: of the order in which the sample is seen.
        threads: for the cells of an inverted file, if there are any and nothing transforms rows before them.

    Raises:
        RecipeError: if the string is not one of FAISS's, does not fit the dimension or the squared Euclidean
            distance, or needs a larger sample.
    """
    count, dimension = sample.shape
    shuffled = sample[np.random.default_rng(seed).permutation(count)]
    index = untrained(factory, dimension, count)
    with one_faiss_thread(), _refusing(factory):
        _train_cells(index, shuffled, threads)
        index.train(shuffled)
        trained: bytes = faiss.serialize_index(index).tobytes()
        # Some kinds only say now that they cannot be filled, or searched.
        index.add(shuffled[:ROWS_PER_CELL])
        candidates(index, shuffled[:1], 1, Effort())
    return trained


def _train_cells(index: Any, sample: Floats, threads: int) -> None:
    """Give an inverted file its cells, which FAISS then takes; none where they are found in another way."""
    ivf = faiss.downcast_index(index)
    if not isinstance(ivf, faiss.IndexIVF):
        return
    if isinstance(coarse := faiss.downcast_index(ivf.quantizer), faiss.IndexFlat) and coarse.ntotal == 0:
        some = sample[: ivf.nlist * ivf.cp.max_points_per_centroid]
        coarse.add(centres_of(some, ivf.nlist, _nearest, threads=threads))


def _nearest(centres: Floats, rows: Floats) -> npt.NDArray[np.int64]:
    flat = faiss.IndexFlatL2(centres.shape[1])
    flat.add(centres)
    return candidates(flat, rows, 1, Effort()).rows[:, 0]


def untrained(factory: str, dimension: int, rows: int) -> Any:
    """FAISS's index of a factory string, as it is made.

    Args:
        factory: string of FAISS.
        dimension: of the vectors.
        rows: that there are to train on.

    Raises:
        RecipeError: as `train`, as far as it can be said by now.
    """
    with _refusing(factory):
        if _TOO_FEW_LINKS.search(factory):
            raise RuntimeError("Error: a graph has at least 2 links a row, such as HNSW32")
        index = faiss.index_factory(dimension, factory, faiss.METRIC_L2)
        check_sample(factory, cells_of(index), rows)
        if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
            raise RuntimeError("Error: rows are numbered here, leave out what maps their ids")
        # Seconds for each part of a vector, for a search by Hamming distance that is not made here.
        inner = innermost(index)
        if hasattr(inner, "do_polysemous_training"):
            inner.do_polysemous_training = False
    return index


def cells_of(index: Any) -> int:
    """Cells that it divides its rows into; 0 if it does not."""
    ivf = faiss.try_extract_index_ivf(index)
    return 0 if ivf is None else int(ivf.nlist)


def check_sample(factory: str, cells: int, rows: int) -> None:
    """Raise RecipeError if there are fewer rows to train on than cells."""
    if rows < max(cells, 1):
        raise RecipeError(
            f"'{factory}' has {cells:,} cells, and there are {rows:,} rows to train on",
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
    with one_faiss_thread(), _refusing(type(index).__name__):
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            index.add(np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE], np.float32))
        faiss.write_index(index, faiss.PyCallbackIOWriter(write))


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


def candidates(
    index: Any,
    queries: Floats,
    count: int,
    effort: Effort,
    selected: npt.NDArray[np.uint8] | None = None,
) -> Hits:
    """What is nearest by the structure alone, on one thread.

    The library is called past `Index.search`: other packages replace that for torch's tensors, and take no
    parameters any more.

    Args:
        index: of FAISS.
        queries: float32 [q, d], C-contiguous.
        count: candidates per query.
        effort: how hard to look.
        selected: a bit for each row, the lowest of a byte first: whether it may be a candidate; default all.
            Only for an index that `selects`.

    Returns:
        Hits [q, count]: places in what the index was filled with, and squared Euclidean distances to what it
        holds of them; `NO_ROW` at infinity where there are fewer.
    """
    found = no_hits(len(queries), count, np.float32)
    pointers = [faiss.swig_ptr(array) for array in (queries, found.distances, found.rows)]
    with one_faiss_thread():
        parameters, _kept = _parameters(index, effort, count, _selector(selected))
        index.search_c(len(queries), pointers[0], count, *pointers[1:], parameters)
    found.distances[found.rows == NO_ROW] = np.inf
    return found


def holds_vectors(index: Any) -> bool:
    """Whether candidates are found by distances to the vectors themselves, not to something compressed."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return holds_vectors(index.base_index)
    return isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexHNSWFlat | faiss.IndexNSGFlat)


def settings_of(index: Any) -> frozenset[str]:
    """Names of the fields of `Effort` that make a difference to what it finds."""
    inner, names = innermost(index), set[str]()
    if isinstance(inner, faiss.IndexIVF):
        names.add("nprobe")
    coarse = innermost(inner.quantizer) if isinstance(inner, faiss.IndexIVF) else inner
    if isinstance(coarse, faiss.IndexHNSW):
        names.add("ef_search")
    # Asked for more candidates a graph looks further, also where it finds them by the vectors themselves.
    if not holds_vectors(index) or isinstance(inner, faiss.IndexHNSW | faiss.IndexNSG):
        names.add("k_factor")
    return frozenset(names)


def selects(index: Any) -> bool:
    """Whether FAISS can look for candidates among some of the rows only."""
    kinds = (faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexRaBitQ)
    without = (
        faiss.IndexIVFAdditiveQuantizer,
        faiss.IndexIVFPQR,
        faiss.IndexIVFSpectralHash,
        faiss.IndexIVFFlatDedup,  # it leaves out all equal rows where the first may not be found
    )
    inner = innermost(index)
    return isinstance(inner, kinds) and not isinstance(inner, without)


def innermost(index: Any) -> Any:
    """The index without what transforms its vectors or compares its candidates."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return innermost(index.index)
    return innermost(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def _selector(selected: npt.NDArray[np.uint8] | None) -> Any:
    return None if selected is None else faiss.IDSelectorBitmap(selected)


def _parameters(index: Any, effort: Effort, count: int, selector: Any = None) -> tuple[Any, list[Any]]:
    """FAISS's parameters of one search for `count` candidates, and what they point to without owning it."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner, kept = _parameters(index.index, effort, count, selector)
        made = None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    elif isinstance(index, faiss.IndexRefine):
        inner, kept = _parameters(index.base_index, effort, count, selector)
        made = faiss.IndexRefineSearchParameters(k_factor=1.0, base_index_params=inner)
    elif isinstance(index, faiss.IndexIVF):
        nprobe = min(effort.nprobe, index.nlist)
        inner, kept = _parameters(index.quantizer, effort, nprobe)
        made = faiss.SearchParametersIVF(nprobe=nprobe, quantizer_params=inner, sel=selector)
    elif isinstance(index, faiss.IndexHNSW):
        ef_search = max(effort.ef_search, count)
        made, kept = faiss.SearchParametersHNSW(efSearch=ef_search, sel=selector), []
    else:
        made, kept = None if selector is None else faiss.SearchParameters(sel=selector), []
    return made, [*kept, made, selector]


@contextmanager
def one_faiss_thread() -> Iterator[None]:
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
