"""The metrics of metric learning on a database of Stanford Online Products' size, against
pytorch-metric-learning's AccuracyCalculator, in one run.

    python benchmarks/retrieval_metrics.py            60,502 vectors of 128 dimensions in 11,316 classes
    python benchmarks/retrieval_metrics.py --short    6,000 of them, and a limit of 1 GiB: a minute

Every vector is a query, and searched among all others. Ours is `metrics.retrieval.evaluate`: recall@1, 10,
100 and 1000, MAP of the full ranking, MAP@R and R-precision. The peer is asked in two ways: `first R` has
MAP@R, R-precision and precision@1, for which it ranks no more rows than the largest class has; `all` has the
MAP of the full ranking too, for which it holds tables of queries x rows. Only `all` is what ours does.

Each measurement is a process of its own. `wall` and `cpu` are seconds, of one run; `MiB` is by how much the
process grows at most from when the vectors are there (Linux). `agreement` is the largest difference of a
metric that both have; above 1e-4, more than rows that are nearly as near as others explain, the run fails.

`runs out` asks the peer for `all` with ever more vectors, until its process fails with no more than --limit
to grow by, then ours with that many.
"""

import argparse
import json
import resource
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from apart import ProcessError, in_its_own_process
from book import arguments, claim, measuring, on_threads
from timing import forget_peak, once, status

from ray_retrieval.cores import cores

SHARED = {"recall@1": "precision_at_1", "map@r": "mean_average_precision_at_r", "r_precision": "r_precision"}
MEAN = {"map": "mean_average_precision"}
DIMENSION = 128
_NO_MEMORY = ("MemoryError", "bad_alloc", "can't allocate memory")


def data_of(rows: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Unit vectors float32 [n, 128] around the centres of classes of 2 to 12 images, 5.3 in the mean."""
    random = np.random.default_rng(0)
    sizes = np.clip(random.poisson(5.3, rows), 2, 12)
    labels = np.repeat(np.arange(rows), sizes)[:rows]
    random.shuffle(labels)
    centres = random.standard_normal((labels.max() + 1, DIMENSION), dtype=np.float32)
    vectors = centres[labels] + 1.35 * random.standard_normal((rows, DIMENSION), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


def ours(vectors: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], threads: int) -> dict[str, float]:
    from ray_retrieval.metrics.retrieval import evaluate

    found = evaluate(vectors, labels, ks=(1, 10, 100, 1000), threads=threads)
    return {name: metric.value for name, metric in found.items()}


def peer(
    vectors: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], threads: int, *, full: bool
) -> dict[str, float]:
    import faiss
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    names = SHARED | (MEAN if full else {})
    calculator = AccuracyCalculator(
        include=tuple(names.values()), k=None if full else "max_bin_count", device=torch.device("cpu")
    )
    found = calculator.get_accuracy(vectors, labels)
    return {name: found[theirs] for name, theirs in names.items()}


def measure(who: str, rows: int, threads: int, limit: int) -> dict[str, Any]:
    """Measure in this process; `limit`: bytes by which it may grow, 0 for no limit."""
    # What is loaded, compiled or started at the first call is not counted.
    work = {
        "ours": ours,
        "peer, first R": lambda *given: peer(*given, full=False),
        "peer, all": lambda *given: peer(*given, full=True),
    }[who]
    work(*data_of(500), threads)
    vectors, labels = data_of(rows)
    forget_peak()
    before = status("VmRSS")
    if limit:
        # Not the address space, most of which the libraries take without using it.
        resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limit,) * 2)
    metrics: dict[str, float] = {}
    taken = once(lambda: metrics.update(work(vectors, labels, threads)))
    return {
        "wall": taken.wall,
        "cpu": taken.processor,
        "memory": (status("VmHWM") - before) / 2**20,
        "metrics": metrics,
    }


def measured(who: str, rows: int, threads: int, limit: int = 0) -> dict[str, Any] | None:
    """What `measure` gives; None where it needs more than the limit."""
    asked = ["--measure", who, "--rows", str(rows), "--threads", str(threads), "--limit", str(limit)]
    try:
        return in_its_own_process(__file__, asked, threads)
    except ProcessError as error:
        if limit and any(words in str(error) for words in _NO_MEMORY):
            return None
        raise SystemExit(f"{who}, {rows:,} rows failed:\n{error}") from None


def show(who: str, rows: int, threads: int, found: dict[str, Any] | None) -> None:
    numbers = (
        f"{'out of memory':>28}"
        if found is None
        else f"{found['wall']:10.2f}{found['cpu']:10.2f}{found['memory']:8.0f}"
    )
    print(f"{who:16}{rows:9,}{threads:9}{numbers}", flush=True)


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest of the differences of metrics that both have."""
    both = one["metrics"].keys() & other["metrics"].keys()
    return max(abs(one["metrics"][name] - other["metrics"][name]) for name in both)


def compare(rows: int, threads: list[int]) -> float:
    """Print the table of ours and of the peer's first R; the largest difference of a metric."""
    worst = 0.0
    for count in threads:
        mine = measured("ours", rows, count)
        assert mine is not None
        show("ours", rows, count, mine)
        other = measured("peer, first R", rows, count)
        assert other is not None
        show("peer, first R", rows, count, other)
        worst = max(worst, difference(mine, other))
        for what, field, unit in (("time", "wall", "s"), ("memory", "memory", "MiB")):
            claim(
                f"recall@1 to @1000, mAP, MAP@R of {rows:,} x {DIMENSION} in itself, {on_threads(count)}: "
                f"the {what} of its MAP@R and recall@1 alone over ours",
                peer="pytorch-metric-learning, AccuracyCalculator",
                ratio=other[field] / mine[field],
                detail=f"{other[field]:.3g} {unit}, {mine[field]:.3g} {unit}",
                headline=count == threads[-1],
            )
    print("\n" + ", ".join(f"{name} {value:.5f}" for name, value in mine["metrics"].items()) + "\n")
    return worst


def until_it_runs_out(start: int, threads: int, limit: int) -> float:
    """Print how far the peer comes with all ranks; the largest difference of a metric on the way."""
    worst, rows = 0.0, start
    while True:
        other = measured("peer, all", rows, threads, limit)
        show("peer, all", rows, threads, other)
        mine = measured("ours", rows, threads, limit)
        show("ours", rows, threads, mine)
        if mine is not None and other is None:
            claim(
                f"metrics where the peer with full rankings runs out of {limit / 2**30:g} GiB: our memory "
                "over that limit",
                peer="pytorch-metric-learning, AccuracyCalculator, with the full mAP",
                ratio=mine["memory"] * 2**20 / limit,
                goal="<= 1",
                detail=f"at {rows:,} rows",
            )
        if other is None or mine is None:
            return worst
        worst = max(worst, difference(mine, other))
        rows = int(rows * 1.25)


def main() -> int:

    parser = arguments(__doc__, "few vectors, little memory")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--threads", type=int, default=cores(), help="besides one thread")
    parser.add_argument("--limit", type=int, help="bytes that the peer may grow by; 8 GiB")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.rows, options.threads, options.limit)))
        return 0
    rows = options.rows or (6_000 if options.short else 60_502)
    limit = options.limit or (1 << 30 if options.short else 8 << 30)
    with measuring(f"{rows:,} x {DIMENSION}"):
        print(f"{'':16}{'rows':>9}{'threads':>9}{'wall s':>10}{'cpu s':>10}{'MiB':>8}")
        worst = compare(rows, sorted({1, options.threads}))
        print(f"runs out: {limit / 2**30:g} GiB to grow by")
        worst = max(worst, until_it_runs_out(3_000 if options.short else 5_000, options.threads, limit))
        print(f"\nagreement {worst:.1e}")
    return 0 if worst <= 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
