"""The searches of unit vectors that `search.py` measures: all of them, and at equal recall."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from book import claim, on_threads
from databases import clustered_vectors, unit_vectors
from equal_recall import K, compare, ours
from peers import Peer, hnswlib_graph, usearch_graph
from timing import seconds

from ray_retrieval.descriptors import Vectors
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.vectors import VectorSegment, norm_error, search_vectors

Floats = npt.NDArray[np.float32]

_BATCH, _APPROXIMATE_BATCH = 256, 1000
_CLAIMED = 10


def measure_exact(rows: int, dimension: int, threads: int) -> None:
    """One table: queries at a time, k, threads."""
    database, queries = unit_vectors(rows, dimension, 1), unit_vectors(_BATCH, dimension, 2)
    segments = [VectorSegment(database, 0, norm_error(database))]
    flat = {"L2": faiss.IndexFlatL2(dimension), "IP": faiss.IndexFlatIP(dimension)}
    for index in flat.values():
        index.add(database)
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 4 * dimension
    found, peer = search_vectors(segments, queries, 10).rows, flat["L2"].search(queries, 10)[1]
    same = 100 * np.mean(found == peer)
    print(
        f"\n{rows:,} vectors of {dimension} dimensions; ms; {same:.2f} % of the hits of IndexFlatL2 at the "
        "same place"
    )
    print(f"{'queries':>8}{'k':>6}{'threads':>9}{'ours':>10}{'GFLOP/s':>10}{'L2':>10}{'IP':>10}{'ratio':>8}")
    for count in (1, 8, _BATCH):
        for k in (10, 100, 1000):
            for used in sorted({1, threads}):
                faiss.omp_set_num_threads(used)
                wanted = queries[:count]
                taken = seconds(partial(search_vectors, segments, wanted, k, threads=used), 5)
                theirs = [seconds(partial(index.search, wanted, k), 3) for index in flat.values()]
                if k == _CLAIMED:
                    claim(
                        f"exact search of {rows:,} vectors of {dimension} dimensions, k = {k}, {count} at a "
                        f"time, {on_threads(used)}: the faster one's time over ours",
                        peer=f"FAISS, IndexFlat{'L2' if theirs[0] <= theirs[1] else 'IP'}",
                        ratio=min(theirs) / taken,
                        detail=f"{1e3 * min(theirs):.3g} ms, {1e3 * taken:.3g} ms",
                        headline=used == 1 and count in (1, _BATCH),
                    )
                speed = 2e-9 * count * rows * dimension / taken
                cells = "".join(f"{1e3 * each:10.1f}" for each in theirs)
                print(
                    f"{count:8}{k:6}{used:9}{1e3 * taken:10.1f}{speed:10.1f}{cells}"
                    f"{min(theirs) / taken:8.2f}",
                    flush=True,
                )
    faiss.cvar.distance_compute_blas_threshold = before


def measure_approximate(
    rows: int, dimension: int, factory: str, threads: int, packages: dict[str, Any], folder: Path
) -> None:
    """One table: the index that a factory string builds; all vectors; graphs."""
    database = clustered_vectors(rows, dimension, 1)
    queries = clustered_vectors(_APPROXIMATE_BATCH, dimension, 2)
    segments = [VectorSegment(database, 0, norm_error(database))]
    last = search_vectors(segments, queries, K, threads=threads).rows
    print(f"\n{rows:,} clustered vectors of {dimension} dimensions, {len(queries):,} queries, k = {K}")

    def recall(_distances: Any, found: npt.NDArray[np.int64]) -> float:
        return float(np.mean((found[:, :, None] == last[:, None, :]).any(axis=2)))

    systems = [partial(_all_vectors, segments, dimension)]
    if "hnswlib" in packages:
        systems.append(partial(hnswlib_graph, packages["hnswlib"], database, threads))
    if "usearch" in packages:
        systems.append(partial(usearch_graph, packages["usearch"], database, threads))
    with tempfile.TemporaryDirectory(dir=folder) as made:
        ours_first = partial(ours, Vectors(database), ApproximateConfig(search=factory), Path(made), threads)
        what = f"search of {rows:,} clustered vectors of {dimension} dimensions"
        compare([ours_first, *systems], queries, recall, threads, what)


def _all_vectors(segments: list[VectorSegment], dimension: int) -> Peer:
    """Our exact search."""

    def search(queries: Floats, k: int, _effort: int, threads: int) -> tuple[Any, Any]:
        hits = search_vectors(segments, queries, k, threads=threads)
        return hits.distances, hits.rows

    return Peer("ours, all vectors", search, (0,), 4 * dimension, 0.0)
