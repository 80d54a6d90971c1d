from typing import get_args

import pytest
import safetensors.torch
import torch
from torchvision import models

from ray_retrieval.errors import ArtefactError, ModelError
from ray_retrieval.layers.backbones import (
    BackboneConfig,
    BackboneName,
    build_backbone,
    build_feature_map,
    least_side,
)

WIDTHS = {
    "small": 128,
    "alexnet": 4096,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "mobilenet_v2": 1280,
}


def config(name="mobilenet_v2", weights="none"):
    return BackboneConfig(name=name, weights=str(weights))


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_features_have_the_stated_width(name, width):
    network, stated = build_backbone(config(name))
    assert stated == width
    assert network.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, width)


@pytest.mark.parametrize("name", ["resnet101", "resnet152", "vgg16"])
def test_large_networks_are_known(name):
    with torch.device("meta"):
        _, width = build_backbone(config(name))
    assert width == (4096 if name == "vgg16" else 2048)


def has_a_map(network, height, width):
    try:
        return 0 not in network(torch.zeros(1, 3, height, width)).shape
    except RuntimeError:
        return False


DEEP = ("resnet101", "resnet152")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) if name in DEEP else name for name in get_args(BackboneName)],
)
def test_the_least_side_is_the_first_that_leaves_a_map(name):
    side = least_side(name)
    with torch.device("meta"):  # shapes alone, nothing is computed
        network, channels = build_feature_map(config(name))
        network.eval()
        assert network(torch.zeros(1, 3, side, side)).shape == (1, channels, 1, 1)
        assert not has_a_map(network, side - 1, 100)
        assert not has_a_map(network, 100, side - 1)
        assert all(has_a_map(network, side + more, side + 1) for more in (0, 1, 2, 5, 19))


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file_are_the_networks_own(tmp_path, suffix, scheme):
    source = models.mobilenet_v2()
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(source.state_dict(), path)
    network, _ = build_backbone(config(weights=f"{scheme}{path}"))
    images = torch.randn(2, 3, 64, 64)
    source.classifier[-1] = torch.nn.Identity()
    assert torch.equal(network.eval()(images), source.eval()(images))


def test_another_number_of_classes_is_no_mismatch(tmp_path):
    torch.save({"state_dict": models.mobilenet_v2(num_classes=7).state_dict()}, tmp_path / "w.pth")
    build_backbone(config(weights=tmp_path / "w.pth"))


def test_mismatch_names_the_keys(tmp_path):
    state = models.mobilenet_v2().state_dict()
    state["surplus"] = state.pop("features.0.0.weight")
    state["features.18.1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ModelError) as caught:
        build_backbone(config(weights=tmp_path / "w.pth"))
    for part in (
        "1 missing: features.0.0.weight",
        "1 unexpected: surplus",
        "another shape: features.18.1.bias",
    ):
        assert part in str(caught.value)


def test_pickled_objects_are_refused(tmp_path):
    torch.save({"a": object}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"w.pth: not a file of plain tensors"):
        build_backbone(config(weights=tmp_path / "w.pth"))


@pytest.mark.parametrize("content", [b"", b"not tensors"])
def test_broken_files_are_named(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ModelError, match=r"w.pth"):
        build_backbone(config(weights=tmp_path / "w.pth"))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_missing_file_is_named(tmp_path, scheme):
    with pytest.raises(ModelError, match=f"{scheme}{tmp_path}/w.pth: no such weights file"):
        build_backbone(config(weights=f"{scheme}{tmp_path}/w.pth"))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_variable_may_name_the_place_of_weights(tmp_path, monkeypatch, scheme):
    torch.save(models.mobilenet_v2().state_dict(), tmp_path / "w.pth")
    monkeypatch.setenv("THEIR_PLACE", f"{scheme}{tmp_path}")
    build_backbone(config(weights="$THEIR_PLACE/w.pth"))
    monkeypatch.delenv("THEIR_PLACE")
    with pytest.raises(ArtefactError, match="the environment variable THEIR_PLACE is not set"):
        build_backbone(config(weights="$THEIR_PLACE/w.pth"))


def test_without_a_network_imagenet_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ModelError) as caught:
        build_backbone(config("alexnet", "imagenet"))
    message = str(caught.value)
    assert "alexnet-owt-7be5be79.pth" in message
    assert f"{tmp_path}/hub/checkpoints" in message
    assert "\n" not in message


def test_a_model_about_to_be_loaded_needs_no_weights():
    build_backbone(config("alexnet", "imagenet"), pretrained=False)
