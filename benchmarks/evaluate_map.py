"""Mean average precision of binary codes, against the loop that the field's scripts use, in one run.

    python benchmarks/evaluate_map.py          1,000 queries x  59,000 rows x 48 bits, 10 classes, K = all
    python benchmarks/evaluate_map.py --full   5,000 queries x 112,218 rows x 64 bits, 80 classes, K = 5,000

The peer is written as well as numpy allows: codes as float32 ±1, labels as float32 0/1, one matrix product
and one argsort a query. It ranks some of the queries and its time is scaled to all of them. It is given one
thread and all threads, and every ratio is to the faster of the two. `agreement` is the largest difference of
a query's average precision between the peer, with a stable sort, and ours.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ray_retrieval.metrics.hamming import TIES, evaluate, mean_average_precision


class Workload(NamedTuple):
    queries: int
    rows: int
    bits: int
    classes: int
    labels_each: float
    k: int


CIFAR = Workload(queries=1000, rows=59_000, bits=48, classes=10, labels_each=1.0, k=59_000)
COCO = Workload(queries=5000, rows=112_218, bits=64, classes=80, labels_each=2.9, k=5000)


def generate(work: Workload) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Codes bool [n, bits], their classes' codes with noise, and labels bool [n, classes]: queries first."""
    random = np.random.default_rng(0)
    count = work.queries + work.rows
    main = random.integers(0, work.classes, count)
    labels = random.random((count, work.classes)) < (work.labels_each - 1) / work.classes
    labels[np.arange(count), main] = True
    prototypes = random.random((work.classes, work.bits)) < 0.5
    return prototypes[main] ^ (random.random((count, work.bits)) < 0.2), labels


def field_loop(
    query_codes: npt.NDArray[np.float32],
    query_labels: npt.NDArray[np.float32],
    codes: npt.NDArray[np.float32],
    labels: npt.NDArray[np.float32],
    *,
    k: int,
    kind: Any = None,
) -> npt.NDArray[np.float64]:
    """Average precision of each query: codes float32 ±1 [n, bits], labels float32 0/1 [n, classes]."""
    scores = np.zeros(len(query_codes))
    for i in range(len(query_codes)):
        relevant = labels @ query_labels[i] > 0
        distances = 0.5 * (codes.shape[1] - codes @ query_codes[i])
        found = relevant[np.argsort(distances, kind=kind)[:k]]
        ranks = np.flatnonzero(found) + 1
        if len(ranks):
            scores[i] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
    return scores


class Taken(NamedTuple):
    wall: float
    processor: float


def seconds(work: Callable[[], object], times: int = 3) -> Taken:
    """The shortest wall time and processor time of several runs; the latter is steadier on a busy machine."""
    taken = []
    for _ in range(times):
        wall, processor = time.perf_counter(), time.process_time()
        work()
        taken.append((time.perf_counter() - wall, time.process_time() - processor))
    return Taken(*(min(column) for column in zip(*taken, strict=True)))


def measure(work: Workload, naive_queries: int, threads: int) -> None:
    bits, labels = generate(work)
    cut, few = work.queries, slice(0, naive_queries)
    signs, hot = np.where(bits, 1, -1).astype(np.float32), labels.astype(np.float32)
    codes = np.packbits(bits, axis=1)
    data = (codes[:cut], labels[:cut], codes[cut:], labels[cut:])
    if work.labels_each == 1.0:
        numbers = labels.argmax(axis=1)
        data = (codes[:cut], numbers[:cut], codes[cut:], numbers[cut:])
    one = (data[0][:1], data[1][:1], data[2], data[3])
    first = seconds(lambda: evaluate(*one, bits=work.bits), times=1)  # Compiles, where no earlier run has.

    peer_data = (signs[few], hot[few], signs[cut:], hot[cut:])
    exact = field_loop(*peer_data, k=work.k, kind="stable")
    report = evaluate(*data, bits=work.bits, k=work.k, threads=threads)
    agreement = np.abs(exact - report.ap[few]).max()

    print(
        f"{work.queries:,} queries x {work.rows:,} rows x {work.bits} bits, {work.classes} classes, "
        f"K = {work.k:,}\nfirst call {first.wall:.1f} s; agreement {agreement:.1e}; "
        f"MAP {', '.join(f'{ties} {float(report.map[ties]):.5f}' for ties in TIES)}\n"
    )
    counts = sorted({1, threads})
    peers = {}
    for count in counts:
        with threadpool_limits(count):
            few_taken = seconds(lambda: field_loop(*peer_data, k=work.k))
            peers[count] = Taken(*(value * work.queries / naive_queries for value in few_taken))
    fastest = min(taken.wall for taken in peers.values())

    def line(name: str, count: int, taken: Taken) -> None:
        print(f"{name:44}{count:8}{taken.wall:9.2f}{taken.processor:9.2f}{fastest / taken.wall:8.1f}")

    print(f"{'':44}{'threads':>8}{'wall s':>9}{'cpu s':>9}{'ratio':>8}")
    for count, taken in peers.items():
        line(f"float32 numpy loop ({naive_queries} queries, scaled)", count, taken)
    for count in counts:
        options: dict[str, Any] = {"bits": work.bits, "k": work.k, "threads": count}
        in_order = partial(mean_average_precision, *data, **options)
        line("mean_average_precision, database order", count, seconds(in_order))
        line("mean_average_precision, expected", count, seconds(partial(in_order, ties="expected")))
        line("evaluate, everything", count, seconds(partial(evaluate, *data, **options)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the larger, multi-label workload")
    parser.add_argument("--naive-queries", type=int, default=100, help="queries that the peer ranks")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="measured besides one thread"
    )
    options = parser.parse_args()
    work = COCO if options.full else CIFAR
    measure(work, min(options.naive_queries, work.queries), options.threads)


if __name__ == "__main__":
    main()
