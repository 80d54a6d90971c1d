"""Models between two images against known maps, scikit-image and the binomial tail; degenerate sets."""

import math
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from local_parts import SIZE, draw_affine

from ray_retrieval.search import geometry
from ray_retrieval.search.geometry import GeometryConfig, estimate, residuals_of, significance

MODELS = [
    GeometryConfig(model=model, estimator=estimator)
    for model in ("affine", "homography")
    for estimator in ("opencv", "skimage")
]


def in_words(config):
    return f"{config.model}-{config.estimator}"


def draw_pairs(seed, right, wrong, *, noise=1.0, matrix=None):
    """Points of both images, float32 [right + wrong, 2], the right pairs first."""
    generator = np.random.default_rng(seed)
    full = np.eye(3) if matrix is None else matrix
    if matrix is None:
        full[:2] = draw_affine(seed)
    a = generator.uniform(0, 1, (right + wrong, 2)) * SIZE
    mapped = np.c_[a, np.ones(len(a))] @ full.T
    b = mapped[:, :2] / mapped[:, 2:] + noise * generator.standard_normal(a.shape)
    b[right:] = generator.uniform(0, 1, (wrong, 2)) * SIZE
    return a.astype(np.float32), b.astype(np.float32), full


def found(a, b, config, seed=0, size=SIZE):
    return estimate(a, b, size, size, config, seed)


@pytest.mark.parametrize("config", MODELS, ids=in_words)
@pytest.mark.parametrize("seed", range(3))
def test_a_known_map_is_found_among_wrong_pairs(config, seed):
    a, b, matrix = draw_pairs(seed, 60, 60)
    made = found(a, b, config)
    assert made.matrix.shape == (3, 3)
    assert made.matrix[2, 2] == 1
    corners = np.array([[0, 0], [SIZE[0], 0], [0, SIZE[1]], SIZE], np.float32)
    wanted = np.c_[corners, np.ones(4)] @ matrix[:2].T
    assert residuals_of(made.matrix, corners, wanted.astype(np.float32)).max() < 12
    assert made.inliers[:60].sum() >= 54  # some share a cell
    assert made.inliers[60:].sum() <= 5
    assert made.significance > 40


@pytest.mark.parametrize("estimator", ["opencv", "skimage"])
def test_a_slanted_plane_is_found_as_homography(estimator):
    slanted = np.array([[0.8, 0.05, 30], [-0.1, 0.9, 40], [-0.0006, 0.0002, 1]])
    a, b, _ = draw_pairs(0, 80, 20, matrix=slanted, noise=0.5)
    made = found(a, b, GeometryConfig(model="homography", estimator=estimator, threshold=5))
    np.testing.assert_allclose(made.matrix / made.matrix[2, 2], slanted, rtol=0.1, atol=2)
    flat = found(a, b, GeometryConfig(model="affine", estimator=estimator, threshold=5))
    assert made.inliers[:80].sum() >= 75 > flat.inliers.sum()


def cell_of(point, threshold):
    """Where a point lies on a grid whose cells are as wide as the threshold."""
    side = threshold * max(SIZE) / 1024
    return math.floor(point[0] / side), math.floor(point[1] / side)


@pytest.mark.parametrize("threshold", [20, 60])
def test_inliers_are_the_best_pairs_within_the_threshold_of_which_none_share_a_cell(threshold):
    a, b, _ = draw_pairs(1, 50, 80, noise=4)
    made = found(a, b, GeometryConfig(threshold=threshold))
    near = []
    for row in range(len(a)):
        x, y, _ = made.matrix @ [*a[row], 1]
        near.append((math.hypot(x - b[row, 0], y - b[row, 1]), row))
    kept = []
    for residual, row in sorted(near):
        shared = any(
            cell_of(points[row], threshold) == cell_of(points[other], threshold)
            for points in (a, b)
            for other in kept
        )
        if residual <= threshold * SIZE[0] / 1024 and not shared:
            kept.append(row)
    assert np.flatnonzero(made.inliers).tolist() == sorted(kept)
    # Of the trials that they are among, those in the same cells of both images are one.
    trials = {(cell_of(x, threshold), cell_of(y, threshold)) for x, y in zip(a, b, strict=True)}
    chance = math.pi * (threshold * SIZE[0] / 1024) ** 2 / (SIZE[0] * SIZE[1])
    assert made.significance == significance(len(kept), len(trials), chance, 3)


@pytest.mark.parametrize("model", ["affine", "homography"])
def test_a_wrong_match_counts_once_however_often_it_is_found(model):
    """As of unrelated photographs: one spot is taken for another at several scales and in cells beside it."""
    counts, significances = [], []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        a, b = (
            np.repeat(generator.uniform(0, 1, (20, 2)) * SIZE, 6, axis=0) + generator.uniform(-4, 4, (120, 2))
            for _ in range(2)
        )
        order = generator.permutation(120)
        made = found(*(points[order].astype(np.float32) for points in (a, b)), GeometryConfig(model=model))
        counts.append(0 if made is None else made.inliers.sum())
        significances.append(0 if made is None else made.significance)
    assert max(counts) < 12  # a quarter of them had as many, and up to 30
    assert max(significances) < 10


def test_a_right_match_does_not_count_more_for_being_found_at_several_scales():
    a, b, _ = draw_pairs(3, 40, 30, noise=0.2)
    once = found(a, b, GeometryConfig())
    again = found(np.repeat(a, 7, axis=0), np.repeat(b, 7, axis=0), GeometryConfig())
    assert again.inliers.sum() == pytest.approx(once.inliers.sum(), abs=2)
    assert again.significance == pytest.approx(once.significance, rel=0.1)


@pytest.mark.parametrize("times", [(2, 2), (1, 8), (0.25, 1)])
def test_resolution_makes_no_difference(times):
    """Neither to who fits, nor to the significance, nor to which models are possible."""
    a, b, _ = draw_pairs(2, 40, 60, noise=8)
    sizes = [(round(factor * SIZE[0]), round(factor * SIZE[1])) for factor in times]
    scaled = [np.float32(factor) * points for factor, points in zip(times, (a, b), strict=True)]
    made, other = found(a, b, GeometryConfig()), estimate(*scaled, *sizes, GeometryConfig(), 0)
    np.testing.assert_array_equal(made.inliers, other.inliers)
    assert made.significance == pytest.approx(other.significance)
    wanted = np.diag([times[1], times[1], 1]) @ made.matrix @ np.diag([1 / times[0], 1 / times[0], 1])
    np.testing.assert_allclose(other.matrix, wanted, atol=1e-9)


@pytest.mark.parametrize("config", MODELS, ids=in_words)
def test_the_same_seed_gives_the_same_twice_and_in_threads(config):
    fast = config.estimator == "opencv"
    count = 8 if fast else 3
    cases = [draw_pairs(seed, 15, 60 if fast else 5, noise=4) for seed in range(count)]

    def work(seed):
        a, b, _ = cases[seed]
        return found(a, b, config, seed=seed)

    alone = [work(seed) for seed in range(count)]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(work, range(count)))
    for one, other in zip(alone, again, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one.matrix, other.matrix)
            np.testing.assert_array_equal(one.inliers, other.inliers)
            assert one.significance == other.significance


@pytest.mark.parametrize("config", MODELS, ids=in_words)
def test_too_few_pairs_give_no_model(config):
    a, b, _ = draw_pairs(3, 10, 0, noise=0)
    needed = geometry.SAMPLE[config.model]
    for count in range(needed):
        assert found(a[:count], b[:count], config) is None
    repeated = np.zeros(20, np.int64)
    assert found(a[repeated], b[repeated], config) is None
    made = found(a[:needed], b[:needed], config)
    if made is not None:  # RANSAC of scikit-image may not try the one sample that there is
        assert made.significance == 0


@pytest.mark.parametrize("config", MODELS[::2], ids=in_words)
def test_points_on_one_line_or_in_one_place_give_no_model(config):
    line = np.stack([np.arange(30), 2 * np.arange(30)], axis=1).astype(np.float32)
    assert found(line, line, config) is None
    scattered = draw_pairs(4, 30, 0)[0]
    assert found(scattered, np.full_like(scattered, 7), config) is None
    assert found(np.full_like(scattered, 7), scattered, config) is None


@pytest.mark.parametrize("config", MODELS[::2], ids=in_words)
@pytest.mark.parametrize(
    "linear",
    [
        [[-1, 0], [0, 1]],  # mirrored
        [[0.2, 0], [0, 0.2]],  # to a 25th of the area
        [[5, 0], [0, 5]],
        [[2.2, 0], [0, 0.5]],  # stretched by 4.4
    ],
    ids=["mirror", "crush", "blow up", "stretch"],
)
def test_what_no_two_views_can_be_is_no_model(config, linear):
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    a, b, _ = draw_pairs(5, 60, 0, noise=0.1, matrix=matrix)
    assert found(a, b, config) is None


def test_a_homography_whose_horizon_crosses_what_it_relates_is_no_model():
    matrix = np.array([[1, 0, 0], [0, 1, 0], [-1.0 / 400, 0, 1]])
    a, b, _ = draw_pairs(6, 200, 0, noise=0.1, matrix=matrix)
    assert found(a, b, GeometryConfig(model="homography")) is None
    beside = a[:, 0] < 250
    made = found(a[beside], b[beside], GeometryConfig(model="homography"))
    assert made.inliers.sum() > 0.8 * beside.sum()


def test_an_impossible_model_does_not_hide_a_possible_one():
    """Most pairs agree on a mirrored image, as where windows repeat; fewer on the scene."""
    a, b, _ = draw_pairs(8, 30, 0, noise=0.5)
    mirrored = np.diag([-1.0, 1, 1])
    mirrored[0, 2] = SIZE[0]
    c, d, _ = draw_pairs(9, 60, 0, noise=0.5, matrix=mirrored)
    made = found(np.concatenate([c, a]), np.concatenate([d, b]), GeometryConfig())
    assert made.inliers[60:].sum() >= 28
    assert made.inliers[:60].sum() <= 6


def test_no_location_is_counted_twice():
    """Many features of one image on one of the other: a few pairs agree, however many there are."""
    a, b, _ = draw_pairs(7, 40, 0, noise=0.2)
    near = np.repeat(np.arange(8), 5)
    made = found(a, b[near] + 0, GeometryConfig())
    for points in (a, b[near]):
        kept = points[made.inliers] if made is not None else points[:0]
        assert len(np.unique(kept, axis=0)) == len(kept)
    twice = found(np.repeat(a, 2, axis=0), np.repeat(b, 2, axis=0), GeometryConfig())
    assert twice.inliers.sum() == found(a, b, GeometryConfig()).inliers.sum()
    assert not twice.inliers[1::2].any()  # of equal pairs the first counts


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), count=st.integers(0, 40), places=st.integers(1, 6))
def test_anything_goes_in_and_only_sound_models_come_out(seed, count, places):
    """Points on a coarse grid: duplicates, lines and collapses of all kinds."""
    generator = np.random.default_rng(seed)
    a, b = (generator.integers(0, places, (count, 2)).astype(np.float32) * 40 for _ in range(2))
    for model in ("affine", "homography"):
        made = found(a, b, GeometryConfig(model=model), seed=seed)
        if made is None:
            continue
        assert np.isfinite(made.matrix).all()
        assert math.isfinite(made.significance)
        assert made.inliers.shape == (count,)
        assert len(np.unique(a[made.inliers], axis=0)) == made.inliers.sum()
        assert len(np.unique(b[made.inliers], axis=0)) == made.inliers.sum()
        assert np.linalg.det(made.matrix) > 0


def test_what_opencv_refuses_is_no_model(monkeypatch):
    def refuse(*_):
        raise cv2.error("sample_size <= points_size")

    monkeypatch.setattr(cv2, "estimateAffine2D", refuse)
    a, b, _ = draw_pairs(0, 20, 0)
    assert found(a, b, GeometryConfig()) is None


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(4, 60),
    share=st.floats(0, 1),
    chance=st.floats(1e-4, 0.5),
    sample=st.sampled_from([3, 4]),
)
def test_significance_is_the_tail_of_the_binomial_distribution(pairs, share, chance, sample):
    inliers = round(share * pairs)
    made = significance(inliers, pairs, chance, sample)
    if inliers <= sample:
        assert made == 0
        return
    tail = scipy.stats.binom.sf(inliers - sample - 1, pairs - sample, chance)
    if tail > 1e-250:
        assert made == pytest.approx(-math.log10(tail), abs=1e-6, rel=1e-6)
    assert made >= significance(inliers - 1, pairs, chance, sample)


def test_significance_is_finite_where_the_tail_is_below_the_smallest_number():
    made = significance(900, 1000, 0.0016, 3)
    assert made > 2000
    assert math.isfinite(made)
    # All of them: the tail is p to the power of M - s.
    assert significance(1000, 1000, 0.0016, 3) == pytest.approx(-997 * math.log10(0.0016))
    assert significance(20, 30, 1.5, 3) == 0
