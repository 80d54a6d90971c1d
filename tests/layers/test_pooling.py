"""Global pooling."""

import numpy as np
import pytest
import torch

from ray_retrieval.errors import RecipeError
from ray_retrieval.layers.backbones import BackboneConfig, build_feature_map
from ray_retrieval.layers.pooling import (
    GlobalPooling,
    SuperGlobalPooling,
    combine_scales,
    generalised_mean,
    l2_normalised,
    padded_to,
)


def features():
    torch.manual_seed(0)
    return torch.rand(3, 5, 4, 6, dtype=torch.float64)


def test_maximum_and_average():
    x = features()
    assert torch.equal(GlobalPooling("max")(x), x.flatten(2).max(dim=2).values)
    assert torch.allclose(GlobalPooling("average")(x), x.flatten(2).mean(dim=2))


def test_generalised_mean_lies_between_them_and_nears_the_maximum():
    x = features()
    assert torch.allclose(GlobalPooling("gem", p=1.0).double()(x), x.mean(dim=(2, 3)))
    found = GlobalPooling("gem", p=3.0).double()(x)
    assert torch.allclose(found, (x**3).mean(dim=(2, 3)) ** (1 / 3))
    assert torch.allclose(GlobalPooling("gem", p=400.0).double()(x), x.amax(dim=(2, 3)), rtol=0.02)


def test_gradients_reach_features_and_exponent():
    pooling, x = GlobalPooling("gem").double(), features().requires_grad_()
    assert torch.autograd.gradcheck(pooling, (x,))
    pooling(x).sum().backward()
    assert pooling.p.grad is not None
    assert pooling.p.grad.abs() > 0


def test_half_precision_does_not_overflow():
    x = torch.full((1, 2, 3, 3), 200.0).half()
    found = GlobalPooling("gem")(x)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.full((1, 2), 200.0), rtol=1e-3)


def test_features_of_zero_have_finite_gradients():
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    GlobalPooling("gem")(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", ["small", "resnet18", "mobilenet_v2", "alexnet", "vgg16"])
def test_feature_maps_have_the_stated_channels_for_any_size(name):
    network, channels = build_feature_map(BackboneConfig(name=name, weights="none"))
    with torch.no_grad():
        for size in ((96, 96), (96, 160)):
            found = network.eval()(torch.zeros(2, 3, *size))
            assert found.shape[:2] == (2, channels)
            assert found.ndim == 4


def test_one_exponent_a_channel():
    x = features()
    pooling = GlobalPooling("gemmp", channels=5).double()
    assert torch.allclose(pooling(x), GlobalPooling("gem").double()(x))
    exponents = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.5], dtype=torch.float64)
    with torch.no_grad():
        pooling.p.copy_(exponents)
    for channel, p in enumerate(exponents):
        expected = (x[:, channel] ** p).mean(dim=(1, 2)) ** (1 / p)
        assert torch.allclose(pooling(x)[:, channel], expected)
    with pytest.raises(RecipeError, match="one exponent a channel"):
        GlobalPooling("gemmp")


def test_exponents_below_one_count_as_one():
    x, pooling = features(), GlobalPooling("gem").double()
    with torch.no_grad():
        pooling.p.fill_(0.2)
    assert torch.allclose(pooling(x), x.mean(dim=(2, 3)))
    with pytest.raises(RecipeError, match="1 or more, found"):
        GlobalPooling("gem", p=0.5)


@pytest.mark.parametrize("p", [3.0, 9.0, 60.0])
def test_neither_dead_channels_nor_large_features_break_large_exponents(p):
    x = torch.rand(1, 3, 4, 4)
    x[:, 0] = 0
    x[:, 1] *= 1e4
    x.requires_grad_()
    pooling = GlobalPooling("gemmp", p=p, channels=3)
    pooling(x).sum().backward()
    expected = GlobalPooling("gem", p=p).double()(x.detach().double())
    assert torch.allclose(pooling(x).double(), expected, rtol=1e-4)
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(pooling.p.grad).all()


def test_the_gradient_of_the_exponent_is_the_derivative():
    x = features()

    def pooled(p):
        return generalised_mean(x, p)

    for p in (torch.tensor([2.5], dtype=torch.float64), torch.linspace(1, 4, 5, dtype=torch.float64)):
        assert torch.autograd.gradcheck(pooled, (p.requires_grad_(),))


def test_pooling_stays_in_float32_under_autocast():
    x = torch.rand(2, 3, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(GlobalPooling("gem")(x), GlobalPooling("gem")(x.clone()))
        found = GlobalPooling("gem")(x.bfloat16())
    assert found.dtype == torch.float32
    assert torch.allclose(found, GlobalPooling("gem")(x.bfloat16().float()))


def naive_superglobal(image):
    """ReLUP, the mean with the window's generalised mean, GeM+: by walking over the map [channels, h, w]."""
    x = np.maximum(image, 0.014)
    _, height, width = x.shape
    half_h, half_w = min(2, height - 1), min(2, width - 1)
    mirrored = np.pad(x, ((0, 0), (half_h, half_h), (half_w, half_w)), mode="reflect")
    smoothed = np.empty_like(x)
    for i in range(height):
        for j in range(width):
            window = mirrored[:, i : i + 2 * half_h + 1, j : j + 2 * half_w + 1]
            smoothed[:, i, j] = (x[:, i, j] + (window**2.5).mean(axis=(1, 2)) ** (1 / 2.5)) / 2
    return (smoothed**4.6).mean(axis=(1, 2)) ** (1 / 4.6)


@pytest.mark.parametrize("size", [(7, 9), (3, 5), (2, 6), (1, 1), (1, 8)])
def test_superglobal_pooling_equals_the_walk_over_the_map(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = SuperGlobalPooling()(x)
    assert np.allclose(found, np.stack([naive_superglobal(image) for image in x.numpy()]))
    with pytest.raises(RecipeError, match="odd side, found 4"):
        SuperGlobalPooling(window=4)


def test_scales_are_combined_by_mean_power_mean_or_maximum():
    v = l2_normalised(torch.rand(3, 4, 6, dtype=torch.float64))
    p = torch.tensor([2.7], dtype=torch.float64)
    for found, expected in (
        (combine_scales(v), v.mean(dim=0)),
        (combine_scales(v, p=2.7), ((v[0] ** 2.7 + v[1] ** 2.7 + v[2] ** 2.7) / 3) ** (1 / 2.7)),
        (combine_scales(v, p=p), ((v[0] ** 2.7 + v[1] ** 2.7 + v[2] ** 2.7) / 3) ** (1 / 2.7)),
        (combine_scales(v, "max"), torch.maximum(torch.maximum(v[0], v[1]), v[2])),
    ):
        assert torch.allclose(found, expected / (expected.norm(dim=1, keepdim=True) + 1e-6))
    assert torch.isfinite(combine_scales(-v)).all()


def test_lengths_are_one_and_zeros_stay_zeros():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    found = l2_normalised(x)
    assert torch.allclose(found, torch.tensor([[0.6, 0.8], [0.0, 0.0]]), atol=1e-6)
    found.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("height", "width"), [(9, 2), (3, 8), (1, 1), (7, 12), (10, 10)])
def test_small_images_have_their_borders_repeated(height, width):
    images = torch.rand(2, 3, height, width)
    found = padded_to(images, 8)
    assert found.shape == (2, 3, max(height, 8), max(width, 8))
    top, left = max(0, 8 - height) // 2, max(0, 8 - width) // 2
    rows = (torch.arange(found.shape[2]) - top).clamp(0, height - 1)
    columns = (torch.arange(found.shape[3]) - left).clamp(0, width - 1)
    assert torch.equal(found, images[:, :, rows][:, :, :, columns])


def test_images_that_are_large_enough_stay_as_they_are():
    images = torch.rand(1, 3, 8, 9)
    assert padded_to(images, 8) is images
    assert padded_to(images, 1) is images
