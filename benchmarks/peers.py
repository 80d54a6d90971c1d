"""The libraries that searches are compared with: FAISS, and usearch and hnswlib where they are installed.

An approximate search has an effort: cells visited (FAISS's IVF), or the length of the list of candidates
(graphs: `ef`, which usearch calls `expansion_search`).
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from ray_retrieval.search.tuning import quarters

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Found = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]
"""Distances [q, k] and rows int64 [q, k]."""

PACKAGES = ("usearch", "hnswlib")
LINKS, LIST = 16, 128
"""Of the graphs: links of a node (twice as many in the lowest layer), and the candidates when it is added."""


@dataclass(frozen=True)
class Peer:
    """A search built over a database.

    Attributes:
        name: of the library and of what it built.
        search: takes queries, k, effort and threads.
        efforts: to try, ascending; one that does not matter where the search is exact.
        row_bytes: that it holds in memory for a row.
        built_s: seconds that building took.
        at_once: queries that it needs at a time to be as fast as it gets.
        said: of an effort, where it is not said by its number.
    """

    name: str
    search: Callable[[Any, int, int, int], Found]
    efforts: tuple[int, ...]
    row_bytes: float
    built_s: float
    at_once: int = 1
    said: Callable[[int], str] = str


def installed() -> dict[str, Any]:
    """The packages that are there, by name; says which are not."""
    found: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.import_module("usearch.index" if name == "usearch" else name)
        except ImportError as error:
            print(f"not compared with {name} ({error}): pip install '.[peers]'")
    return found


def faiss_binary_flat(codes: Bytes) -> Peer:
    """`IndexBinaryFlat`, which holds the codes once more: filled up with zeros to whole words of 64 bits.

    FAISS is slow with widths such as 48 bits.
    """
    started = time.perf_counter()
    index = faiss.IndexBinaryFlat(8 * codes.shape[1] + -8 * codes.shape[1] % 64)
    index.add(_filled_up(codes))

    def search(queries: Bytes, k: int, _effort: int, threads: int) -> Found:
        faiss.omp_set_num_threads(threads)
        return _found(index.search(_filled_up(queries), k))

    return Peer("flat", search, (0,), codes.shape[1], time.perf_counter() - started, _FAISS_AT_ONCE)


def faiss_knn_hamming(codes: Bytes) -> Peer:
    """`knn_hamming` over the codes where they lie."""

    def search(queries: Bytes, k: int, _effort: int, threads: int) -> Found:
        faiss.omp_set_num_threads(threads)
        return _found(faiss.knn_hamming(queries, codes, k))

    return Peer("knn", search, (0,), 0, 0.0, _FAISS_AT_ONCE)


def usearch_exact_codes(package: Any, codes: Bytes) -> Peer:
    """usearch's exact search over the codes where they lie."""

    def search(queries: Bytes, k: int, _effort: int, threads: int) -> Found:
        metric, kind = package.MetricKind.Hamming, package.ScalarKind.B1
        found = package.search(codes, queries, k, metric, exact=True, threads=threads, dtype=kind)
        return _matches(found)

    return Peer("usearch", search, (0,), 0, 0.0)


def faiss_binary_ivf(codes: Bytes, cells: int, sample: int, threads: int) -> Peer:
    """`IndexBinaryIVF`, trained on some of the codes drawn at random."""
    faiss.omp_set_num_threads(threads)
    started = time.perf_counter()
    coarse = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index = faiss.IndexBinaryIVF(coarse, 8 * codes.shape[1], cells)
    index.train(codes[np.random.default_rng(0).choice(len(codes), min(sample, len(codes)), replace=False)])
    index.add(codes)
    built = time.perf_counter() - started

    def search(queries: Bytes, k: int, effort: int, threads: int) -> Found:
        faiss.omp_set_num_threads(threads)
        index.nprobe = effort
        return _found(index.search(queries, k))

    return Peer(f"FAISS IVF{cells}", search, tuple(quarters(4, min(512, cells))), codes.shape[1] + 8, built)


def usearch_graph(package: Any, rows: Bytes | Floats, threads: int) -> Peer:
    """A graph over packed codes under the Hamming distance, or over unit vectors under the inner product."""
    packed = rows.dtype == np.uint8
    metric = package.MetricKind.Hamming if packed else package.MetricKind.IP
    kind = package.ScalarKind.B1 if packed else package.ScalarKind.F32
    size = rows.shape[1] * (8 if packed else 1)
    started = time.perf_counter()
    index = package.Index(ndim=size, metric=metric, dtype=kind, connectivity=LINKS, expansion_add=LIST)
    index.add(np.arange(len(rows), dtype=np.uint64), rows, threads=threads)
    built = time.perf_counter() - started

    def search(queries: Any, k: int, effort: int, threads: int) -> Found:
        index.expansion_search = effort
        return _matches(index.search(queries, k, threads=threads))

    return Peer("usearch HNSW", search, _EFFORTS, index.memory_usage / len(rows), built)


def hnswlib_graph(package: Any, vectors: Floats, threads: int) -> Peer:
    """A graph over vectors under the squared Euclidean distance."""
    started = time.perf_counter()
    index = package.Index(space="l2", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), ef_construction=LIST, M=LINKS, random_seed=0)
    index.add_items(vectors, np.arange(len(vectors)), num_threads=threads)
    built = time.perf_counter() - started

    def search(queries: Floats, k: int, effort: int, threads: int) -> Found:
        index.set_ef(max(effort, k))
        rows, distances = index.knn_query(queries, k, num_threads=threads)
        return distances, rows.astype(np.int64)

    return Peer("hnswlib", search, _EFFORTS, index.index_file_size() / len(vectors), built)


_FAISS_AT_ONCE = 32  # It goes over the rows once for so many.
_EFFORTS = tuple(quarters(10, 1024))  # in the steps that ours is tried in


def _found(result: tuple[npt.NDArray[Any], npt.NDArray[np.int64]]) -> Found:
    return result[0], result[1]


def _matches(result: Any) -> Found:
    distances, keys = np.atleast_2d(result.distances), np.atleast_2d(result.keys)
    return distances, keys.astype(np.int64)


def _filled_up(codes: Bytes) -> Bytes:
    return np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8))) if codes.shape[1] % 8 else codes
