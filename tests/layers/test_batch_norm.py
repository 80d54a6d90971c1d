"""Batch normalisation inside convolutions."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ray_retrieval import model
from ray_retrieval.layers.backbones import BackboneConfig, build_backbone, build_feature_map
from ray_retrieval.layers.batch_norm import fold_batch_norm, synchronise_batch_norm
from ray_retrieval.methods import build
from ray_retrieval.methods.greedyhash import GreedyHashConfig
from ray_retrieval.storage import Folder


def _norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


def _trained(module: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics and parameters that are not the first ones."""
    torch.manual_seed(0)
    for norm in _norms(module):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
    return module.eval()


class TestFoldBatchNorm:
    @pytest.mark.parametrize("name", ["small", "resnet18", "resnet50", "mobilenet_v2"])
    @pytest.mark.parametrize("make", [build_backbone, build_feature_map])
    def test_backbones_make_the_same_of_images(self, make, name):
        network = _trained(make(BackboneConfig(name=name, weights="none"))[0])
        folded = copy.deepcopy(network)
        fold_batch_norm(folded)
        assert not _norms(folded)
        images = torch.randn(2, 3, 64, 48)
        with torch.inference_mode():
            expected = network(images)
            assert (folded(images) - expected).abs().max() < 1e-4 * expected.abs().max()

    def test_statistics_of_all_workers_are_folded_too(self):
        network = _trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        folded = copy.deepcopy(network)
        synchronise_batch_norm(folded)
        fold_batch_norm(folded)
        images = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(folded(images), network(images))
        assert not _norms(folded)

    def test_layers_of_other_modules_stay_as_they_are(self):
        class Crossed(nn.Module):
            """Calls its layers in another order than it holds them."""

            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, images):
                return self.conv(self.norm(images))

        network = _trained(nn.Sequential(Crossed(), nn.BatchNorm2d(3)))
        before = copy.deepcopy(network)
        fold_batch_norm(network)
        images = torch.randn(2, 3, 8, 8)
        assert torch.equal(network(images), before(images))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_encoder_folds_and_describes_as_its_model(tmp_path, precision):
    config = GreedyHashConfig(bits=16, backbone={"name": "small", "weights": "none"}, image={"size": 32})
    made = build(config, classes=3)
    _trained(made)
    model.save(
        Folder(tmp_path),
        config=config.model_dump(mode="json"),
        weights=made.state_dict(),
        classes=3,
        class_names=None,
        precision=precision,
        training={},
        metrics={},
    )
    encoder = model.Encoder(tmp_path)
    assert _norms(model.load(tmp_path).method)
    assert not _norms(encoder.method)
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        unfolded = model.load(tmp_path).method.describe(images)
    bits = [np.unpackbits(codes.data) for codes in (encoder.describe(images), unfolded)]
    assert (bits[0] == bits[1]).mean() > (0.99 if precision == "float32" else 0.9)
    encoder.close()
