"""The most memory of each stage, against the number of images, of bits, of shards: flat where it should be.

    python benchmarks/memory.py                          four times as much of each
    python benchmarks/memory.py --short                  of small ones, and fewer of the cases
    python benchmarks/memory.py --only train search

Every measurement is a process of its own, on one thread, which does the stage once with next to nothing, so
that what is loaded, compiled or started at the first call does not count, and then as a whole. `MiB` is by
how much the memory grows at most that it does not share with a file or another process (Linux).

    train       the loop on JPEGs with 1 MiB for decoded ones; a small network. What it frees in large blocks
                goes back to the system at once: how much of it malloc would keep depends on chance
    encode      the Ray Data pipeline with two encoders: this process and all that it starts
    build       an index from embeddings on disk
    search      queries, k = 100, in an index that is mapped into memory, opening included
    evaluate    the whole Hamming evaluation; codes and labels are there before

`ratio` is that of the larger to the smaller, where less than 16 MiB count as 16, in a search less than 2 as 2
and in an evaluation less than 4 as 4. Goal, where a stage should not need more for more: 1.25 or less;
it is left out where a stage that held all its images or codes would reach it too. A build holds what is known
of the rows of one shard; so rows and shards grow together there, and rows alone are shown without a goal, as
bits are; and in an evaluation, which holds counts by distance of each query, twice for several shards.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from apart import ProcessError, in_its_own_process
from book import arguments, claim, measuring
from databases import embedded
from timing import most_private_memory, private_memory
from workload import photographs, photographs_benchmark

from ray_retrieval.descriptors import Codes
from ray_retrieval.storage import Folder

MOST = 1.25
LEAST = {"train": 16.0, "encode": 16.0, "build": 16.0, "search": 2.0, "evaluate": 4.0}
"""MiB, below which differences say nothing."""
MORE = 4
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Environment in which the C library gives back what is freed in blocks of 1 MiB or more (glibc)."""
SIZES = {"images": 128, "rows": 250_000, "bits": 64, "shards": 1, "queries": 500}
"""The smaller ones."""
KNOWN_BYTES = 84
"""Of a row of `databases.embedded` besides its code: an identifier, a path and a label."""
FULL = {"images": 8, "rows": 8, "queries": 4}
"""Times which they are without `--short`."""


class Case(NamedTuple):
    """A stage, and what grows; `flat`: the memory should not; `short`: measured with `--short` too."""

    stage: str
    grows: tuple[str, ...]
    flat: bool
    short: bool = True


CASES = (
    Case("train", ("images",), True),
    Case("encode", ("images",), True, short=False),
    Case("build", ("rows", "shards"), True),
    Case("build", ("rows",), False, short=False),
    Case("build", ("bits",), False, short=False),
    Case("search", ("rows",), True),
    Case("search", ("bits",), True),
    Case("search", ("shards",), True, short=False),
    Case("evaluate", ("rows",), True),
    Case("evaluate", ("bits",), False, short=False),
    Case("evaluate", ("shards",), False, short=False),
)
Sizes = dict[str, int]
Work = Callable[[], object]


def codes_of(rows: int, bits: int, seed: int = 0) -> Codes:
    return Codes(np.random.default_rng(seed).integers(0, 256, (rows, bits // 8), np.uint8), bits)


# Each stage prepares what it starts from, maybe on disk and then in a process before, and gives its work.


def train(sizes: Sizes, _folder: Path) -> Work:
    from train_overhead import Nowhere

    from ray_retrieval.loop import Process, TrainConfig, Trainer
    from ray_retrieval.methods import build
    from ray_retrieval.methods.greedyhash import GreedyHashConfig

    benchmark = photographs_benchmark(sizes["images"])
    config = TrainConfig(epochs=1, batch_size=32, cache_memory=1 << 20, validation={"every": None})
    method = GreedyHashConfig(backbone={"name": "small", "weights": "none"}, image={"size": 64})
    return lambda: Trainer(build(method, classes=10), benchmark, config, seed=0, process=Process()).fit(
        Nowhere()
    )


def encode(sizes: Sizes, folder: Path) -> Work:
    from encode_throughput import save_model

    from ray_retrieval.cluster import connect
    from ray_retrieval.encode import EncodeConfig, EncodeJob
    from ray_retrieval.encode import encode as encode_images

    table, name = photographs(sizes["images"]), f"{sizes['images']}"
    options = argparse.Namespace(backbone="small", size=64)

    def work() -> None:
        where = save_model(Folder(folder) / f"model-{name}", options)
        config = EncodeConfig(rows_per_part=64)
        with connect():
            encode_images([EncodeJob(where, table, Folder(folder) / f"embeddings-{name}")], config)

    return work


def prepare_build(sizes: Sizes, folder: Path) -> None:
    embedded(Folder(folder) / "embeddings", codes_of(sizes["rows"], sizes["bits"]))


def build(sizes: Sizes, folder: Path) -> Work:
    from ray_retrieval.search import build as build_index

    return lambda: build_index(folder / "embeddings", folder / "index", shards=sizes["shards"])


def prepare_search(sizes: Sizes, folder: Path) -> None:
    prepare_build(sizes, folder)
    build(sizes, folder)()


def search(sizes: Sizes, folder: Path) -> Work:
    from ray_retrieval.search import Index

    queries = codes_of(sizes["queries"], sizes["bits"], 1)
    return lambda: Index.open(folder / "index").search(queries, 100)


def evaluate(sizes: Sizes, _folder: Path) -> Work:
    from ray_retrieval.metrics.hamming import evaluate_shards

    random, rows = np.random.default_rng(0), sizes["rows"]
    queries, query_labels = (
        codes_of(sizes["queries"], sizes["bits"], 1),
        random.integers(0, 10, sizes["queries"]),
    )
    database, labels = codes_of(rows, sizes["bits"]), random.integers(0, 10, rows)
    edges = [rows * part // sizes["shards"] for part in range(sizes["shards"] + 1)]
    shards = [(database.data[first:last], labels[first:last]) for first, last in pairwise(edges)]
    return lambda: evaluate_shards(queries.data, query_labels, shards, bits=sizes["bits"])


STAGES = {"train": train, "encode": encode, "build": build, "search": search, "evaluate": evaluate}
PREPARED = {"build": prepare_build, "search": prepare_search}
TINY = {"images": 48, "rows": 2_000, "queries": 10}


def grown(stage: str, sizes: Sizes, folder: Path) -> float:
    """Measure in this process: MiB by which it grows."""
    if stage == "encode":  # What its processes have from their start on counts: nothing is done before.
        work = encode(sizes, folder)
        with most_of_all_processes() as most:
            work()
        return most[0] / 2**20
    with tempfile.TemporaryDirectory(dir=folder) as tiny:
        little = {**sizes, **TINY}
        PREPARED.get(stage, _nothing)(little, Path(tiny))
        STAGES[stage](little, Path(tiny))()
    work = STAGES[stage](sizes, folder)
    before = private_memory()
    with most_private_memory() as found:
        work()
    return (found[0] - before) / 2**20


@contextmanager
def most_of_all_processes() -> Iterator[list[int]]:
    """Yield a list with the most bytes that this process and those it started had together, each its own."""
    own, most, ended = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.3):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().uss
                except psutil.Error:
                    continue
            most[0] = max(most[0], total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def measured(stage: str, sizes: Sizes, parent: Path | None) -> float:
    """What `grown` gives in a process of its own, of what another one prepared."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        for what in ("--prepare", "--measure") if stage in PREPARED else ("--measure",):
            try:
                given, variables = (
                    [what, stage, json.dumps(sizes), folder],
                    RETURNED if stage == "train" else {},
                )
                found = in_its_own_process(__file__, given, 1, variables)
            except ProcessError as error:
                raise SystemExit(f"{stage} of {_words(sizes)} failed:\n{error}") from None
        return float(found["MiB"])


def compare(case: Case, small: Sizes, parent: Path | None, known: dict[str, float]) -> None:
    """Print the lines of a case, and claim their ratio.

    Args:
        case: compared.
        small: the smaller sizes.
        parent: of temporary folders.
        known: what has been measured, by words; added to.
    """
    large = {**small, **{name: MORE * small[name] for name in case.grows}}
    found = []
    for sizes in (small, large):
        started = time.monotonic()
        used = {name: sizes[name] for name in _USED[case.stage]}
        said = f"{case.stage:10}{_words(used):52}"
        if said not in known:
            known[said] = measured(case.stage, used, parent)
        found.append(known[said])
        print(f"{said}{found[-1]:10.1f}{time.monotonic() - started:8.1f} s", flush=True)
    least = LEAST[case.stage]
    ratio = max(found[1], least) / max(found[0], least)
    # A goal that is reached whatever happens would say nothing.
    holding_all = max(found[0] + held(case.stage, large), least) / max(found[0], least)
    judged = case.flat and holding_all > MOST
    print(f"{'':10}{'ratio':52}{ratio:10.2f}\n", flush=True)
    others = _words({name: small[name] for name in _USED[case.stage] if name not in case.grows})
    grows = _words({name: large[name] for name in case.grows})
    claim(
        f"memory of {case.stage} with {grows} over that with a quarter of them{f', {others}' * bool(others)}",
        peer="itself",
        ratio=ratio,
        goal=f"<= {MOST}" if judged else None,
        detail=f"{found[1]:.1f} MiB, {found[0]:.1f} MiB; {held(case.stage, large):.0f} MiB go through it",
        headline=judged,
    )


def held(stage: str, sizes: Sizes) -> float:
    """MiB of what a stage goes through: decoded images, codes, and in a build what is known of the rows."""
    if stage in ("train", "encode"):
        return sizes["images"] * 3 * 256**2 / 2**20
    known = KNOWN_BYTES if stage == "build" else 0
    return sizes["rows"] * (sizes["bits"] // 8 + known) / 2**20


_USED = {
    "train": ("images",),
    "encode": ("images",),
    "build": ("rows", "bits", "shards"),
    "search": ("rows", "bits", "shards", "queries"),
    "evaluate": ("rows", "bits", "shards", "queries"),
}


def _words(sizes: Sizes) -> str:
    return ", ".join(f"{size:,} {name[:-1] if size == 1 else name}" for name, size in sizes.items())


def _nothing(_sizes: Sizes, _folder: Path) -> None:
    pass


def main() -> None:
    parser = arguments(__doc__, "fewer images, rows and queries")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages")
    parser.add_argument("--folder", type=Path, help="where temporary files go; default the system's")
    parser.add_argument("--prepare", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare or options.measure:
        stage, sizes, folder = options.prepare or options.measure
        if options.prepare:
            PREPARED[stage](json.loads(sizes), Path(folder))
            print(json.dumps({}))
        else:
            print(json.dumps({"MiB": grown(stage, json.loads(sizes), Path(folder))}))
        return
    small = {name: size * (1 if options.short else FULL.get(name, 1)) for name, size in SIZES.items()}
    known: dict[str, float] = {}
    with measuring("one thread"):
        print(f"{'':62}{'MiB':>10}")
        for case in CASES:
            if case.stage in options.only and (case.short or not options.short):
                compare(case, small, options.folder, known)


if __name__ == "__main__":
    main()
