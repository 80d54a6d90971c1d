"""Searching codes and vectors, exactly and approximately, against FAISS, usearch and hnswlib, in one run.

    python benchmarks/search.py                            all of it: an hour, 7 GB of memory, 8 of disk
    python benchmarks/search.py --short                    smaller ones: a minute or two
    python benchmarks/search.py billion-codes              8 GB of disk, deleted at the end; no short form
    python benchmarks/search.py codes --rows 1e6 --bits 32 48 64
    python benchmarks/search.py approximate-vectors --dimensions 128

codes: uniform codes in a file that is mapped into memory, as those of an index are; all are looked at. FAISS
is asked in two ways, `IndexBinaryFlat` (with codes filled up to 64 bits, and up to 2·10⁸ rows) and
`knn_hamming`; usearch searches exactly too, up to 10⁷ rows. `bound` is the time of one query over that of
a loop that only reads the codes with as many threads, `G/s` 10⁹ distances a second, `ratio` the fastest
peer's time over ours. Times in the columns of the peers are milliseconds for all queries of a line; slow
ones get fewer queries, and their time is scaled.

approximate-codes: signs of clustered vectors, in about √n cells, ours and FAISS's `IndexBinaryIVF`, against
the scan of all of them and, up to 10⁶, usearch's graph. hnswlib has no Hamming distance.

vectors: points near a subspace of 20 dimensions, with noise; all are looked at. FAISS is asked in two ways,
`IndexFlatL2` and `IndexFlatIP`, and made to use BLAS for batches as small as 4, without which it takes
several times longer. Ours gives the same hits in the same order for any batch and any number of threads,
which FAISS does not promise.

approximate-vectors: points in 10,000 clusters around such points (`databases.clustered_vectors`); the index
of `--factory`, by default the kind that `auto` takes for a million, against hnswlib and usearch (16 links,
128 candidates when a row is added) and the exact search.

The approximate ones are compared at equal recall: for each share of the exact nearest 10 each takes the
least effort that finds as much for 1,000 queries that are not in the database: length of a graph's list;
cells that are visited, of ours with the candidates of a hit that are compared again (x4, x16 or x64), as
`auto` tries them. `one us` is the median of queries asked alone on one thread, `us on 1` the time of a query
in a batch of 1,000, `ratio` that time over ours. Other times are the shortest of several. FAISS shares
queries among threads, but not the rows of one query. Let nothing else run beside it: the threads of FAISS
wait in loops, and take many times longer where they do not have a core each.
"""

import tempfile
from pathlib import Path

import search_codes
import search_vectors
from book import arguments, measuring, skipped
from databases import usual_factory
from peers import installed

from ray_retrieval.config import read_count
from ray_retrieval.cores import cores

PARTS = ("codes", "billion-codes", "approximate-codes", "vectors", "approximate-vectors")
FULL = {
    "codes": [100_000, 1_000_000, 10_000_000, 100_000_000],
    "billion-codes": [1_000_000_000],
    "approximate-codes": [1_000_000, 10_000_000],
    "vectors": [1_000_000],
    "approximate-vectors": [1_000_000],
}
SHORT = {
    "codes": [1_000_000],
    "billion-codes": [],
    "approximate-codes": [100_000],
    "vectors": [100_000],
    "approximate-vectors": [50_000],
}


def main() -> None:
    parser = arguments(__doc__, "fewer rows, dimensions and tables")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default all")
    parser.add_argument(
        "--rows", type=read_count, nargs="+", help="of the database, instead of the part's own"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[64], help="of codes; multiples of 8")
    parser.add_argument("--dimensions", type=int, nargs="+", help="of vectors; default 128 and 512")
    parser.add_argument("--factory", help="of our approximate search of vectors; default IVF…,PQ…x4fs")
    parser.add_argument("--threads", type=int, default=cores(), help="measured besides one thread")
    parser.add_argument("--folder", type=Path, help="where temporary files go; default the system's")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    packages = installed()
    own = SHORT if options.short else FULL
    dimensions = options.dimensions or ([128] if options.short else [128, 512])
    said = measuring(f"{options.threads} threads besides one")
    with said, tempfile.TemporaryDirectory(dir=options.folder) as made:
        shared = (options.threads, packages, Path(made))
        for part in options.parts or PARTS:
            sizes = options.rows or own[part]
            if not sizes:
                skipped(f"{part} have no short form")
            for rows in sizes:
                if part in ("codes", "billion-codes"):
                    for bits in options.bits:
                        search_codes.measure_exact(rows, bits, *shared)
                elif part == "approximate-codes":
                    for bits in options.bits:
                        search_codes.measure_approximate(rows, bits, *shared)
                elif part == "vectors":
                    for dimension in dimensions:
                        search_vectors.measure_exact(rows, dimension, options.threads)
                else:
                    for dimension in dimensions:
                        factory = options.factory or usual_factory(rows, dimension)
                        search_vectors.measure_approximate(rows, dimension, factory, *shared)


if __name__ == "__main__":
    main()
