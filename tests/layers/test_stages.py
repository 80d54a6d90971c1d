"""Backbones in two parts, between which local features are."""

import pytest
import torch
from torch import nn
from torchvision import models

from ray_retrieval.errors import RecipeError
from ray_retrieval.layers.backbones import (
    BackboneConfig,
    build_feature_map,
    build_stages,
    map_channels,
    stage_channels,
)

NAMES = ["small", "resnet18", "mobilenet_v2"]


def config(name, weights="none"):
    return BackboneConfig(name=name, weights=str(weights))


def stages(name, stride=16):
    torch.manual_seed(0)
    return build_stages(config(name), stride=stride)


@pytest.mark.parametrize("name", [*NAMES, "resnet34", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize("stride", [16, 32])
def test_maps_have_the_stated_channels_and_strides(name, stride):
    with torch.device("meta"):
        below, above, channels_below, channels_above = build_stages(config(name), stride=stride)
        lower = below(torch.zeros(2, 3, 96, 160))
        upper = above(lower)
    assert stage_channels(name) == (channels_below, channels_above)
    assert channels_above == map_channels(name)
    pixels = stride // 4 if name == "small" else stride
    assert lower.shape == (2, channels_below, 96 // pixels, 160 // pixels)
    whole = 8 if name == "small" else 32
    assert upper.shape == (2, channels_above, 96 // whole, 160 // whole)


@pytest.mark.parametrize("name", NAMES)
def test_the_two_parts_together_are_the_whole(name):
    below, above, _, _ = stages(name)
    torch.manual_seed(0)
    network, _ = build_feature_map(config(name))
    images = torch.randn(1, 3, 48, 64)
    whole, parts = network.eval(), nn.Sequential(below, above).eval()
    assert torch.equal(parts(images), whole(images))


@pytest.mark.parametrize("name", NAMES)
def test_stride_32_takes_every_second_cell_and_has_the_same_weights(name):
    close, apart = stages(name), stages(name, stride=32)
    images = torch.randn(1, 3, 80, 64)
    assert torch.equal(apart.below.eval()(images), close.below.eval()(images)[:, :, ::2, ::2])
    for one, other in ((close.below, apart.below), (close.above, apart.above)):
        assert {name: value.shape for name, value in one.state_dict().items()} == {
            name: value.shape for name, value in other.state_dict().items()
        }


def test_weights_from_a_file_reach_both_parts(tmp_path):
    source = models.resnet18().eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    below, above, _, _ = build_stages(config("resnet18", tmp_path / "w.pth"))
    for part, layers in ((below[6], source.layer3), (above[0], source.layer4)):
        assert all(torch.equal(value, layers.state_dict()[name]) for name, value in part.state_dict().items())


def test_the_lower_part_names_its_weights_as_the_whole_does():
    whole, _ = build_feature_map(config("resnet18"))
    assert set(stages("resnet18", 32).below.state_dict()) < set(whole.state_dict())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stride", [16, 32])
def test_eight_pixels_are_enough(name, stride):
    below, above, _, _ = stages(name, stride)
    lower = below.eval()(torch.zeros(1, 3, 8, 8))
    assert 0 not in lower.shape
    assert 0 not in above.eval()(lower).shape


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_backbones_without_stages_are_refused(name):
    with pytest.raises(RecipeError, match="choose one of: small, resnet18"):
        build_stages(config(name))
