"""Classification with an angular margin, against angles computed one by one."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.errors import RecipeError
from ray_retrieval.losses.arcface import CosineClassifier, arcface_logits, arcface_losses


def naive_loss(row, label, margin, scale):
    logits = [scale * c for c in row]
    angle = math.acos(row[label])
    if angle + margin <= math.pi:
        logits[label] = scale * math.cos(angle + margin)
    else:
        logits[label] = scale * (row[label] - margin * math.sin(margin))
    highest = max(logits)
    return highest + math.log(sum(math.exp(x - highest) for x in logits)) - logits[label]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), margin=st.floats(0, math.pi / 2), scale=st.floats(1, 64))
def test_losses_are_those_of_the_angles(seed, margin, scale):
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(4, 5, generator=generator, dtype=torch.float64) * 1.98 - 0.99
    labels = torch.randint(0, 5, (4,), generator=generator)
    found = arcface_losses(cosines, labels, margin=margin, scale=scale)
    expected = [naive_loss(cosines[i].tolist(), int(labels[i]), margin, scale) for i in range(4)]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_without_a_margin_it_is_the_cross_entropy_of_cosines():
    cosines = torch.rand(6, 3, dtype=torch.float64) * 2 - 1
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    expected = F.cross_entropy(30 * cosines, labels, reduction="none")
    assert torch.allclose(arcface_losses(cosines, labels, margin=0.0), expected)


@pytest.mark.parametrize("margin", [0.0, 0.15, 0.5, 1.0, math.pi / 2])
def test_the_targets_logit_rises_with_its_cosine_everywhere(margin):
    cosines = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[:, None]
    logits = arcface_logits(cosines, torch.zeros(len(cosines), dtype=torch.int64), margin=margin)
    assert (logits.diff(dim=0) >= -1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_descriptor_and_class_agree_or_oppose(dtype):
    cosines = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0 + 1e-7, 0.0]], dtype=dtype, requires_grad=True)
    losses = arcface_losses(cosines, torch.tensor([0, 0, 0]))
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(cosines.grad).all()


def test_gradients_through_the_classifier():
    torch.manual_seed(0)
    classifier = CosineClassifier(4, 3).double()
    descriptors = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, -1])
    assert torch.autograd.gradcheck(
        lambda x, w: arcface_losses(torch.func.functional_call(classifier, {"weight": w}, x), labels),
        (descriptors, classifier.weight),
    )
    cosines = classifier(descriptors)
    expected = F.cosine_similarity(descriptors[:, None], classifier.weight[None], dim=2)
    assert torch.allclose(cosines, expected)


def test_images_without_a_label_have_no_loss():
    cosines = torch.rand(3, 4, requires_grad=True)
    losses = arcface_losses(cosines, torch.tensor([1, -1, 2]))
    losses.sum().backward()
    assert losses[1] == 0
    assert not cosines.grad[1].any()
    assert losses[0] > 0
    assert arcface_losses(torch.rand(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_cosines_are_float32_within_autocast():
    classifier = CosineClassifier(16, 5)
    descriptors = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, half = classifier(descriptors), classifier(descriptors.bfloat16())
    assert inside.dtype == half.dtype == torch.float32
    assert torch.equal(inside, classifier(descriptors))


def test_its_state_is_one_weight_a_class_and_scale_does_not_matter():
    classifier = CosineClassifier(8, 3)
    assert {name: tuple(value.shape) for name, value in classifier.state_dict().items()} == {"weight": (3, 8)}
    descriptors = torch.randn(2, 8)
    before = classifier(descriptors)
    with torch.no_grad():
        classifier.weight.mul_(7)
    assert torch.allclose(classifier(3 * descriptors), before, atol=1e-6)


def test_margins_beyond_a_right_angle_are_refused():
    with pytest.raises(RecipeError, match=r"margin: .*from 0 to π/2, found 2.0"):
        arcface_losses(torch.rand(1, 2), torch.tensor([0]), margin=2.0)
