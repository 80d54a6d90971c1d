"""The revisited Paris benchmark among a million distractors: counting against sorting, in one run.

    python benchmarks/revisited_eval.py                     1,001,001 distractors of 2048 dimensions: 8.3 GB
    python benchmarks/revisited_eval.py --dimension 512     a quarter of that
    python benchmarks/revisited_eval.py --short             50,000 of 128 dimensions: seconds

Made up are 6,322 rows, as many as the benchmark has, with lists of its mean size for 70 queries of 10
landmarks, and the distractors after them. They are written to one file, block by block, read once, and then
mapped into memory by each measurement, which is a process of its own.

`counting` is `metrics.revisited.evaluate_vectors`. `argsort` is what the published code does: all
similarities, one full ranking of every query, and the places of the listed rows in it for each protocol.
`wall` and `cpu` are seconds, of one run; `MiB` is by how much the memory grows at most that the process does
not share with the file (Linux). `agreement` is the largest difference of a metric; above 1e-4, more than rows
that are equal but for rounding explain, the run fails.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from apart import ProcessError, in_its_own_process
from book import arguments, claim, measuring, on_threads
from timing import most_private_memory, once, private_memory

from ray_retrieval.cores import cores

Floats = npt.NDArray[np.float32]
Truth = list[dict[str, npt.NDArray[np.int64]]]

QUERIES, LANDMARKS, LISTED_ROWS, DISTRACTORS = 70, 10, 6_322, 1_001_001
SIZES = {"easy": 98, "hard": 148, "junk": 102}
NEARNESS = {"easy": 5.0, "hard": 2.5, "junk": 3.5}
KS = (1, 5, 10)
_BLOCK = 1 << 14


def unit(vectors: Floats) -> Floats:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def queries_and_truth(dimension: int) -> tuple[Floats, Truth]:
    """Queries float32 [70, d] around the centres of landmarks, and the lists of each."""
    random = np.random.default_rng(0)
    centres = unit(random.standard_normal((LANDMARKS, dimension), np.float32))
    landmark = np.arange(QUERIES) % LANDMARKS
    noise = unit(random.standard_normal((QUERIES, dimension), np.float32))
    rows = random.permutation(LISTED_ROWS)[: LANDMARKS * sum(SIZES.values())].reshape(LANDMARKS, -1)
    stops = np.cumsum(list(SIZES.values()))
    lists = [dict(zip(SIZES, np.split(of, stops[:-1]), strict=True)) for of in rows]
    return unit(centres[landmark] + 0.5 * noise), [lists[one] for one in landmark]


def write_database(path: Path, rows: int, dimension: int) -> None:
    """float32 [rows, d]: noise, and among it the listed rows, nearer to a query the easier they are."""
    queries, truth = queries_and_truth(dimension)
    # In standard deviations of the similarity of a distractor.
    nearness = {name: deviations / dimension**0.5 for name, deviations in NEARNESS.items()}
    random = np.random.default_rng(1)
    with path.open("wb") as file:
        for start in range(0, rows, _BLOCK):
            block = unit(random.standard_normal((min(_BLOCK, rows - start), dimension), np.float32))
            for landmark in range(LANDMARKS if start == 0 else 0):
                for name, listed in truth[landmark].items():
                    block[listed] += nearness[name] * queries[landmark]
            unit(block).tofile(file)


def counting(queries: Floats, database: Floats, truth: Truth, threads: int) -> dict[str, float]:
    from ray_retrieval.metrics.revisited import evaluate_vectors

    found = evaluate_vectors(queries, database, truth, ks=KS, threads=threads)
    return {f"{name}/{protocol}": part[name].value for protocol, part in found.items() for name in part}


def argsort(queries: Floats, database: Floats, truth: Truth, _threads: int) -> dict[str, float]:
    similarities = database @ queries.T
    ranks = np.argsort(-similarities, axis=0)
    found = {}
    for protocol, positive in {"easy": ["easy"], "medium": ["easy", "hard"], "hard": ["hard"]}.items():
        scores = []
        for query, lists in enumerate(truth):
            right = np.concatenate([lists[name] for name in positive])
            ignored = np.concatenate([lists[name] for name in lists if name not in positive])
            places = np.flatnonzero(np.isin(ranks[:, query], right))
            removed = np.flatnonzero(np.isin(ranks[:, query], ignored))
            places -= np.searchsorted(removed, places)
            before = np.arange(len(places))
            left = np.where(places == 0, 1.0, before / np.maximum(places, 1))
            cuts = [min(k, places[-1] + 1) for k in KS]
            average = np.mean((left + (before + 1) / (places + 1)) / 2)
            scores.append([average, *((places < cut).sum() / cut for cut in cuts)])
        means = np.mean(scores, axis=0)
        found |= {f"map/{protocol}": float(means[0])}
        found |= {f"mp@{k}/{protocol}": float(mean) for k, mean in zip(KS, means[1:], strict=True)}
    return found


WAYS = {"counting": counting, "argsort": argsort}


def measure(way: str, path: Path, rows: int, dimension: int, threads: int) -> dict[str, Any]:
    """Measure in this process."""
    queries, truth = queries_and_truth(dimension)
    database = np.memmap(path, np.float32, "r", shape=(rows, dimension))
    # What is loaded or compiled at the first call is not counted.
    WAYS[way](queries, database[:LISTED_ROWS], truth, threads)
    before = private_memory()
    metrics: dict[str, float] = {}
    with most_private_memory() as peak:
        taken = once(lambda: metrics.update(WAYS[way](queries, database, truth, threads)))
    memory = (peak[0] - before) / 2**20
    return {"wall": taken.wall, "cpu": taken.processor, "memory": memory, "metrics": metrics}


def measured(way: str, path: Path, rows: int, dimension: int, threads: int) -> dict[str, Any]:
    sizes = ["--rows", str(rows), "--dimension", str(dimension), "--threads", str(threads)]
    try:
        return in_its_own_process(__file__, ["--measure", way, "--file", str(path), *sizes], threads)
    except ProcessError as error:
        raise SystemExit(f"{way} failed:\n{error}") from None


def compare(path: Path, rows: int, dimension: int, threads: list[int]) -> float:
    """Print the table; the largest difference of a metric."""
    print(f"{'':12}{'threads':>9}{'wall s':>10}{'cpu s':>10}{'MiB':>8}{'ratio of wall':>16}{'of MiB':>9}")
    worst = 0.0
    for count in threads:
        found = {way: measured(way, path, rows, dimension, count) for way in WAYS}
        ours, theirs = found["counting"], found["argsort"]
        for way, one in found.items():
            ratios = ""
            if way == "argsort":
                ratios = f"{one['wall'] / ours['wall']:16.2f}{one['memory'] / max(ours['memory'], 0.1):9.0f}"
                _claim(rows, dimension, count, ours, one)
            numbers = f"{one['wall']:10.2f}{one['cpu']:10.2f}{one['memory']:8.0f}"
            print(f"{way:12}{count:9}{numbers}{ratios}", flush=True)
        both = ours["metrics"].keys() & theirs["metrics"].keys()
        worst = max(worst, *(abs(ours["metrics"][name] - theirs["metrics"][name]) for name in both))
    named = ("map/easy", "map/medium", "map/hard", "mp@10/hard")
    print("\n" + ", ".join(f"{name} {ours['metrics'][name]:.5f}" for name in named))
    return worst


def _claim(rows: int, dimension: int, threads: int, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for what, field, unit in (("time", "wall", "s"), ("memory", "memory", "MiB")):
        claim(
            f"revisited evaluation of {QUERIES} queries among {rows:,} x {dimension}, {on_threads(threads)}: "
            f"the {what} of sorting over ours",
            peer="a full argsort",
            ratio=theirs[field] / max(ours[field], 0.1),
            detail=f"{theirs[field]:.3g} {unit}, {ours[field]:.3g} {unit}",
            headline=threads == 1,
        )


def main() -> int:

    parser = arguments(__doc__, "few rows of few dimensions")
    parser.add_argument("--rows", type=int, help="of the database, distractors included")
    parser.add_argument("--dimension", type=int)
    parser.add_argument("--threads", type=int, default=cores(), help="besides one thread")
    parser.add_argument("--folder", type=Path, help="where the file is put meanwhile")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = options.rows or LISTED_ROWS + (50_000 if options.short else DISTRACTORS)
    dimension = options.dimension or (128 if options.short else 2048)
    if options.measure:
        print(json.dumps(measure(options.measure, options.file, rows, dimension, options.threads)))
        return 0
    if rows < _BLOCK:
        parser.error(f"at least {_BLOCK:,} rows")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "vectors"
        write_database(path, rows, dimension)
        size = path.stat().st_size / 2**20
        with path.open("rb") as file:
            while file.read(1 << 24):  # From now on it is where the system keeps what was read.
                pass
        with measuring(f"{rows:,} x {dimension}, {size:,.0f} MiB"):
            worst = compare(path, rows, dimension, sorted({1, options.threads}))
            print(f"agreement {worst:.1e}")
    return 0 if worst <= 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
