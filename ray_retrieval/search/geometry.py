"""Whether pairs of features agree on where things are: an affine map or a homography, and who fits it.

A model that maps the locations of one image into the other is estimated from pairs of which many are wrong.
Pairs that it maps to within a threshold τ agree on it. One spot of an image is found at several scales and in
neighbouring cells of a map, and what takes it for a spot of another image does so several times: such pairs
are no independent evidence. So both images are cut into cells of side τ, and

    inliers         pairs within τ of the model, of which no two lie in one cell of either image
    significance    -log10 P[Binomial(M - s, p) ≥ k - s],  p = π τ² / (W H)

of k inliers, where M counts the different pairs of cells that there are, s pairs are what a model takes (3 or
4), and p is the chance that a pair at random falls within τ of where the model puts it. It can be compared
between images of any size and number of pairs; that the model is the best of many is not taken into account,
so chance reaches 3 or 4, and more where the features of an image crowd in a part of it.

OpenCV's USAC (Raguram et al. 2013) with the score of MAGSAC++ (Barath et al. 2020) is the default. Its
PROSAC sampler (Chum and Matas 2005) tries pairs in the order given, best first, and so finds few right ones
among many wrong. `skimage` is the reference: plain RANSAC, some hundred times slower.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.special import gammaln, logsumexp

from ray_retrieval.config import Config
from ray_retrieval.errors import RecipeError

Points = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Size = tuple[int, int]
"""Width and height in pixels."""

SAMPLE = {"affine": 3, "homography": 4}
"""Pairs that a model is determined by."""

_SIDE = 1024
"""Both images are brought to this longer side, so that nothing depends on their resolution."""
_AREAS = {"affine": (0.1, 10.0), "homography": (0.05, 20.0)}
"""How many times a model may change areas, anywhere among its inliers; both images as large as `_SIDE`."""
_STRETCH = 4.0
"""How many times it may lengthen one direction more than another, amid its inliers."""
_MOST_CELLS = 1 << 31
"""More than there are in a column of an image."""
_TRIES = 2
"""Repeated windows may make an impossible model the best one: then it is tried without what agrees on it."""


class GeometryConfig(Config):
    """How the model between two images is estimated."""

    model: Literal["affine", "homography"] = "affine"
    """`affine` is found from fewer right pairs; `homography` follows planes seen at a slant."""
    estimator: Literal["opencv", "skimage"] = "opencv"
    """`skimage` is for comparison; it needs the package scikit-image."""
    threshold: float = Field(default=20.0, gt=0)
    """τ: pixels from where the model puts it that a feature may lie, where the longer side of an image is
    1024; it grows with the image."""
    iterations: int = Field(default=1000, ge=1)
    """Models tried at the most."""
    confidence: float = Field(default=0.999, gt=0, lt=1)
    """Chance of having tried a model of nothing but right pairs, at which no more are tried."""


@dataclass(frozen=True)
class Geometry:
    """A model between two images.

    Attributes:
        matrix: float64 [3, 3]: maps (x, y, 1) of the first image to the second, up to a factor; the last
            entry is 1.
        inliers: bool [k]: which of the pairs count as its inliers, see above.
        significance: see above; at least 0.
    """

    matrix: Doubles
    inliers: Flags
    significance: float


def estimate(
    points_a: Points, points_b: Points, size_a: Size, size_b: Size, config: GeometryConfig, seed: int
) -> Geometry | None:
    """The model that most pairs agree on; the same whenever it is asked for, in any thread.

    Args:
        points_a: float32 [k, 2], x and y in the first image, pairs most likely to be right first.
        points_b: float32 [k, 2], in the second, where the threshold is measured.
        size_a: of the first image.
        size_b: of the second.
        config: what to look for.
        seed: 0 to 2³¹ - 1, of the sampling.

    Returns:
        None where the pairs lie in fewer different pairs of cells than a model takes, or nothing is found but
        models that no two views have: that mirror, fold or crush the image.

    Raises:
        RecipeError: if the estimator is not installed.
    """
    sample = SAMPLE[config.model]
    if len(points_a) < sample:
        return None
    scale_a, scale_b = _SIDE / max(size_a), _SIDE / max(size_b)
    a, b = points_a * np.float32(scale_a), points_b * np.float32(scale_b)
    cells = np.stack([_cells(a, config.threshold), _cells(b, config.threshold)], axis=1)
    # Copies of a pair would outvote others. MAGSAC has also failed on equal ones (OpenCV issue 19639).
    distinct = np.sort(np.unique(cells, axis=0, return_index=True)[1])
    find = _by_opencv if config.estimator == "opencv" else _by_skimage
    tried = distinct
    for _ in range(_TRIES):
        matrix = None if len(tried) < sample else find(a[tried], b[tried], config, seed)
        if matrix is None:
            return None
        residuals = residuals_of(matrix, a, b)
        fits = residuals <= config.threshold
        inliers = _spots(cells, residuals, np.flatnonzero(fits))
        if _possible(matrix, a[inliers], config.model):
            break
        tried = tried[~fits[tried]]
    else:
        return None
    chance = math.pi * config.threshold**2 / (scale_b**2 * size_b[0] * size_b[1])
    flags = np.zeros(len(a), np.bool_)
    flags[inliers] = True
    in_pixels = np.diag([1 / scale_b, 1 / scale_b, 1]) @ matrix @ np.diag([scale_a, scale_a, 1])
    return Geometry(in_pixels, flags, significance(len(inliers), len(distinct), chance, sample))


def residuals_of(matrix: Doubles, points_a: Points, points_b: Points) -> Doubles:
    """float64 [k]: pixels between each second point and where the model puts the first.

    Args:
        matrix: float64 [3, 3].
        points_a: float32 [k, 2].
        points_b: float32 [k, 2].
    """
    mapped = points_a.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        offsets = mapped[:, :2] / mapped[:, 2:] - points_b
    return np.nan_to_num(np.hypot(offsets[:, 0], offsets[:, 1]), nan=np.inf, posinf=np.inf)


def significance(inliers: int, pairs: int, chance: float, sample: int) -> float:
    """-log10 of the chance that as many pairs at random fit a model that some of them have made.

    Args:
        inliers: k.
        pairs: M, at least k.
        chance: p, that one pair at random fits; 1 or more is certainty.
        sample: s, pairs that make a model and so fit it.

    Returns:
        0 for no more inliers than a model takes; finite however small the chance is.
    """
    tried, more = pairs - sample, inliers - sample
    if more <= 0 or chance >= 1:
        return 0.0
    # The tail is added up in logarithms: its own value is below the smallest number for some 100 inliers.
    fitting = np.arange(more, tried + 1)
    ways = gammaln(tried + 1) - gammaln(fitting + 1) - gammaln(tried - fitting + 1)
    tail = logsumexp(ways + fitting * math.log(chance) + (tried - fitting) * math.log1p(-chance))
    return max(0.0, -float(tail) / math.log(10))


def _cells(points: Points, side: float) -> Rows:
    """int64 [k]: a number for each point that is the same for those in one cell of a grid of such a side."""
    columns = np.floor(points.astype(np.float64) / side).astype(np.int64)
    return columns[:, 0] * _MOST_CELLS + columns[:, 1]


def _spots(cells: Rows, residuals: Doubles, chosen: Rows) -> list[int]:
    """Those of the chosen pairs that share no cell with one that fits better.

    Args:
        cells: int64 [k, 2], of each pair in both images.
        residuals: float64 [k].
        chosen: int64 [m], numbers of pairs.
    """
    kept: list[int] = []
    taken_a: set[int] = set()
    taken_b: set[int] = set()
    ordered = chosen[np.lexsort((chosen, residuals[chosen]))]
    for pair, (cell_a, cell_b) in zip(ordered.tolist(), cells[ordered].tolist(), strict=True):
        if cell_a not in taken_a and cell_b not in taken_b:
            kept.append(pair)
            taken_a.add(cell_a)
            taken_b.add(cell_b)
    return kept


def _possible(matrix: Doubles, points: Points, model: str) -> bool:
    """Whether two views of one thing can be related so where the inliers are; see `_AREAS` and `_STRETCH`.

    Args:
        matrix: float64 [3, 3].
        points: float32 [k, 2]: the inliers in the first image.
        model: what the matrix is.
    """
    if not len(points) or not np.isfinite(matrix).all():
        return False
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    corners = np.array([[left, top, 1], [right, top, 1], [left, bottom, 1], [right, bottom, 1]])
    depths = corners @ matrix[2]
    if depths.min() <= 0:
        return False  # The line at infinity crosses them.
    # The determinant of a homography's Jacobian is that of its matrix over the third coordinate's cube.
    areas = np.linalg.det(matrix) / depths**3
    least, most = _AREAS[model]
    if not least <= areas.min() <= areas.max() <= most:
        return False
    mapped = matrix @ corners.mean(axis=0)
    jacobian = matrix[:2, :2] - np.outer(mapped[:2] / mapped[2], matrix[2, :2])
    lengths = np.linalg.svd(jacobian, compute_uv=False)
    return bool(lengths[0] < _STRETCH * lengths[1])


def _by_opencv(points_a: Points, points_b: Points, config: GeometryConfig, seed: int) -> Doubles | None:
    # Not at the top: it takes a while, and only those who verify need it.
    import cv2

    settings = cv2.UsacParams()
    settings.threshold, settings.confidence = config.threshold, config.confidence
    settings.maxIterations = config.iterations
    settings.sampler, settings.score = cv2.SAMPLING_PROSAC, cv2.SCORE_METHOD_MAGSAC
    # Its own threads would make the result depend on chance.
    settings.isParallel, settings.randomGeneratorState = False, seed
    try:
        if config.model == "affine":
            found: Any = cv2.estimateAffine2D(points_a, points_b, settings)[0]
        else:
            found = cv2.findHomography(points_a, points_b, settings)[0]
    except cv2.error:  # It refuses some sets of points that determine nothing.
        return None
    if found is None or not found.size:
        return None
    return _as_homography(found)


def _by_skimage(points_a: Points, points_b: Points, config: GeometryConfig, seed: int) -> Doubles | None:
    try:
        from skimage.measure import ransac
        from skimage.transform import AffineTransform, ProjectiveTransform
    except ImportError:
        raise RecipeError(
            "the estimator 'skimage' needs the package scikit-image", mend="install it, or take opencv"
        ) from None
    found, _ = ransac(  # type: ignore[no-untyped-call]
        (points_a.astype(np.float64), points_b.astype(np.float64)),
        AffineTransform if config.model == "affine" else ProjectiveTransform,
        min_samples=SAMPLE[config.model],
        residual_threshold=config.threshold,
        max_trials=config.iterations,
        stop_probability=config.confidence,
        rng=seed,
    )
    return None if not found else _as_homography(found.params)


def _as_homography(matrix: npt.NDArray[Any]) -> Doubles | None:
    """float64 [3, 3] whose last entry is 1, of [2, 3] or [3, 3]; None where that entry is 0."""
    full = np.eye(3)
    full[: len(matrix)] = matrix
    return None if full[2, 2] == 0 else full / full[2, 2]
