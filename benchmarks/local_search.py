"""Shortlists of images by their local features, against the number of images, in one run.

    python benchmarks/local_search.py                2,000 images of 1,000 features of 40 dimensions
    python benchmarks/local_search.py --short        500 images

Ten images show a scene: 3 % of their features are noisy copies of the scene's, the others lie around
centres that all images share. A query is one more image of a scene with as many features.

    exact       votes, with all features compared: what the others are measured by
    votes       votes, with the index of FAISS that `auto` takes for so many features
    asmk        ASMK*, with as many words as the index has cells, five for each feature of the query

`ms` is the shortest wall time of a query of several runs, and `cpu` the processor time of all its threads,
which says more where other programs run. `recall@100` is the share of the exact votes' first 100 images that
are among the first 100: past the ten of the scene, images that have nothing but noise in common with the
query; `scene` is the share of those ten that are. Bytes are those of the files that are searched, by feature;
the float16 features themselves, 80 bytes each, are read by the exact votes and for verification. A search
that grows with the root of the number takes √N times as long for N times the images.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from book import arguments, claim, measuring
from timing import Taken, once

from ray_retrieval.cores import cores
from ray_retrieval.descriptors import Local
from ray_retrieval.search import asmk, faiss_index
from ray_retrieval.search.asmk import AsmkSegment, search_asmk
from ray_retrieval.search.hits import Hits
from ray_retrieval.search.neighbours import FeatureSegment, IndexedFeatures, fill, sample_features
from ray_retrieval.search.votes import LocalSearchConfig, choose_shortlist, recall_of_votes, search_votes

SCENE_IMAGES, FEATURES, DIMENSION, DEPTH = 10, 1000, 40, 100
SCENE_SHARE, CENTRES, NOISE = 0.03, 5_000, 0.5
_GOAL_TIMES = 10  # From so many times the images on, growth tells.

Search = Callable[[Local], Hits]


def images_of(scenes: np.ndarray, seed: int) -> Local:
    """One image of each of the scenes."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((CENTRES, DIMENSION), np.float32)
    data = np.empty((len(scenes) * FEATURES, DIMENSION), np.float16)
    own = int(SCENE_SHARE * FEATURES)
    for number, scene in enumerate(scenes):
        of_scene = np.random.default_rng([1, scene])
        around = centres[of_scene.integers(0, CENTRES, own)]
        around = around + NOISE * of_scene.standard_normal((own, DIMENSION), np.float32)
        others = centres[random.integers(0, CENTRES, FEATURES - own)]
        found = np.concatenate([around, others])
        found += np.repeat([0.3, NOISE], [own, FEATURES - own])[:, None] * random.standard_normal(found.shape)
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        data[number * FEATURES : (number + 1) * FEATURES] = found
    count, total = len(scenes), len(data)
    return Local(
        np.arange(0, total + 1, FEATURES, dtype=np.int64),
        data,
        np.zeros((total, 2), np.float32),
        np.ones(total, np.float32),
        np.ones(total, np.float32),
        np.ones((count, 2), np.int32),
        np.zeros((count, 0), np.float32),
    )


def searches(segment: FeatureSegment, folder: Path, threads: int) -> dict[str, tuple[Search, float, str]]:
    """Each with its bytes a feature and what it is, ready to search."""
    config, total = LocalSearchConfig(), len(segment.data)
    chosen = choose_shortlist(LocalSearchConfig(shortlist="votes"), features=total, vectors=0)
    words = choose_shortlist(LocalSearchConfig(shortlist="asmk"), features=total, vectors=0).words
    assert chosen.factory is not None
    sample = sample_features([segment], chosen.train_rows, 0)
    index, lists = folder / "index.faiss", folder / "lists.asmk"
    with index.open("wb") as stream:
        fill(faiss_index.train(chosen.factory, sample, 0), segment, stream.write)
    with lists.open("wb") as stream:
        asmk.fill(asmk.train(words, sample, 0), segment, stream.write, threads=threads)
    count = len(segment)
    votes = partial(search_votes, k=DEPTH, config=config, images=count, threads=threads)
    indexed, inverted = IndexedFeatures(index, segment), AsmkSegment(lists, segment)
    return {
        "exact": (lambda queries: votes([segment], queries), 0.0, "all features"),
        "votes": (
            lambda queries: votes([indexed], queries),
            index.stat().st_size / total,
            f"{chosen.factory}, nprobe {config.nprobe}",
        ),
        "asmk": (
            lambda queries: search_asmk([inverted], queries, DEPTH, config, threads=threads),
            lists.stat().st_size / total,
            f"{words:,} words",
        ),
    }


def milliseconds(search: Search, queries: Local, runs: int) -> Taken:
    """One query: the means over the queries of the shortest of several runs."""
    taken = np.empty((2, runs, len(queries)))
    for run in range(runs):
        for number in range(len(queries)):
            taken[:, run, number] = once(partial(search, queries.take(np.array([number]))))
    wall, processor = 1e3 * taken.min(axis=1).mean(axis=1)
    return Taken(float(wall), float(processor))


class Found(NamedTuple):
    """Processor time of a query in ms, and the share of the exact votes' first images that is found."""

    processor: float
    recall: float


def measure(database: Local, queries: Local, scenes: np.ndarray, threads: int) -> dict[str, Found]:
    """Print the lines of a database; what each search did."""
    found = {}
    segment = FeatureSegment(database.offsets, database.data, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, tuple[Search, float, str]] = {}
        built = once(lambda: made.update(searches(segment, Path(folder), threads))).wall
        exact = made["exact"][0](queries)
        for name, (search, size, what) in made.items():
            hits = exact if name == "exact" else search(queries)
            wall, processor = milliseconds(search, queries, 1 if name == "exact" else 5)
            of_scene = (hits.rows >= 0) & (hits.rows // SCENE_IMAGES == scenes[:, None])
            share = of_scene.sum() / (SCENE_IMAGES * len(queries))
            recall = recall_of_votes(exact, hits)
            found[name] = Found(processor, recall)
            cells = f"{wall:10.1f}{processor:10.1f}{recall:12.3f}{share:8.3f}{size:8.1f}"
            print(f"{len(database):8,}  {name:8}{cells}  {what}", flush=True)
        print(f"{'':8}  index and inverted file built in {built:.1f} s", flush=True)
    return found


def claim_growth(found: dict[int, dict[str, Found]]) -> None:
    """What so many times the images cost, by searches."""
    first, last = min(found), max(found)
    for name in ("votes", "asmk"):
        before, after = found[first][name], found[last][name]
        what = f"shortlist by {name}, a query of {FEATURES:,} features"
        claim(
            f"{what} among {last:,} images for {first:,}: growth of the processor time "
            "over that of the images",
            peer="time that grows with the images",
            ratio=after.processor / before.processor / (last / first),
            goal="<= 0.5" if last >= _GOAL_TIMES * first else None,
            detail=f"{before.processor:.0f} ms, {after.processor:.0f} ms; {before.recall:.2f} and "
            f"{after.recall:.2f} of the exact votes' first {DEPTH}",
            headline=True,
        )
        claim(
            f"{what} among {last:,} images: the exact votes' processor time over it",
            peer="votes of all features",
            ratio=found[last]["exact"].processor / after.processor,
        )


def main() -> None:
    parser = arguments(__doc__, "100 and 500 images")
    parser.add_argument("--images", type=int, nargs="+", default=[200, 500, 1000, 2000])
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    sizes = [100, 500] if options.short else sorted(options.images)
    scenes = np.arange(options.queries)
    database = images_of(np.arange(sizes[-1]) // SCENE_IMAGES, 1)
    queries = images_of(scenes, 2)
    with measuring(f"{FEATURES:,} features an image, {DIMENSION} dimensions, {options.threads} threads"):
        print(f"{'images':>8}  {'':8}{'ms':>10}{'cpu':>10}{'recall@100':>12}{'scene':>8}{'bytes':>8}")
        claim_growth(
            {
                size: measure(database.take(np.arange(size)), queries, scenes, options.threads)
                for size in sizes
            }
        )


if __name__ == "__main__":
    main()
