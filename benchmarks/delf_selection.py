"""What attention is worth: DELF's features by their scores against as many at random, in one run.

    python benchmarks/delf_selection.py [RUN]                   a finished run of jobs/delf_views_cpu.yaml
    python benchmarks/delf_selection.py [RUN] --short           30 features an image, 40 queries

Both describe the same views with the same network and the same principal components; only which cells of the
maps become features differs. Queries and database are the run's test; the shortlist is that of exact votes
over all features, and its first images are verified. Of pairs of views of one photograph the true homography
is known: `location error` is the distance, in pixels, of a match that verification has kept from where it
should be (median, and the share within 5 pixels). Below the random choice the run fails.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import yaml
from book import arguments, claim, measuring, skipped
from torch import Tensor, nn

from ray_retrieval import recipe as recipes
from ray_retrieval.config import validate
from ray_retrieval.cores import cores
from ray_retrieval.data import datasets
from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import Local
from ray_retrieval.metrics import rankings
from ray_retrieval.model import Encoder
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.neighbours import FeatureSegment
from ray_retrieval.search.rerank import GeometricVerificationConfig
from ray_retrieval.search.verify import VerifyConfig, compare, verify
from ray_retrieval.search.votes import LocalSearchConfig, search_votes
from ray_retrieval.storage import Folder

DEPTH = 50  # images of a shortlist that are verified
CLOSE = 5.0  # pixels


class RandomScores(nn.Module):
    """Scores without a meaning, the same each time."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, features: Tensor) -> Tensor:
        count, _, height, width = features.shape
        return torch.rand((count, height, width), generator=self.generator).to(features.device)


class Result(NamedTuple):
    features: float
    shortlist: tuple[float, float]
    verified: tuple[float, float]
    error: float
    close: float
    matches: float


def described(encoder: Encoder, table: ImageTable) -> Local:
    found, failures = encoder.encode_table(table)
    assert not failures
    assert isinstance(found, Local)
    return found


def measured(encoder: Encoder, queries: ImageTable, database: ImageTable, config: VerifyConfig) -> Result:
    asked, rows = described(encoder, queries), described(encoder, database)
    segment = FeatureSegment(rows.offsets, rows.data, 0, 0)
    hits = search_votes([segment], asked, len(rows), LocalSearchConfig(), images=len(rows), threads=cores())
    order = hits.rows.copy()
    for number in range(len(asked)):
        first = order[number, :DEPTH]
        first = first[first != NO_ROW]
        one = asked.take(np.array([number]))
        inliers = verify(one, rows.take(first), config, threads=cores()).inliers
        kept = np.where(inliers >= config.min_inliers, inliers, 0)
        order[number, : len(first)] = first[np.argsort(-kept, kind="stable")]

    def both(ranks: npt.NDArray[np.int64]) -> tuple[float, float]:
        found = rankings.evaluate(ranks, queries.labels, database.labels, (1,))
        return found["map"].value, found["recall@1"].value

    errors, matches = location_errors(asked, queries, rows, database, config)
    return Result(
        float(rows.counts.mean()),
        both(hits.rows),
        both(order),
        float(np.median(errors)),
        float((errors <= CLOSE).mean()),
        matches,
    )


def location_errors(
    asked: Local, queries: ImageTable, rows: Local, database: ImageTable, config: VerifyConfig
) -> tuple[npt.NDArray[np.float64], float]:
    """Pixels from where each verified match of a true pair should be, and how many such a pair has."""
    first, second = homographies(queries), homographies(database)
    errors, pairs = [np.zeros(0)], 0
    for query, label in enumerate(queries.labels.tolist()):
        for row in np.flatnonzero(database.labels == label).tolist():
            mine, other = asked.take(np.array([query])), rows.take(np.array([row]))
            found, geometry = compare(mine, other, config)
            pairs += 1
            if geometry is None:
                continue
            kept = found[geometry.inliers]
            between = second[row] @ np.linalg.inv(first[query])
            places = np.c_[mine.locations[kept[:, 0]], np.ones(len(kept))] @ between.T
            places = places[:, :2] / places[:, 2:]
            errors.append(np.linalg.norm(places - other.locations[kept[:, 1]], axis=1))
    joined = np.concatenate(errors)
    return joined, len(joined) / max(1, pairs)


def homographies(table: ImageTable) -> npt.NDArray[np.float64]:
    listed = table.table["homography"].to_pylist()
    return np.array(listed, np.float64).reshape(-1, 3, 3)


def main() -> int:
    parser = arguments(__doc__, "30 features an image, 40 queries")
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        default=Path("runs/delf_views_cpu"),
        help="folder of a finished run of DELF on synthetic views (%(default)s)",
    )
    parser.add_argument("--features", type=int, nargs="+", default=[20, 60], help="of an image, at most")
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    if options.short:
        options.features, options.queries = [30], 40
    if not (options.run / "model").is_dir():
        skipped(f"it needs a finished run of jobs/delf_views_cpu.yaml, and there is none in {options.run}")
        return 0
    with measuring(f"{cores()} threads"):
        return measure(options)


def measure(options: Namespace) -> int:
    """Print the table; 1 where attention is worse than chance."""
    recipe = validate(recipes.Recipe, yaml.safe_load((options.run / "recipe.yaml").read_text()))
    step = next(step for step in recipe.evaluate.rerank if isinstance(step, GeometricVerificationConfig))
    benchmark = datasets.load(recipe.data, seed=recipe.seed, splits=Folder(str(options.run / "split")))
    asked = np.arange(min(options.queries, len(benchmark.queries)))
    queries = benchmark.queries.take(asked)
    known = np.flatnonzero(np.isin(benchmark.database.labels, queries.labels))
    database = benchmark.database.take(known)
    print(f"{len(queries):,} queries, {len(database):,} views")
    print("features  chosen by  | mAP shortlist  verified | recall@1 shortlist  verified | error     close")
    worse = False
    for count in options.features:
        found = {}
        for choice in ("random", "attention"):
            encoder = Encoder(str(options.run / "model"), threads=cores())
            method = encoder.method
            pyramid = method.config.pyramid.model_copy(update={"max_features": count})
            method.config = method.config.model_copy(update={"pyramid": pyramid})
            if choice == "random":
                method.attention = RandomScores()
            found[choice] = result = measured(encoder, queries, database, step)
            encoder.close()
            before, after = result.shortlist, result.verified
            print(
                f"{result.features:8.1f}  {choice:<10} | {before[0]:13.4f}  {after[0]:8.4f} | "
                f"{before[1]:18.4f}  {after[1]:8.4f} | {result.error:5.2f} px  {result.close:5.3f}",
                flush=True,
            )
        claim(
            f"DELF's {count} features an image by their scores, {len(queries)} queries among {len(database)} "
            "views: mAP over that of as many at random",
            peer="features at random",
            ratio=found["attention"].verified[0] / found["random"].verified[0],
            goal=">= 1",
            detail=f"mAP {found['attention'].verified[0]:.3f}, {found['random'].verified[0]:.3f}",
            headline=True,
        )
        worse |= found["attention"].verified[0] <= found["random"].verified[0]
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
