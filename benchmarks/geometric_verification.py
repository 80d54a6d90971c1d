"""Geometric verification of one pair of images: ours against k-d tree matching and scikit-image's RANSAC.

    python benchmarks/geometric_verification.py             20 pairs of each kind, half a minute
    python benchmarks/geometric_verification.py --short     5 pairs of each kind

An image has 1,000 features of 40 dimensions, whose deviations fall as those of principal components do, so
that features which have nothing to do with each other can be alike. Some are seen in both images: under an
affine map with noise of 6 pixels, and with noise on their descriptors. `theirs` finds the nearest neighbour
of each feature by `scipy.spatial.cKDTree`, keeps those within 0.8, and gives their places to
`skimage.measure.ransac` with `AffineTransform`, 20 pixels and 1,000 trials. Those pairs are

    easy      about 450, of which some 145 are true
    hard      about 380, of which some 28 are true
    random    about 355, none true

The first table gives them to both and times the estimator alone. `ours` is OpenCV's USAC as it is set by
default; it tries pairs first that are more alike. `ours, any order` is given them in random order, as if that
told nothing. `inliers` are the means of all and of the true ones, and `most` is the largest number of all.
Where no pair is true, that is what chance reaches: `min_inliers` has to be above it.

The second table is all that is done for a pair of images, on one thread. `ours` is `search.verify.verify`,
whose pairs are mutual nearest neighbours.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from book import arguments, claim, measuring
from scipy.spatial import cKDTree
from skimage.measure import ransac
from skimage.transform import AffineTransform

from ray_retrieval.descriptors import Local
from ray_retrieval.search.geometry import GeometryConfig, estimate
from ray_retrieval.search.threads import one_blas_thread
from ray_retrieval.search.verify import VerifyConfig, compare, verify

SIZE = (1024, 768)
FEATURES, DIMENSION = 1000, 40
NOISE, BLUR = 6.0, 0.6
SPECTRUM = np.arange(1, DIMENSION + 1) ** -0.5
"""Deviations of the dimensions, which fall as those of principal components do: so there are false pairs."""
THRESHOLD, TRIALS, DISTANCE = 20.0, 1000, 0.8
KINDS = {"easy": 150, "hard": 30, "random": 0}
"""Features that both images share."""
ESTIMATOR = f"RANSAC of {TRIALS:,} trials"
PAIR = f"verification of two images of {FEATURES:,} features"

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Putatives:
    """Pairs that may be right: float32 [k, 2] in each image, best first, and which are."""

    a: Numbers
    b: Numbers
    true: Numbers


def draw_affine(random: np.random.Generator) -> tuple[Numbers, Numbers]:
    angle, scale = random.uniform(-0.3, 0.3), random.uniform(0.75, 1.3)
    turned = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turned @ (np.eye(2) + random.uniform(-0.15, 0.15, (2, 2)))
    centre = np.array(SIZE) / 2
    return linear, centre - linear @ centre + random.uniform(-40, 40, 2)


def draw_images(shared: int, seed: int) -> tuple[Local, Local, Numbers]:
    """Two images, and the true pairs of their features, int64 [shared, 2]."""
    random = np.random.default_rng(seed)
    descriptors = [SPECTRUM * random.standard_normal((FEATURES, DIMENSION)) for _ in range(2)]
    places = [random.uniform(0, 1, (FEATURES, 2)) * SIZE for _ in range(2)]
    linear, moved = draw_affine(random)
    rows, columns = np.arange(shared), random.permutation(FEATURES)[:shared]
    places[1][columns] = places[0][:shared] @ linear.T + moved + NOISE * random.standard_normal((shared, 2))
    blur = BLUR * SPECTRUM * random.standard_normal((shared, DIMENSION))
    descriptors[1][columns] = descriptors[0][:shared] + blur
    a, b = (image(*parts) for parts in zip(descriptors, places, strict=True))
    return a, b, np.stack([rows, columns], axis=1)


def image(descriptors: Numbers, places: Numbers) -> Local:
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    return Local(
        offsets=np.array([0, FEATURES], np.int64),
        data=descriptors.astype(np.float16),
        locations=places.astype(np.float32),
        scales=np.ones(FEATURES, np.float32),
        scores=np.linspace(2, 1, FEATURES, dtype=np.float32),
        sizes=np.array([SIZE], np.int32),
        vectors=np.zeros((1, 0), np.float32),
    )


def nearest_neighbours(a: Local, b: Local) -> tuple[Numbers, Numbers]:
    """The pairs that the k-d tree gives, int64 [k, 2], and their distances."""
    tree = cKDTree(b.data.astype(np.float32))
    distances, nearest = tree.query(a.data.astype(np.float32), distance_upper_bound=DISTANCE)
    rows = np.flatnonzero(np.isfinite(distances))
    return np.stack([rows, nearest[rows]], axis=1), distances[rows]


def are_true(pairs: Numbers, truth: Numbers) -> Numbers:
    known = {tuple(pair) for pair in truth.tolist()}
    return np.array([tuple(pair) in known for pair in pairs.tolist()], bool)


def draw_putatives(shared: int, seed: int) -> Putatives:
    a, b, truth = draw_images(shared, seed)
    pairs, distances = nearest_neighbours(a, b)
    pairs = pairs[np.argsort(distances, kind="stable")]
    return Putatives(a.locations[pairs[:, 0]], b.locations[pairs[:, 1]], are_true(pairs, truth))


def by_skimage(a: Numbers, b: Numbers, seed: int) -> Numbers | None:
    if len(a) <= 3:
        return None
    _, inliers = ransac(
        (a.astype(np.float64), b.astype(np.float64)),
        AffineTransform,
        min_samples=3,
        residual_threshold=THRESHOLD,
        max_trials=TRIALS,
        rng=seed,
    )
    return inliers


def by_default(a: Numbers, b: Numbers, seed: int) -> Numbers | None:
    found = estimate(a, b, SIZE, SIZE, GeometryConfig(threshold=THRESHOLD, iterations=TRIALS), seed)
    return None if found is None else found.inliers


def timed(work: Callable[[], Any], at_least: int = 3) -> tuple[Any, float]:
    """What it returns, and the shortest of some runs in milliseconds."""
    taken, found = [], None
    for _ in range(at_least):
        start = time.perf_counter()
        found = work()
        taken.append(time.perf_counter() - start)
    return found, 1e3 * min(taken)


def counted(found: Numbers | None, true: Numbers) -> tuple[int, int]:
    return (0, 0) if found is None else (int(found.sum()), int((found & true).sum()))


def line(
    kind: str, way: str, milliseconds: list[float], counts: list[tuple[int, int]], base: float, what: str
) -> None:
    spent, found = float(np.mean(milliseconds)), np.array(counts)
    if way == "ours":
        claim(
            f"{what}, {kind} pairs: its time over ours",
            peer="k-d tree and scikit-image's RANSAC",
            ratio=base / spent,
            goal=">= 50" if what == ESTIMATOR else None,
            detail=f"{base:.1f} ms, {spent:.2f} ms; {found[:, 1].mean():.1f} true inliers",
            headline=True,
        )
    print(
        f"{kind:<10}{way:<18}{spent:10.2f}{base / spent:8.0f}{found[:, 0].mean():10.1f}"
        f"{found[:, 1].mean():8.1f}{found[:, 0].max():7}",
        flush=True,
    )


def measure_estimators(kind: str, count: int) -> None:
    sets = [draw_putatives(KINDS[kind], seed) for seed in range(count)]
    base = 0.0
    for way in ("theirs", "ours", "ours, any order"):
        spent, counts = [], []
        for seed, pairs in enumerate(sets):
            order = np.arange(len(pairs.a))
            if way == "ours, any order":
                order = np.random.default_rng(seed).permutation(order)
            a, b, right = pairs.a[order], pairs.b[order], pairs.true[order]
            work = by_skimage if way == "theirs" else by_default
            found, taken = timed(lambda: work(a, b, seed), 1 if way == "theirs" else 5)  # noqa: B023
            spent.append(taken)
            counts.append(counted(found, right))
        base = base or float(np.mean(spent))
        line(kind, way, spent, counts, base, ESTIMATOR)


def their_way(a: Local, b: Local, seed: int) -> tuple[Numbers, Numbers | None]:
    pairs, _ = nearest_neighbours(a, b)
    return pairs, by_skimage(a.locations[pairs[:, 0]], b.locations[pairs[:, 1]], seed)


def measure_pairs_of_images(kind: str, count: int) -> None:
    images = [draw_images(KINDS[kind], seed) for seed in range(count)]
    config, base = VerifyConfig(), 0.0
    for way in ("theirs", "ours"):
        spent, counts = [], []
        for seed, (a, b, truth) in enumerate(images):
            if way == "theirs":
                (pairs, inliers), taken = timed(lambda: their_way(a, b, seed), 1)  # noqa: B023
            else:
                _, taken = timed(lambda: verify(a, b, config), 5)  # noqa: B023
                pairs, geometry = compare(a, b, config)
                inliers = None if geometry is None else geometry.inliers
            spent.append(taken)
            counts.append(counted(inliers, are_true(pairs, truth)))
        base = base or float(np.mean(spent))
        line(kind, way, spent, counts, base, PAIR)


def main() -> None:
    parser = arguments(__doc__, "5 pairs of each kind")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of images of each kind")
    options = parser.parse_args()
    count = 5 if options.short else options.pairs
    head = f"{'pairs':<10}{'':<18}{'ms/pair':>10}{'ratio':>8}{'inliers':>10}{'true':>8}{'most':>7}"
    with measuring(f"{count} pairs of each kind, one thread"), one_blas_thread():
        print(f"the estimator alone\n\n{head}")
        for kind in KINDS:
            measure_estimators(kind, count)
        print(f"\nmatching and estimator, {FEATURES:,} features of {DIMENSION} dimensions an image\n\n{head}")
        for kind in KINDS:
            measure_pairs_of_images(kind, count)


if __name__ == "__main__":
    main()
