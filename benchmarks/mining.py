"""Mining the hard negatives of an epoch, against the published greedy loop, in one run.

    python benchmarks/mining.py            2,000 queries x 20,000 images of 551 clusters, 2048-d, 5 negatives
    python benchmarks/mining.py --short    200 queries x 4,000 images of 110 clusters, 256-d: seconds

Ours is `data.mining.hard_negatives`. The peer does what cirtorch does, in PyTorch: one product, a full
descending sort of every query's similarities, and a walk down each until enough clusters are found; the mean
distance of negatives that it sums up on the way is left out. Both begin with the same descriptors, which are
simulated: unit vectors around the centres of their clusters. Describing the images, which costs most of
mining, is no part of it.

`products` are the matrix products (ours with putting them in order by cluster), which both need and which are
the limit of any exact search; `rule` is all the rest: sort and walk, or ours. Wall times, the shortest of
several runs; ours on several threads shows the mean of the threads' products. The goal is a rule 20 times
faster; below it the run fails, but for --short. `agreement` is the share of equal negatives; others have to
be equally similar to 1e-5, as the two round their products differently.
"""

import sys
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from book import arguments, claim, measuring, on_threads

from ray_retrieval.cores import cores
from ray_retrieval.data import mining

GOAL = 20
Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


class Workload(NamedTuple):
    queries: int
    pool: int
    clusters: int
    dimension: int
    negatives: int = 5


class Descriptors(NamedTuple):
    queries: Vectors
    query_clusters: Rows
    pool: Vectors
    pool_clusters: Rows


class Times(NamedTuple):
    products: float
    rule: float

    @property
    def total(self) -> float:
        return self.products + self.rule


def simulated(work: Workload) -> Descriptors:
    """Unit vectors about the centres of clusters of very different sizes, as 3-D models have them."""
    random = np.random.default_rng(0)
    shares = random.lognormal(0, 1, work.clusters)
    clusters = random.choice(work.clusters, work.queries + work.pool, p=shares / shares.sum())
    centres = random.standard_normal((work.clusters, work.dimension), np.float32)
    vectors = random.standard_normal((len(clusters), work.dimension), np.float32)
    vectors += centres[clusters]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    q = work.queries
    return Descriptors(vectors[:q], clusters[:q], vectors[q:], clusters[q:])


def ours(given: Descriptors, negatives: int, threads: int) -> tuple[Rows, Times]:
    products = mining._products
    spent: list[float] = []

    def timed(*arguments: Any) -> Vectors:
        begun = time.perf_counter()
        found = products(*arguments)
        spent.append(time.perf_counter() - begun)
        return found

    mining._products = timed
    try:
        begun = time.perf_counter()
        found = mining.hard_negatives(*given, negatives, threads=threads)
        total = time.perf_counter() - begun
    finally:
        mining._products = products
    of_products = sum(spent) / threads
    return found, Times(of_products, total - of_products)


def published(given: Descriptors, negatives: int, threads: int) -> tuple[Rows, Times]:
    torch.set_num_threads(threads)
    queries, pool = (torch.from_numpy(vectors) for vectors in (given.queries, given.pool))
    of_queries, of_pool = given.query_clusters.tolist(), given.pool_clusters.tolist()
    begun = time.perf_counter()
    similarities = torch.mm(pool, queries.T)
    between = time.perf_counter()
    _, ranks = torch.sort(similarities, dim=0, descending=True)
    mined = []
    for query, own in enumerate(of_queries):
        used, found, rank = [own], [], 0
        while len(found) < negatives:
            position = int(ranks[rank, query])
            if of_pool[position] not in used:
                used.append(of_pool[position])
                found.append(position)
            rank += 1
        mined.append(found)
    return np.array(mined), Times(between - begun, time.perf_counter() - between)


def agreement(given: Descriptors, mine: Rows, theirs: Rows) -> tuple[float, float]:
    """The share of equal negatives, and the largest difference of similarity of the others."""
    query, place = np.nonzero(mine != theirs)
    worst = 0.0
    for q, p in zip(query, place, strict=True):
        both = given.pool[[mine[q, p], theirs[q, p]]].astype(np.float64) @ given.queries[q].astype(np.float64)
        worst = max(worst, float(abs(both[0] - both[1])))
    return 1 - len(query) / mine.size, worst


def compare(given: Descriptors, work: Workload, options: Any, said: str) -> bool:
    """Print the table; whether negatives agree and the goal is reached."""
    print(f"{'':12}{'threads':>8}{'products s':>12}{'rule s':>10}{'total s':>10}")
    ok = True
    for threads in sorted({1, options.threads}):
        best: dict[str, Times] = {}
        for _ in range(options.runs):
            mined = {}
            for name, work_ in (("ours", ours), ("published", published)):
                mined[name], taken = work_(given, work.negatives, threads)
                best[name] = min(best.get(name, taken), taken, key=lambda times: times.total)
        for name, times in best.items():
            print(f"{name:12}{threads:8}{times.products:12.3f}{times.rule:10.3f}{times.total:10.3f}")
        mine, theirs = best["ours"], best["published"]
        ratios = [theirs[0] / mine[0], theirs.rule / mine.rule, theirs.total / mine.total]
        print(f"{'ratio':12}{'':8}{ratios[0]:12.2f}{ratios[1]:10.1f}{ratios[2]:10.2f}", flush=True)
        for part, ratio in (("the rule", ratios[1]), ("with the products", ratios[2])):
            claim(
                f"mining {said}, {part}, {on_threads(threads)}: the published loop's time over ours",
                peer="cirtorch's greedy loop",
                ratio=ratio,
                goal=f">= {GOAL}" if part == "the rule" and not options.short else None,
                headline=threads == 1,
            )
        share, worst = agreement(given, mined["ours"], mined["published"])
        ok &= (options.short or ratios[1] >= GOAL) and worst <= 1e-5
    print(f"\nagreement {100 * share:.3f} %, others within {worst:.1e}")
    return ok


def main() -> int:
    parser = arguments(__doc__, "few images, short descriptors")
    parser.add_argument("--threads", type=int, default=cores(), help="besides one thread")
    parser.add_argument("--runs", type=int, default=3, help="of which the shortest time counts")
    options = parser.parse_args()
    work = Workload(200, 4_000, 110, 256) if options.short else Workload(2_000, 20_000, 551, 2048)
    given = simulated(work)
    said = (
        f"{work.queries:,} queries x {work.pool:,} images of {work.clusters} clusters, {work.dimension}-d, "
        f"{work.negatives} negatives"
    )
    with measuring(said):
        return 0 if compare(given, work, options, said) else 1


if __name__ == "__main__":
    sys.exit(main())
