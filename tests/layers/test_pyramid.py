"""The pyramid against loops over scales and cells, and against where things are in made images."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from ray_retrieval.layers.pyramid import Pyramid, PyramidConfig
from ray_retrieval.layers.receptive_field import locations, receptive_field

CHANNELS, DIMENSION = 6, 4


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, CHANNELS, 3, 2, 1)
    return nn.Sequential(*layers).requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def projection():
    return torch.randn(DIMENSION, CHANNELS, generator=torch.Generator().manual_seed(1))


def images_of(n, height, width, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def attention(features):
    """Scores in so few steps that many cells have the same."""
    return (features.square().mean(dim=1) * 100).round() / 8


def extract(images, network, projection, config, scores=attention, **options):
    pyramid = Pyramid(config, receptive_field(network), CHANNELS)
    return pyramid.extract(
        images, lambda some, _: network(some), scores, lambda features: features @ projection.T, **options
    )


def overlap(one, other):
    """Intersection over union of two boxes, written out."""
    wide = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    high = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return wide * high / (area[0] + area[1] - wide * high)


def naive(image, network, projection, config):
    """One image's features by loops: tuples of descriptor, location, scale, score."""
    height, width = image.shape[1:]
    field, candidates = receptive_field(network), []
    for number, scale in enumerate(config.scales):
        high, wide = round(height * scale), round(width * scale)
        if min(high, wide) < config.min_side:
            continue
        resized = F.interpolate(image[None], size=(high, wide), mode="bilinear", antialias=True)
        features = network(resized)
        scores = attention(features)[0]
        cells = []
        for row in range(scores.shape[0]):
            for column in range(scores.shape[1]):
                score = float(scores[row, column])
                if config.threshold is not None and score < config.threshold:
                    continue
                left, top = (field.stride * place - field.padding for place in (column, row))
                box = (left, top, left + field.size, top + field.size)
                cells.append(
                    (-score, number, row * scores.shape[1] + column, box, features[0, :, row, column])
                )
        kept = []
        for cell in sorted(cells, key=lambda each: each[:3]):
            if config.nms_iou is None or all(
                overlap(cell[3], better[3]) <= config.nms_iou for better in kept
            ):
                kept.append(cell)
        candidates += kept
    found = []
    for score, number, _, box, feature in sorted(candidates, key=lambda each: each[:3])[
        : config.max_features
    ]:
        scale = config.scales[number]
        ratio_x, ratio_y = round(width * scale) / width, round(height * scale) / height
        x = ((box[0] + box[2] - 1) / 2 + 0.5) / ratio_x - 0.5
        y = ((box[1] + box[3] - 1) / 2 + 0.5) / ratio_y - 0.5
        projected = projection @ (feature / feature.norm())
        found.append(((projected / projected.norm()).tolist(), (x, y), scale, -score))
    return found


CONFIGS = {
    "all": {"max_features": 10_000},
    "best": {"max_features": 37},
    "threshold": {"threshold": 0.5},
    "nms": {"nms_iou": 0.3, "max_features": 60},
    "both": {"nms_iou": 0.1, "threshold": 0.5},
    "one scale": {"scales": (1.0,), "max_features": 5},
    "backwards": {"scales": (2.0, 0.7, 1.0, 0.5), "max_features": 50},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_features_are_those_of_loops_over_scales_and_cells(network, projection, options):
    config, images = PyramidConfig(**options), images_of(2, 26, 35)
    for image, found in zip(images, extract(images, network, projection, config), strict=True):
        expected = naive(image, network, projection, config)
        assert len(found.scores) == len(expected) > 0
        assert all(column.dtype == torch.float32 for column in found)
        # The network rounds otherwise for another number of images; steps of 1/8 hide it from the order.
        for column, values in zip(found, zip(*expected, strict=True), strict=True):
            np.testing.assert_allclose(column, np.array(values), atol=2e-4)


@pytest.mark.parametrize("nms_iou", [None, 0.2])
def test_images_together_are_as_alone(network, projection, nms_iou):
    config, images = PyramidConfig(max_features=40, threshold=0.8, nms_iou=nms_iou), images_of(3, 40, 24)
    images[1] = 0
    together = extract(images, network, projection, config)
    counts = [len(found.scores) for found in together]
    assert counts[1] == 0 < min(counts[0], counts[2])
    for image, found in zip(images, together, strict=True):
        (alone,) = extract(image[None], network, projection, config)
        for column, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(column, expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 200), st.integers(12, 40), st.integers(12, 40), st.sampled_from([None, 0.2, 0.6]))
def test_fewer_features_are_the_first_of_more(network, projection, most, height, width, nms_iou):
    images = images_of(1, height, width, seed=most)
    (all_of_them,) = extract(
        images, network, projection, PyramidConfig(max_features=100_000, nms_iou=nms_iou)
    )
    (found,) = extract(images, network, projection, PyramidConfig(max_features=most, nms_iou=nms_iou))
    assert len(found.scores) == min(most, len(all_of_them.scores))
    for column, whole in zip(found, all_of_them, strict=True):
        torch.testing.assert_close(column, whole[:most])
    assert (found.scores.diff() <= 0).all()
    torch.testing.assert_close(
        found.descriptors.norm(dim=1), torch.ones(len(found.scores)), atol=1e-4, rtol=0
    )


def test_the_least_score_of_the_caller_counts_besides_that_of_the_configuration(network, projection):
    images = images_of(1, 40, 40)
    for threshold, least in [(0.5, 0.75), (0.75, 0.5), (None, 0.75)]:
        config = PyramidConfig(threshold=threshold)
        (found,) = extract(images, network, projection, config, threshold=least)
        assert found.scores.min() == 0.75, "of scores in steps of 1/8"


def test_an_image_too_small_for_every_scale_has_no_features(network, projection):
    for found in extract(images_of(2, 4, 200), network, projection, PyramidConfig()):
        assert [tuple(column.shape) for column in found] == [(0, DIMENSION), (0, 2), (0,), (0,)]
        assert all(column.dtype == torch.float32 for column in found)


def test_each_scale_is_seen_once_unless_it_is_too_small():
    seen = []

    def backbone(images, scale):
        seen.append((scale, tuple(images.shape)))
        return images

    pyramid = Pyramid(PyramidConfig(min_side=11), receptive_field(nn.Identity()), 3)
    pyramid.extract(images_of(2, 21, 42), backbone, lambda maps: maps.mean(dim=1), lambda rows: rows)
    # 21 / √2 is 14.8, and 21 / 2 is 10.5, rounded to 10.
    sizes = [(15, 30), (21, 42), (30, 59), (42, 84)]
    assert [shape for _, shape in seen] == [(2, 3, *size) for size in sizes]
    assert [scale for scale, _ in seen] == pytest.approx([2**-0.5, 1, 2**0.5, 2])


def test_scores_that_are_no_numbers_are_no_features(network, projection):
    def some_nan(features):
        scores = attention(features)
        scores[:, 0] = math.nan
        return scores

    config = PyramidConfig(scales=(1.0,), max_features=10_000)
    (found,) = extract(images_of(1, 40, 40), network, projection, config, scores=some_nan)
    assert len(found.scores) == 90
    assert found.scores.isfinite().all()


def test_under_autocast_scores_and_descriptors_are_float32(network, projection):
    config, images = PyramidConfig(), images_of(1, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        (rough,) = extract(images, network, projection, config)
    assert all(column.dtype == torch.float32 for column in rough)
    torch.testing.assert_close(
        rough.descriptors.norm(dim=1), torch.ones(len(rough.scores)), atol=1e-4, rtol=0
    )


def test_a_spot_is_found_where_it_is_at_every_scale():
    """A bright spot of two pixels' width in a dark image; the network is a mean of 2 x 2 pixels."""
    spot, network = np.array([44.3, 27.8]), nn.AvgPool2d(2)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    image = torch.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / 8).expand(1, 3, 64, 96)
    for scale in PyramidConfig().scales:
        pyramid = Pyramid(PyramidConfig(scales=(scale,), max_features=1), receptive_field(network), 3)
        (found,) = pyramid.extract(image, lambda some, _: network(some), lambda maps: maps[:, 0], lambda f: f)
        half_a_cell = 2 / scale / 2
        assert np.abs(found.locations[0].numpy() - spot).max() <= half_a_cell + 0.05


def test_cells_of_suppressed_neighbours_are_on_a_coarser_grid(network, projection):
    """Boxes of one stride apart overlap by more, those of two strides by less than asked for."""
    config = PyramidConfig(scales=(1.0,), nms_iou=0.2)
    field = receptive_field(network)  # 7 pixels, stride 4: 3 · 7 / (98 - 21) = 0.27 and 0
    (found,) = extract(images_of(1, 41, 57), network, projection, config)
    grid = locations(11, 15, field, 1, 1)
    assert (torch.cdist(found.locations, grid).amin(dim=1) < 1e-4).all()
    apart = torch.cdist(found.locations, found.locations, p=math.inf) + 99 * torch.eye(len(found.scores))
    straight = (found.locations[:, None] == found.locations).any(dim=2)
    assert apart[straight].min() == 8, "neighbours beside and above are left out"
    assert apart.min() == 4, "diagonal ones are not: 3 · 3 / (98 - 9) = 0.1"


def test_how_many_images_go_at_once():
    pyramid = Pyramid(PyramidConfig(), receptive_field(nn.Identity()), 3)
    assert pyramid.images_at_once(960, 1280) == 3  # 1.2 million pixels each, of 4.2
    assert pyramid.images_at_once(3000, 4000) == 1
    assert pyramid.images_at_once(256, 256) == 64


def test_runs_of_images_are_put_together(monkeypatch, network, projection):
    images, config = images_of(5, 40, 56), PyramidConfig(max_features=20)
    expected = extract(images, network, projection, config)
    monkeypatch.setattr("ray_retrieval.layers.pyramid._PIXELS", 2 * 80 * 112)  # two images at scale 2
    found = extract(images, network, projection, config)
    assert len(found) == 5
    for one, other in zip(expected, found, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "options", [{"scales": ()}, {"scales": (0.0,)}, {"nms_iou": 1.0}, {"max_features": 0}, {"min_side": 7}]
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ValidationError):
        PyramidConfig(**options)
