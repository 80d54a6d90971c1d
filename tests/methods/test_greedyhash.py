import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.methods.base import Batch, Clock
from ray_retrieval.methods.greedyhash import (
    GreedyHash,
    GreedyHashConfig,
    classification_losses,
    quantisation_penalties,
)

SMALL = {"backbone": BackboneConfig(name="small", weights="none"), "image": {"size": 16}}


def naive_cross_entropy(logits, target):
    total = sum(math.exp(value) for value in logits)
    return -sum(
        weight * math.log(math.exp(value) / total) for value, weight in zip(logits, target, strict=True)
    )


def test_loss_of_single_labels_is_the_naive_cross_entropy():
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, 2, 2, 1])
    expected = [
        naive_cross_entropy(row, np.eye(4)[label]) for row, label in zip(logits.tolist(), labels, strict=True)
    ]
    assert classification_losses(logits, labels).tolist() == pytest.approx(expected)


def test_several_labels_share_the_target_equally():
    logits = torch.randn(2, 4, dtype=torch.float64)
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.float64)
    expected = [
        naive_cross_entropy(logits[0].tolist(), [0.5, 0, 0.5, 0]),
        naive_cross_entropy(logits[1].tolist(), [0, 1, 0, 0]),
    ]
    assert classification_losses(logits, labels).tolist() == pytest.approx(expected)


def test_an_image_without_labels_loses_nothing():
    logits = torch.randn(1, 4, requires_grad=True)
    loss = classification_losses(logits, torch.zeros(1, 4)).sum()
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(1, 4))


def test_penalty_is_the_naive_mean_of_cubes():
    relaxed = torch.tensor([[0.5, -2.0, 1.0], [0.0, 1.5, -1.0]], dtype=torch.float64)
    expected = [(0.5**3 + 1**3 + 0) / 3, (1**3 + 0.5**3 + 0) / 3]
    assert quantisation_penalties(relaxed).tolist() == pytest.approx(expected)


def test_gradients_of_the_pure_parts():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    relaxed = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: classification_losses(x, torch.tensor([0, 1, 2])), (logits,))
    assert gradcheck(quantisation_penalties, (relaxed,))


def test_gradient_on_the_relaxed_code_is_that_of_the_paper():
    """∂L/∂h = ∂CE/∂b (copied through the sign) + 3·penalty·sgn(h)·sgn(|h|−1)·(|h|−1)² / (images·bits)."""
    torch.manual_seed(1)
    method = GreedyHash(GreedyHashConfig(bits=6, penalty=0.7, **SMALL), classes=3).double()
    relaxed = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    signs = torch.where(relaxed >= 0, 1.0, -1.0).double().detach().requires_grad_()
    labels = torch.tensor([0, 1, 2, 1])
    torch.nn.functional.cross_entropy(method.classifier(signs), labels).backward()
    h = relaxed.detach()
    expected = signs.grad + 3 * 0.7 * h.sign() * (h.abs() - 1).sign() * (h.abs() - 1) ** 2 / (4 * 6)

    method.hash_layer = torch.nn.Identity()
    method.backbone = torch.nn.Identity()
    method.normalised = lambda images: images
    batch = Batch.whole(torch.arange(4), labels)
    terms = method.objective(method(relaxed), batch, Clock(seed=0))
    assert set(terms) == {"classification", "penalty"}
    sum(terms.values()).backward()
    assert torch.allclose(relaxed.grad, expected, atol=1e-12)


def test_the_classifier_is_trained_and_has_no_bias():
    method = GreedyHash(GreedyHashConfig(bits=6, **SMALL), classes=3)
    assert method.classifier.bias is None
    assert dict(method.named_parameters())["classifier.weight"].shape == (3, 6)


def test_head_can_learn_faster_than_the_backbone():
    method = GreedyHash(GreedyHashConfig(bits=6, head_lr_factor=5, **SMALL), classes=3)
    backbone, head = method.parameter_groups()
    assert (backbone.lr_factor, head.lr_factor, len(head.parameters)) == (1, 5, 3)
