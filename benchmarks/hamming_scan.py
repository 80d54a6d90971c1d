"""Exact nearest neighbours of binary codes, against FAISS, in one run.

    python benchmarks/hamming_scan.py                       1,000,000 rows of 32, 48 and 64 bits
    python benchmarks/hamming_scan.py --rows 10000000 --bits 64 --batch 32

Both search the same uniform codes. FAISS is asked in three ways: `knn_hamming`, `IndexBinaryFlat`, and, for
widths that it has no fast path for, `IndexBinaryFlat` over codes filled up with zeros to 64 bits; `ratio` is
to the fastest of the three. Times are the shortest wall times of several runs. FAISS shares queries among
threads, but not the rows of one query.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import faiss
import numpy as np
import numpy.typing as npt

from ray_retrieval.search.scan import scan, to_words

Codes = npt.NDArray[np.uint8]


def seconds(work: Callable[[], object], at_least: int) -> float:
    """The shortest of at least so many runs and half a second's worth of them, after one to warm up."""
    work()
    taken: list[float] = []
    while len(taken) < at_least or (sum(taken) < 0.5 and len(taken) < 200):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def flat_index(codes: Codes) -> faiss.IndexBinaryFlat:
    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(codes)
    return index


def filled_up(codes: Codes) -> Codes:
    """The codes with zero bytes behind them, up to 64 bits."""
    return np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))


def measure(rows: int, bits: int, batch: int, threads: int) -> None:
    random = np.random.default_rng(bits)
    database, queries = (random.integers(0, 256, (n, bits // 8), dtype=np.uint8) for n in (rows, batch))
    flat = flat_index(database)
    stored = to_words(database, bits).view(np.uint8)  # As an index stores them: whole words.
    peers: dict[str, Callable[[Codes, int], object]] = {
        "knn": lambda wanted, k: faiss.knn_hamming(wanted, database, k),
        "flat": flat.search,
    }
    if bits % 64:
        filled = flat_index(filled_up(database))
        peers["flat64"] = lambda wanted, k: filled.search(filled_up(wanted), k)
    for k in (10, 100):
        found = scan(stored, queries[:5], bits, k, threads=threads).distances
        assert np.array_equal(found, flat.search(queries[:5], k)[0])
        for count in (1, batch):
            for used in sorted({1, threads}):
                faiss.omp_set_num_threads(used)
                wanted = queries[:count]
                ours = seconds(partial(scan, stored, wanted, bits, k, threads=used), 5)
                theirs = {name: seconds(partial(search, wanted, k), 3) for name, search in peers.items()}
                rate = rows * count / ours / 1e9
                cells = "".join(
                    f"{1e3 * theirs[name]:10.2f}" if name in theirs else f"{'':10}"
                    for name in ("knn", "flat", "flat64")
                )
                print(
                    f"{bits:4}{count:8}{k:6}{used:9}{1e3 * ours:10.2f}{rate:8.2f}{cells}"
                    f"{min(theirs.values()) / ours:8.1f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 48, 64], help="multiples of 8")
    parser.add_argument("--batch", type=int, default=256, help="queries of a batch")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="measured besides one thread"
    )
    options = parser.parse_args()
    print(f"{options.rows:,} rows; ms; G/s = 10^9 distances a second\n")
    print(
        f"{'bits':>4}{'queries':>8}{'k':>6}{'threads':>9}{'ours':>10}{'G/s':>8}"
        f"{'knn':>10}{'flat':>10}{'flat64':>10}{'ratio':>8}"
    )
    for bits in options.bits:
        measure(options.rows, bits, options.batch, options.threads)


if __name__ == "__main__":
    main()
