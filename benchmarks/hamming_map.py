"""A whole Hamming evaluation, against the argsort loop that the field's scripts use, in one run.

    python benchmarks/hamming_map.py            5,000 queries x 112,218 rows x 64 bits, 80 classes, K = 5,000
    python benchmarks/hamming_map.py --short    1,000 queries x  59,000 rows x 48 bits, 10 classes, K = all
    python benchmarks/hamming_map.py --lists FOLDER    with the labels of FOLDER/test.txt and FOLDER/train.txt

Ours is `evaluate`: MAP under four tie policies, precision and recall at n, precision within radius 2 and the
curve of precision and recall. The peer computes the MAP alone, in the two forms that are about: (a) codes
float32 ±1 and labels float32, (b) codes float64 and labels int64. It is given one thread and all threads, and
each ratio is to its faster one. It ranks a sample of the queries, evenly spread, and its time is scaled to
all of them. All times are the shortest of several runs: `wall`, which a busy machine lengthens, and `cpu`,
the processor time of all threads.

`agreement` is the largest difference of a sampled query's average precision from the peer's with a stable
sort; above 1e-12 the run fails. `sharded` is `evaluate_shards` over 4 shards, whose report must equal that of
one shard to the last bit. `memory` is by how much the process grows at most while ours runs (Linux).

Codes are made from the labels by random planes and noise. Rows of the database are drawn from train.txt, if
lists are given; else labels are drawn at random.
"""

import math
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from book import arguments, claim, measuring, on_threads
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from timing import Taken, growth, shortest

from ray_retrieval.cores import cores
from ray_retrieval.metrics.hamming import (
    TIES,
    HammingReport,
    evaluate,
    evaluate_shards,
    mean_average_precision,
)

Labels = npt.NDArray[np.bool_]
SHARDS = 4


class Workload(NamedTuple):
    queries: int
    rows: int
    bits: int
    classes: int
    labels_each: float
    k: int | None


SHORT = Workload(queries=1000, rows=59_000, bits=48, classes=10, labels_each=1.0, k=None)
COCO = Workload(queries=5000, rows=112_218, bits=64, classes=80, labels_each=2.9, k=5000)


def drawn_labels(work: Workload) -> tuple[Labels, Labels]:
    """Labels bool [n, classes] of queries and rows, at random."""
    random = np.random.default_rng(0)
    count = work.queries + work.rows
    labels = random.random((count, work.classes)) < (work.labels_each - 1) / work.classes
    labels[np.arange(count), random.integers(0, work.classes, count)] = True
    return labels[: work.queries], labels[work.queries :]


def listed_labels(folder: Path, work: Workload) -> tuple[Labels, Labels]:
    """Labels of the test list, and as many rows of the training list, drawn at random, as are needed."""
    test, train = (
        np.array([line.split()[1:] for line in (folder / f"{name}.txt").read_text().splitlines()]) == "1"
        for name in ("test", "train")
    )
    return test[: work.queries], train[np.random.default_rng(0).integers(0, len(train), work.rows)]


def learned(labels: Labels, bits: int, seed: int) -> npt.NDArray[np.bool_]:
    """Codes bool [n, bits] that know something of the labels: on which side of random planes, with noise."""
    planes = np.random.default_rng(1).standard_normal((labels.shape[1], bits))
    noise = np.random.default_rng(seed).standard_normal((len(labels), bits))
    return labels @ planes + 1.5 * noise >= 0


def field_loop(
    query_codes: npt.NDArray[Any],
    query_labels: npt.NDArray[Any],
    codes: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    *,
    k: int | None,
    kind: Any = None,
) -> npt.NDArray[np.float64]:
    """Average precision of each query: codes ±1 [n, bits], labels 0/1 [n, classes]."""
    scores = np.zeros(len(query_codes))
    for i in range(len(query_codes)):
        relevant = labels @ query_labels[i] > 0
        distances = 0.5 * (codes.shape[1] - codes @ query_codes[i])
        found = relevant[np.argsort(distances, kind=kind)[:k]]
        ranks = np.flatnonzero(found) + 1
        if len(ranks):
            scores[i] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
    return scores


def same(one: HammingReport, other: HammingReport) -> bool:
    """Whether two reports are equal to the last bit."""
    curves = [(report.pr_curve.precision, report.pr_curve.recall, report.ap) for report in (one, other)]
    return one.metrics == other.metrics and all(np.array_equal(a, b) for a, b in zip(*curves, strict=True))


def measure(work: Workload, labels: tuple[Labels, Labels], sampled: int, threads: int, said: str) -> bool:
    """Print the table; whether everything is equal that must be."""
    signs = [learned(part, work.bits, seed) for seed, part in enumerate(labels)]
    codes = [np.packbits(part, axis=1) for part in signs]
    given = [part.argmax(axis=1) if work.labels_each == 1.0 else part for part in labels]
    data = (codes[0], given[0], codes[1], given[1])
    options: dict[str, Any] = {"bits": work.bits, "k": work.k}
    borders = [work.rows * i // SHARDS for i in range(SHARDS + 1)]
    shards = [(codes[1][a:b], given[1][a:b]) for a, b in pairwise(borders)]

    one = (codes[0][:1], given[0][:1])
    first = shortest(
        lambda: evaluate(*one, *data[2:], **options), times=1
    )  # Compiles, if no earlier run has.
    memory = growth(partial(evaluate, *data, **options, threads=threads))
    report = evaluate(*data, **options, threads=threads)
    parted = evaluate_shards(*data[:2], shards, **options, threads=threads)

    sample = np.linspace(0, work.queries - 1, sampled).astype(int)
    forms = {}
    for name, code_type, label_type in (
        ("a", np.float32, np.float32),
        ("b", np.float64, np.int64),
    ):
        numbers = [np.where(part, code_type(1), code_type(-1)) for part in signs]
        hot = [part.astype(label_type) for part in labels]
        forms[name] = (numbers[0][sample], hot[0][sample], numbers[1], hot[1])
    exact = field_loop(*forms["a"], k=work.k, kind="stable")
    agreement = np.abs(exact - report.ap[sample]).max()
    equal = same(report, parted)

    print(
        f"first call {first.wall:.1f} s; memory {memory:.0f} MiB; agreement {agreement:.1e}; "
        f"{SHARDS} shards {'equal' if equal else 'DIFFER'}\n"
        f"MAP {', '.join(f'{ties} {float(report.map[ties]):.5f}' for ties in TIES)}\n"
    )
    counts = sorted({1, threads})
    peers: dict[tuple[str, int], Taken] = {}
    for name, form in forms.items():
        for count in counts:
            with threadpool_limits(count):
                taken = shortest(partial(field_loop, *form, k=work.k))
            peers[name, count] = Taken(*(value * work.queries / sampled for value in taken))
    fastest = {name: min(peers[name, count].wall for count in counts) for name in forms}

    def line(name: str, count: int, taken: Taken) -> None:
        ratios = "".join(f"{fastest[form] / taken.wall:8.1f}" for form in forms)
        print(f"{name:44}{count:8}{taken.wall:9.2f}{taken.processor:9.2f}{ratios}")

    print(f"{'':44}{'threads':>8}{'wall s':>9}{'cpu s':>9}{'x (a)':>8}{'x (b)':>8}")
    for (name, count), taken in peers.items():
        line(f"argsort loop ({name}), {sampled} queries, scaled", count, taken)
    for count in counts:
        some: dict[str, Any] = {**options, "threads": count}
        line(
            "map, expected", count, shortest(partial(mean_average_precision, *data, ties="expected", **some))
        )
        line("map, database order", count, shortest(partial(mean_average_precision, *data, **some)))
        line("evaluate, everything", count, whole := shortest(partial(evaluate, *data, **some)))
        in_parts = shortest(partial(evaluate_shards, *data[:2], shards, **some))
        line(f"evaluate, {SHARDS} shards", count, in_parts)
        print(f"{'':44}{'':8}sharded : whole = {in_parts.processor / whole.processor:.2f} by cpu")
        claim(
            f"Hamming evaluation, {said}, {on_threads(count)}: the field's argsort loop over ours",
            peer="the loop in float32, the MAP alone",
            ratio=fastest["a"] / whole.wall,
            detail=f"{fastest['a']:.2f} s, {whole.wall:.2f} s; equal to {agreement:.0e}",
            headline=count == 1,
        )
        claim(
            f"Hamming evaluation, {said}, {on_threads(count)}: processor time in {SHARDS} shards "
            "over that in one",
            peer="one shard",
            ratio=in_parts.processor / whole.processor,
        )
    if not math.isnan(memory):
        claim(
            f"Hamming evaluation, {said}: memory over 1 GiB", peer="1 GiB", ratio=memory / 1024, goal="<= 1"
        )
    # One GiB, whatever the size of the database beside its codes and labels.
    return equal and agreement <= 1e-12 and not memory > 1024


def main() -> int:
    parser = arguments(__doc__, "the smaller, single-label workload")
    parser.add_argument("--lists", type=Path, help="folder with test.txt and train.txt: path 0 0 1 … a line")
    parser.add_argument("--queries", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--bits", type=int)
    parser.add_argument("-k", type=int)
    parser.add_argument("--sampled", type=int, default=100, help="queries that the peer ranks")
    parser.add_argument("--threads", type=int, default=cores(), help="measured besides one thread")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("queries", "rows", "bits", "k")}
    work = (SHORT if options.short else COCO)._replace(
        **{name: size for name, size in sizes.items() if size is not None}
    )
    if options.lists is None:
        labels = drawn_labels(work)
    else:
        labels = listed_labels(options.lists, work)
        work = work._replace(queries=len(labels[0]), labels_each=float(labels[0].sum(axis=1).mean()))
    said = (
        f"{work.queries:,} queries x {work.rows:,} rows x {work.bits} bits, {labels[0].shape[1]} classes, "
        f"K = {'all' if work.k is None else format(work.k, ',')}"
    )
    with measuring(said):
        good = measure(work, labels, min(options.sampled, work.queries), options.threads, said)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
