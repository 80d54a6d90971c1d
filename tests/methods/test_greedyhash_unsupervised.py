"""GreedyHash without labels."""

import pytest
import torch
import torch.nn.functional as F

from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.methods.base import Batch, Clock
from ray_retrieval.methods.greedyhash_unsupervised import (
    GreedyHashUnsupervised,
    GreedyHashUnsupervisedConfig,
)


def method(**settings):
    torch.manual_seed(0)
    backbone = BackboneConfig(name="small", weights="none")
    config = GreedyHashUnsupervisedConfig(bits=16, backbone=backbone, image={"size": 16}, **settings)
    return GreedyHashUnsupervised(config, classes=3)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_halves_of_a_batch_are_paired(count):
    torch.manual_seed(1)
    relaxed, features = torch.randn(count, 16), torch.randn(count, 8)
    rows = torch.arange(count)
    terms = method().objective(
        {"relaxed": relaxed, "features": features}, Batch.whole(rows, rows), Clock(seed=0)
    )
    signs = torch.where(relaxed >= 0, 1.0, -1.0)
    errors = [
        (
            F.cosine_similarity(signs[i], signs[i + count // 2], dim=0)
            - F.cosine_similarity(features[i], features[i + count // 2], dim=0)
        )
        ** 2
        for i in range(count // 2)
    ]
    assert float(terms["similarity"]) == pytest.approx(float(sum(errors)) / max(1, len(errors)), abs=1e-6)
    assert float(terms["penalty"]) == pytest.approx(0.1 * float((relaxed.abs() - 1).abs().pow(3).mean()))


def test_the_backbone_stays_as_it_is():
    made = method().train()
    before = {name: value.clone() for name, value in made.backbone.state_dict().items()}
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    rows = torch.arange(6)
    sum(made.objective(made(images), Batch.whole(rows, rows), Clock(seed=0)).values()).backward()
    assert all(torch.equal(value, before[name]) for name, value in made.backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in made.backbone.parameters())
    assert made.hash_layer.weight.grad.any()
    assert [len(group.parameters) for group in made.parameter_groups()] == [2]
