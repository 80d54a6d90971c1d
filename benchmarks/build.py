"""How fast an index is built, against FAISS's own training and adding, and autofaiss, in one run.

    python benchmarks/build.py                             1,000,000 codes of 64 bits, and vectors of 128
    python benchmarks/build.py --short                     50,000 of each
    python benchmarks/build.py --autofaiss ENV/bin/python  autofaiss too; or AUTOFAISS_PYTHON

Ours reads embeddings with ids, labels and paths, compares their checksums, refuses ids that come twice,
writes shards of descriptors and of what is known of the rows, each with its checksum, and trains and fills
the approximate search; that stands against FAISS. In the lines with recall it measures what that search
finds as well, as every build does, by an exact search for 1,000 rows (in the others for one). A line with
workers is the command `ray-retrieval index build --workers N`, with its start and that of a local Ray; the
others are threads of one process. Both cut the database in as many shards as they have threads or workers.

FAISS reads a mapped `.npy` file, trains, adds and writes one file, with a factory string that is the same;
`IndexFlatL2` and `IndexBinaryFlat` stand against the exact search. It trains on as many rows as ours does,
with all its threads. autofaiss does the same in its way (`build_index` with that factory string and
`nprobe=64`, kept in memory, and with its measurements, so it stands against our line with recall). It needs
an older numpy than this package, so it has an environment of its own: python -m venv ENV; ENV/bin/pip
install autofaiss 'pyarrow<20'.

`IndexFlatL2` and `IndexBinaryFlat` only copy what they are given: no ids, no checksums, one file.

`ratio` is a line's time over that of our line with as many threads, of the same search and work. Files are
new for each line; embeddings lie in the page cache.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from book import arguments, claim, measuring, on_threads
from databases import clustered_codes, clustered_vectors, embedded, usual_factory
from timing import once

from ray_retrieval.cores import cores
from ray_retrieval.descriptors import Codes, Vectors
from ray_retrieval.search import Index, build
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.storage import Folder

_COMMAND = [sys.executable, "-c", "from ray_retrieval.cli import main; main()", "index", "build"]
_TRAIN_ROWS = ApproximateConfig().train_rows
_AUTOFAISS = """
import logging, sys, time
import autofaiss
started = time.perf_counter()
index, _ = autofaiss.build_index(
    sys.argv[1], save_on_disk=False, index_key=sys.argv[2], index_param="nprobe=64", metric_type="l2",
    nb_cores=int(sys.argv[3]), verbose=logging.ERROR,
)
assert index is not None
print(time.perf_counter() - started)
"""


class Table:
    """Prints a line for each build, with its ratio to our build of as many threads."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._ours: dict[tuple[str, int, bool], float] = {}
        print(f"{'':36}{'threads':>8}{'seconds':>9}{'rows/s':>12}{'ratio':>8}")

    def ours(
        self, kind: str, threads: int, taken: float, *, recall: bool = False, workers: bool = False
    ) -> None:
        if not workers:
            self._ours[kind, threads, recall] = taken
        said = f"{kind}: ours{', workers' if workers else ''}{', recall' if recall else ''}"
        self._line(said, kind, threads, taken, recall=recall)

    def peer(self, name: str, kind: str, threads: int, taken: float, *, recall: bool = False) -> None:
        ours = self._ours[kind, threads, recall]
        measured = " with its recall measured" if recall else ""
        claim(
            f"building an index of {self._rows:,} rows, {kind}, {on_threads(threads)}: its time over "
            f"ours{measured}",
            peer=name,
            ratio=taken / ours,
            detail=f"{taken:.2f} s, {ours:.2f} s",
            headline=kind not in ("codes", "vectors"),
        )
        self._line(f"{kind}: {name}", kind, threads, taken, recall=recall)

    def _line(self, name: str, kind: str, threads: int, taken: float, *, recall: bool) -> None:
        ratio = taken / self._ours[kind, threads, recall]
        print(f"{name:36}{threads:8}{taken:9.2f}{self._rows / taken:12,.0f}{ratio:8.2g}", flush=True)


def warm_up(bits: int, dimension: int) -> None:
    """Build small indices, so that nothing is compiled in the first that is measured."""
    some = (Codes(clustered_codes(1000, bits, 1), bits), Vectors(clustered_vectors(1000, dimension, 1)))
    for descriptors, search in zip(some, ("exact", "IVF4,PQ4x4fs"), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "embeddings"
            embedded(Folder(source), descriptors)
            build(source, Path(folder) / "index", approximate=ApproximateConfig(search=search))


def with_workers() -> bool:
    """Whether the command builds in several processes."""
    told = subprocess.run([*_COMMAND, "--help"], capture_output=True, text=True, check=True)
    return "--workers" in told.stdout


def measure(
    table: Table, kind: str, descriptors: Codes | Vectors, search: str, threads: int, folder: Path
) -> str | None:
    """Build with one thread and with several; the factory string of what was built, None if it is exact."""
    source, factory = folder / "embeddings", None
    if not source.exists():
        embedded(Folder(source), descriptors)
    approximate = search != "exact"
    alone = ApproximateConfig(search=search, recall_queries=1 if approximate else 1000)
    configs = [(False, alone), *([(True, ApproximateConfig(search=search))] if approximate else [])]
    for used, (recall, config) in itertools.product(sorted({1, threads}), configs):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            work = partial(build, source, out, shards=used, approximate=config, threads=used)
            table.ours(kind, used, once(work).wall, recall=recall)
            factory = _factory(out)
    if threads > 1 and with_workers():
        with tempfile.TemporaryDirectory(dir=folder) as out:
            options = ["--workers", str(threads), "--shards", str(threads), "--search", search]
            command = [*_COMMAND, str(source), "--out", out, *options]
            taken = once(lambda: subprocess.run(command, check=True, capture_output=True)).wall
            table.ours(kind, threads, taken, recall=approximate, workers=True)
    return factory


def _factory(index: str) -> str | None:
    made = Index.open(index).manifest.approximate
    return None if made is None else str(made.factory)


def faiss_binary(rows: Path, out: Path, _factory: str) -> None:
    codes = np.load(rows, mmap_mode="r")
    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(np.ascontiguousarray(codes))
    faiss.write_index_binary(index, str(out))


def faiss_vectors(rows: Path, out: Path, factory: str) -> None:
    vectors = np.load(rows, mmap_mode="r")
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_L2)
    chosen = np.random.default_rng(0).choice(len(vectors), min(len(vectors), _TRAIN_ROWS), replace=False)
    if not index.is_trained:
        index.train(np.ascontiguousarray(vectors[np.sort(chosen)]))
    for start in range(0, len(vectors), 1 << 16):
        index.add(np.ascontiguousarray(vectors[start : start + (1 << 16)]))
    faiss.write_index(index, str(out))


def measure_faiss(
    table: Table, kind: str, work: Callable[[Path, Path, str], None], factory: str, threads: int, rows: Path
) -> None:
    for used in sorted({1, threads}):
        faiss.omp_set_num_threads(used)
        with tempfile.TemporaryDirectory(dir=rows.parent) as folder:
            out = Path(folder) / "index.faiss"
            table.peer("FAISS", kind, used, once(lambda out=out: work(rows, out, factory)).wall)


def measure_autofaiss(table: Table, kind: str, python: str, factory: str, threads: int, rows: Path) -> None:
    for used in sorted({1, threads}):
        command = [python, "-c", _AUTOFAISS, str(rows.parent), factory, str(used)]
        told = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        table.peer("autofaiss", kind, used, float(told.stdout.splitlines()[-1]), recall=True)


def saved(folder: Path, data: Any) -> Path:
    """The array as the only `.npy` file of a folder."""
    folder.mkdir()
    np.save(folder / "rows.npy", data)
    return folder / "rows.npy"


def main() -> None:
    parser = arguments(__doc__, "100,000 rows")
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=1_000_000)
    parser.add_argument("--bits", type=int, default=64, help="of codes")
    parser.add_argument("--dimension", type=int, default=128, help="of vectors")
    parser.add_argument("--factory", help="of the approximate search; default IVF<about √rows>,PQ…x4fs")
    parser.add_argument("--threads", type=int, default=cores(), help="measured besides one")
    parser.add_argument(
        "--autofaiss",
        metavar="PYTHON",
        default=os.environ.get("AUTOFAISS_PYTHON"),
        help="of an environment that has autofaiss; default: what AUTOFAISS_PYTHON says",
    )
    parser.add_argument("--folder", type=Path, help="where temporary files go; default the system's")
    options = parser.parse_args()
    rows, threads = 50_000 if options.short else options.rows, options.threads
    said = f"{rows:,} rows, {options.bits} bits, {options.dimension} dimensions"
    with measuring(said), tempfile.TemporaryDirectory(dir=options.folder) as made:
        warm_up(options.bits, options.dimension)
        table = Table(rows)
        of_codes, of_vectors = Path(made) / "codes", Path(made) / "vectors"
        codes = clustered_codes(rows, options.bits, 1)
        file = saved(of_codes, codes)
        measure(table, "codes", Codes(codes, options.bits), "exact", threads, of_codes)
        measure_faiss(table, "codes", faiss_binary, "", threads, file)
        vectors = clustered_vectors(rows, options.dimension, 1)
        file = saved(of_vectors, vectors)
        measure(table, "vectors", Vectors(vectors), "exact", threads, of_vectors)
        measure_faiss(table, "vectors", faiss_vectors, "Flat", threads, file)
        wanted = options.factory or usual_factory(rows, options.dimension)
        built = measure(table, wanted, Vectors(vectors), wanted, threads, of_vectors)
        assert built == wanted, f"{built} was built"
        measure_faiss(table, wanted, faiss_vectors, wanted, threads, file)
        if options.autofaiss:
            measure_autofaiss(table, wanted, options.autofaiss, wanted, threads, file)
        else:
            print("not compared with autofaiss: name an environment's Python with --autofaiss")


if __name__ == "__main__":
    main()
