"""Losses of tuples, against loops over tuples and negatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.losses.tuples import contrastive_tuple_losses, triplet_tuple_losses

LOSSES = [contrastive_tuple_losses, triplet_tuple_losses]


def naive_contrastive(q, p, negatives, margin):
    def distance(x):
        return math.sqrt(sum((a - b + 1e-6) ** 2 for a, b in zip(q, x, strict=True)))

    return 0.5 * distance(p) ** 2 + sum(0.5 * max(0, margin - distance(n)) ** 2 for n in negatives)


def naive_triplet(q, p, negatives, margin):
    def squared(x):
        return sum((a - b) ** 2 for a, b in zip(q, x, strict=True))

    return sum(max(0, squared(p) - squared(n) + margin) for n in negatives)


NAIVE = dict(zip(LOSSES, [naive_contrastive, naive_triplet], strict=True))


def example(seed, tuples, negatives, width=4):
    generator = torch.Generator().manual_seed(seed)
    q, p, n = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((tuples, width), (tuples, width), (tuples, negatives, width))
    )
    return tuple(torch.nn.functional.normalize(x, dim=-1) for x in (q, p, n))


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999), tuples=st.integers(0, 4), negatives=st.integers(0, 5), margin=st.floats(0, 2)
)
def test_each_tuple_has_the_loss_of_the_loop(loss, seed, tuples, negatives, margin):
    q, p, n = example(seed, tuples, negatives)
    found = loss(q, p, n, margin=margin)
    lists = zip(q.tolist(), p.tolist(), n.tolist(), strict=True)
    assert found.shape == (tuples,)
    assert found.tolist() == pytest.approx([NAIVE[loss](*one, margin) for one in lists], abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    inputs = [x.requires_grad_() for x in example(1, 3, 4)]
    assert torch.autograd.gradcheck(lambda *x: loss(*x, margin=0.9), inputs)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_vectors_have_finite_gradients(loss, dtype):
    q = torch.nn.functional.normalize(torch.ones(1, 8, dtype=dtype), dim=1).requires_grad_()
    p, n = q.detach().clone().requires_grad_(), q.detach()[:, None].clone().requires_grad_()
    loss(q, p, n, margin=0.5).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, p, n))


def test_contrastive_of_a_tuple_by_hand():
    q, p = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negatives = torch.tensor([[[0.8, 0.6], [-1.0, 0.0]]])
    # ‖q − p‖² = 0.8; ‖q − n‖ is √0.4 for the near one and 2, beyond the margin, for the other.
    expected = 0.4 + 0.5 * (0.85 - math.sqrt(0.4)) ** 2
    assert float(contrastive_tuple_losses(q, p, negatives)) == pytest.approx(expected, rel=1e-5)


def test_triplets_of_a_tuple_by_hand():
    q, p = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negatives = torch.tensor([[[0.8, 0.6], [0.0, 1.0]]])
    # Squared distances: 0.8 to the positive, 0.4 and 2 to the negatives.
    assert float(triplet_tuple_losses(q, p, negatives)) == pytest.approx(0.5, rel=1e-6)
    assert float(triplet_tuple_losses(q, p, negatives, margin=1.5)) == pytest.approx(1.9 + 0.3, rel=1e-6)
