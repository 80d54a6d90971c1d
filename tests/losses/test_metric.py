"""Losses of metric learning, against loops over anchors and pairs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.losses.metric import contrastive_losses, multi_similarity_losses, triplet_losses

LOSSES = [contrastive_losses, triplet_losses, multi_similarity_losses]


def naive_contrastive(row, positives, negatives, margin=0.5):
    near = [j for j in negatives if row[j] > margin]
    return sum(1 - row[j] for j in positives) + sum(row[j] for j in near), len(positives) + len(near)


def naive_triplet(row, positives, negatives, margin=0.1):
    if not positives or not negatives:
        return 0.0, 0
    loss = max(0.0, max(row[j] for j in negatives) - min(row[j] for j in positives) + margin)
    return loss, int(loss > 0)


def naive_multi_similarity(row, positives, negatives, alpha=2, beta=40, base=0.5, mining=0.1):
    if not positives or not negatives:
        return 0.0, 0
    furthest, nearest = min(row[j] for j in positives), max(row[j] for j in negatives)
    hard_n = [j for j in negatives if row[j] + mining > furthest]
    hard_p = [j for j in positives if row[j] - mining < nearest]
    if not hard_n or not hard_p:
        return 0.0, 0
    pulled = math.log(1 + sum(math.exp(-alpha * (row[j] - base)) for j in hard_p)) / alpha
    pushed = math.log(1 + sum(math.exp(beta * (row[j] - base)) for j in hard_n)) / beta
    return pulled + pushed, 1


NAIVE = dict(zip(LOSSES, [naive_contrastive, naive_triplet, naive_multi_similarity], strict=True))
OTHERS = dict(
    zip(
        LOSSES,
        [{"margin": -0.2}, {"margin": 0.6}, {"alpha": 3.0, "beta": 9.0, "base": 0.1, "mining": 0.4}],
        strict=True,
    )
)
"""Settings that are not the defaults."""


def example(seed, n, m, classes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(n, m, generator=generator, dtype=dtype) * 2 - 1
    labels = torch.randint(0, classes, (n,), generator=generator)
    others = torch.randint(0, classes, (m,), generator=generator)
    same = labels[:, None] == others
    valid = torch.rand(n, m, generator=generator) < 0.8
    return similarity, same & valid, ~same & valid


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    n=st.integers(0, 5),
    m=st.integers(0, 8),
    classes=st.integers(1, 3),
    others=st.booleans(),
)
def test_each_anchor_has_the_loss_of_the_loop(loss, seed, n, m, classes, others):
    similarity, positives, negatives = example(seed, n, m, classes)
    options = OTHERS[loss] if others else {}
    found = loss(similarity, positives, negatives, **options)
    expected = [
        NAIVE[loss](
            similarity[i].tolist(),
            torch.nonzero(positives[i])[:, 0].tolist(),
            torch.nonzero(negatives[i])[:, 0].tolist(),
            **options,
        )
        for i in range(n)
    ]
    assert found.values.shape == found.active.shape == (n,)
    assert found.values.tolist() == pytest.approx([value for value, _ in expected], abs=1e-12)
    assert found.active.tolist() == [active for _, active in expected]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    similarity, positives, negatives = example(3, 4, 6, 2)
    similarity.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, positives, negatives).values, (similarity,))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["positives", "negatives", "neither"])
def test_anchors_without_one_kind_of_pairs_still_back_propagate(loss, kind):
    similarity = torch.rand(3, 4, requires_grad=True)
    some, none = torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    positives, negatives = {
        "positives": (some, none),
        "negatives": (none, some),
        "neither": (none, none),
    }[kind]
    loss(similarity, positives, negatives).values.sum().backward()
    assert torch.isfinite(similarity.grad).all()


def test_large_exponents_do_not_overflow():
    similarity = torch.tensor([[1.0, 1.0]])
    positives, negatives = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    found = multi_similarity_losses(similarity, positives, negatives, beta=1000.0)
    assert float(found.values) == pytest.approx(math.log(1 + math.exp(-1)) / 2 + 0.5, rel=1e-6)
