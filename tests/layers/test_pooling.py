"""Global pooling."""

import pytest
import torch

from ray_retrieval.layers.backbones import BackboneConfig, build_feature_map
from ray_retrieval.layers.pooling import GlobalPooling


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
