"""Geometric verification: one image's local features against those of others.

Pairs of features by their descriptors (`matching`), then the model that most of them agree on (`geometry`).
What two images give depends on their features alone: the sampling is seeded with where they are, so it is the
same in any index, in any shard, for any number of threads, and for the two images by themselves.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.descriptors import Form, Local
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search.geometry import Geometry, GeometryConfig, Size, estimate
from ray_retrieval.search.matching import MatchingConfig, Rows, pairs
from ray_retrieval.search.threads import one_blas_thread, run_all


class VerifyConfig(Config):
    """How two images are compared by their local features."""

    matching: MatchingConfig = MatchingConfig()
    geometry: GeometryConfig = GeometryConfig()
    min_inliers: int = Field(default=12, ge=1)
    """Fewer inliers say nothing. Pairs at random reach 5 to 9, one by one or as copies side by side, and 13
    where 350 crowd within 64 pixels. Of 250 pairs of unrelated photographs, with 1,000 features of 40
    dimensions each of MobileNetV2, one reaches 12 and none more after a short training. Untrained, with the
    longest features taken, 3 % do, up to 14: the margins of all images look alike."""


@dataclass(frozen=True)
class Verified:
    """What a query's features have in common with those of other images.

    Attributes:
        inliers: int64 [n]: pairs that agree on where things are; 0 without a model.
        significance: float64 [n]: see `geometry`; 0 without a model.
    """

    inliers: Rows
    significance: npt.NDArray[np.float64]


def verify(query: Local, candidates: Local, config: VerifyConfig, *, threads: int = 1) -> Verified:
    """How many features of one image and of each of some others agree on where things are.

    Args:
        query: one image.
        candidates: n images; those without features are welcome.
        config: how to pair and to estimate. `min_inliers` is left to the caller.
        threads: to share the images among, at least 1.

    Raises:
        ArtefactError: if the features are of different dimensions.
        RecipeError: if the estimator is not installed.
    """
    assert len(query) == 1, "one query at a time"
    found = Verified(np.zeros(len(candidates), np.int64), np.zeros(len(candidates)))

    def work(start: int, stop: int) -> None:
        for number in range(start, stop):
            geometry = compare(query, candidates.take(np.array([number])), config)[1]
            if geometry is not None:
                found.inliers[number] = np.count_nonzero(geometry.inliers)
                found.significance[number] = geometry.significance

    with one_blas_thread():
        run_all(work, [(number, number + 1) for number in range(len(candidates))], threads)
    return found


def compare(a: Local, b: Local, config: VerifyConfig) -> tuple[Rows, Geometry | None]:
    """The pairs of features of two images, and the model that most of them agree on.

    Args:
        a: one image.
        b: another; the threshold is measured there.
        config: how to pair and to estimate.

    Returns:
        int64 [k, 2]: rows of `a.data` and of `b.data`, the most similar first; and the model, or None.

    Raises:
        ArtefactError: if the features are of different dimensions.
        RecipeError: if the estimator is not installed.
    """
    if a.data.shape[1] != b.data.shape[1]:
        raise ArtefactError(
            f"features to compare are of one model, got {Form.of(a)} and {Form.of(b)}",
            mend="encode both with one model",
        )
    paired = pairs(a.data, b.data, config.matching)
    points_a, points_b = a.locations[paired[:, 0]], b.locations[paired[:, 1]]
    found = estimate(points_a, points_b, _size(a), _size(b), config.geometry, _seed(a, b))
    return paired, found


def _size(image: Local) -> Size:
    width, height = image.sizes[0].tolist()
    return width, height


def _seed(a: Local, b: Local) -> int:
    """0 to 2³¹ - 1, of where the features of two images are."""
    return zlib.crc32(b.locations.tobytes(), zlib.crc32(a.locations.tobytes())) >> 1
