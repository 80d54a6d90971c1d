"""The grid of regions, R-MAC and regional pooling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_retrieval.layers.pooling import GlobalPooling, l2_normalised
from ray_retrieval.layers.regions import Region, RegionalPooling, build_pooling, region_grid
from ray_retrieval.layers.whitening import Whitening


def naive_grid(height, width, levels=3):
    """The paper's grid by its words: 2 to 7 regions along the longer side, overlap of 40 %."""
    short, long = min(height, width), max(height, width)
    overlaps = [1 - (long - short) / (k - 1) / short for k in range(2, 8)]
    extra = int(np.argmin([round(abs(overlap - 0.4), 9) for overlap in overlaps])) + 1 if short != long else 0
    found = {(0, 0, height, width)}
    for level in range(1, levels + 1):
        side = math.floor(2 * short / (level + 1))
        rows = level + (extra if height > width else 0)
        columns = level + (extra if width > height else 0)
        for i in range(rows):
            for j in range(columns):
                top = math.floor(i * (height - side) / (rows - 1) + 1e-9) if rows > 1 else 0
                left = math.floor(j * (width - side) / (columns - 1) + 1e-9) if columns > 1 else 0
                found.add((top, left, side, side))
    return found


@pytest.mark.parametrize(
    ("height", "width", "count"), [(24, 24, 15), (24, 32, 21), (32, 24, 21), (16, 32, 27)]
)
def test_counts_of_regions_are_the_published_ones(height, width, count):
    assert len(region_grid(height, width)) == count


def test_a_small_grid_by_hand():
    # Side 4 and 2 · 4 / 3 = 2: the second level has two rows of two on a square map.
    squares = [Region(0, 0, 2, 2), Region(0, 2, 2, 2), Region(2, 0, 2, 2), Region(2, 2, 2, 2)]
    assert region_grid(4, 4, levels=2) == [Region(0, 0, 4, 4), Region(0, 0, 4, 4), *squares]


@given(st.integers(3, 40), st.integers(3, 40))
def test_the_grid_is_that_of_the_paper(height, width):
    assert set(region_grid(height, width)) == naive_grid(height, width)


@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 5))
def test_regions_lie_within_the_map_reach_its_borders_and_turn_with_it(height, width, levels):
    grid = region_grid(height, width, levels)
    assert all(region.height > 0 and region.width > 0 for region in grid)
    assert all(top >= 0 and top + high <= height for top, _, high, _ in grid)
    assert all(left >= 0 and left + wide <= width for _, left, _, wide in grid)
    assert max(top + high for top, _, high, _ in grid[1:]) == height
    assert max(left + wide for _, left, _, wide in grid[1:]) == width
    turned = [Region(left, top, wide, high) for top, left, high, wide in region_grid(width, height, levels)]
    assert sorted(turned) == sorted(grid)


def whitening(channels):
    layer = Whitening(channels, channels).double()
    torch.nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("kind", ["max", "average", "gem", "gemmp"])
@pytest.mark.parametrize("size", [(6, 6), (5, 9), (1, 1), (2, 7)])
def test_regional_pooling_equals_the_walk_over_regions(kind, size):
    torch.manual_seed(0)
    pooling, layer = GlobalPooling(kind, channels=5).double(), whitening(5)
    features = torch.rand(2, 5, *size, dtype=torch.float64)
    found = RegionalPooling(pooling, layer)(features)
    for image, vector in zip(features, found, strict=True):
        total = torch.zeros(5, dtype=torch.float64)
        for top, left, high, wide in region_grid(*size):
            pooled = pooling(image[None, :, top : top + high, left : left + wide])[0]
            pooled = pooled / (pooled.norm() + 1e-6)
            pooled = layer.weight @ pooled + layer.bias
            total += pooled / (pooled.norm() + 1e-6)
        assert torch.allclose(vector, total / (total.norm() + 1e-6))


def test_rmac_is_the_sum_of_normalised_maxima():
    torch.manual_seed(0)
    features = torch.rand(3, 4, 6, 8)
    regions = [
        features[:, :, top : top + high, left : left + wide] for top, left, high, wide in region_grid(6, 8)
    ]
    total = sum(l2_normalised(region.amax(dim=(2, 3))) for region in regions)
    found = build_pooling("rmac", 4)(features)
    assert torch.allclose(found, l2_normalised(total))
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize("kind", ["max", "average", "gem", "gemmp", "rmac"])
@pytest.mark.parametrize("regional", [False, True])
def test_every_pooling_trains_and_keeps_its_state(kind, regional):
    torch.manual_seed(0)
    made, again = (build_pooling(kind, 4, regional=regional).double() for _ in range(2))
    features = torch.rand(2, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    again.load_state_dict(made.state_dict())
    assert torch.equal(made(features), again(features))
    assert made(features).shape == (2, 4)
    assert torch.autograd.gradcheck(made, (features,), fast_mode=True)
    made(features)[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert any("whitening" in name for name in made.state_dict()) == regional


def test_features_of_zero_give_finite_vectors_and_gradients():
    for kind in ("gem", "rmac"):
        features = torch.zeros(1, 3, 4, 4, requires_grad=True)
        build_pooling(kind, 3, regional=True)(features).sum().backward()
        assert torch.isfinite(features.grad).all()
