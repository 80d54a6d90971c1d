"""Nearest neighbours of unit vectors, exactly and approximately, against FAISS, in one run.

    python benchmarks/vector_search.py                       1,000,000 rows of 128 dimensions
    python benchmarks/vector_search.py --rows 300000 --no-approximate

All search the same vectors: points near a 20-dimensional subspace, with noise. FAISS is asked in two ways,
`IndexFlatL2` and `IndexFlatIP`, and made to use BLAS for batches as small as 4, without which it takes
several times longer; `ratio` is to the faster of the two. Ours gives the same hits in the same order for any
batch and any number of threads, which FAISS does not promise. Times are the shortest wall times of several
runs. FAISS shares queries among threads, but not the rows of one query. Let nothing else run beside it: the
threads of FAISS wait in loops, and take many times longer where they do not have a core each.

The second table is the search that `auto` chooses (or `--factory`): the share of the exact nearest 10 that it
finds, its time a query, and the ratio to our exact search of the same queries.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from ray_retrieval.search.approximate import ApproximateSegment, recall, search_approximate
from ray_retrieval.search.choosing import choose_for_vectors
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.faiss_index import fill, train
from ray_retrieval.search.vectors import VectorSegment, norm_error, search_vectors

Floats = npt.NDArray[np.float32]


def seconds(work: Callable[[], object], at_least: int) -> float:
    """The shortest of at least so many runs and half a second's worth of them, after one to warm up."""
    work()
    taken: list[float] = []
    while len(taken) < at_least or (sum(taken) < 0.5 and len(taken) < 200):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def unit_vectors(count: int, dimension: int, seed: int, hidden: int = 20) -> Floats:
    """Points of a subspace that is the same for every seed, with noise."""
    random = np.random.default_rng(seed)
    directions = np.random.default_rng(0).standard_normal((hidden, dimension), np.float32)
    points = random.standard_normal((count, hidden), np.float32) @ directions
    points += 0.5 * random.standard_normal((count, dimension), np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points


def measure_exact(database: Floats, queries: Floats, threads: int) -> None:
    segments = [VectorSegment(database, 0, norm_error(database))]
    rows, dimension = database.shape
    flat = {"L2": faiss.IndexFlatL2(dimension), "IP": faiss.IndexFlatIP(dimension)}
    for index in flat.values():
        index.add(database)
    faiss.cvar.distance_compute_blas_threshold = 4 * dimension
    found, peer = search_vectors(segments, queries, 10).rows, flat["L2"].search(queries, 10)[1]
    print(f"exact: {100 * np.mean(found == peer):.2f} % of the hits of IndexFlatL2 at the same place\n")
    print(f"{'queries':>8}{'k':>6}{'threads':>9}{'ours':>10}{'GFLOP/s':>10}{'L2':>10}{'IP':>10}{'ratio':>8}")
    for count in sorted({1, min(8, len(queries)), len(queries)}):
        for k in (10, 100, 1000):
            for used in sorted({1, threads}):
                faiss.omp_set_num_threads(used)
                wanted = queries[:count]
                ours = seconds(partial(search_vectors, segments, wanted, k, threads=used), 5)
                theirs = [seconds(partial(index.search, wanted, k), 3) for index in flat.values()]
                speed = 2e-9 * count * rows * dimension / ours
                cells = "".join(f"{1e3 * taken:10.1f}" for taken in theirs)
                print(
                    f"{count:8}{k:6}{used:9}{1e3 * ours:10.1f}{speed:10.1f}{cells}{min(theirs) / ours:8.2f}",
                    flush=True,
                )


def measure_approximate(database: Floats, queries: Floats, factory: str, threads: int) -> None:
    segment = VectorSegment(database, 0, norm_error(database))
    start = time.perf_counter()
    sample = np.random.default_rng(0).choice(len(database), min(len(database), 131_072), replace=False)
    trained = train(factory, database[sample], seed=0)
    between = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.faiss"
        with path.open("wb") as stream:
            fill(trained, database, stream.write)
        filled, size = time.perf_counter() - between, path.stat().st_size / len(database)
        print(
            f"\n{factory}: trained in {between - start:.1f} s, filled in {filled:.1f} s on one thread, "
            f"{size:.1f} bytes a row\n"
        )
        opened = [ApproximateSegment(path, segment)]
        exact = search_vectors([segment], queries, 10, threads=threads)
        print(f"{'queries':>8}{'threads':>9}{'nprobe':>8}{'recall@10':>11}{'us/query':>10}{'ratio':>8}")
        for count in sorted({1, len(queries)}):
            for used in sorted({1, threads}):
                wanted = queries[:count]
                slow = seconds(partial(search_vectors, [segment], wanted, 10, threads=used), 3)
                for nprobe in (16, 64, 256):
                    work = partial(
                        search_approximate, opened, wanted, 10, Effort(nprobe=nprobe), threads=used
                    )
                    fast, share = seconds(work, 5), recall(exact.take(slice(count)), work())
                    cells = f"{share:11.3f}{1e6 * fast / count:10.0f}{slow / fast:8.1f}"
                    print(f"{count:8}{used:9}{nprobe:8}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256, help="queries of a batch")
    parser.add_argument("--factory", help="of the approximate search, instead of that which `auto` chooses")
    parser.add_argument("--approximate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="measured besides one thread"
    )
    options = parser.parse_args()
    database = unit_vectors(options.rows, options.dimension, 1)
    queries = unit_vectors(options.batch, options.dimension, 2)
    print(f"{options.rows:,} rows of {options.dimension} dimensions; ms\n")
    measure_exact(database, queries, options.threads)
    factory = options.factory or choose_for_vectors(options.rows, options.dimension).factory
    if options.approximate and factory is not None:
        measure_approximate(database, queries, factory, options.threads)


if __name__ == "__main__":
    main()
