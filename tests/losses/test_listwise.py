"""Losses of rankings, against loops, and against average precision itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from ray_retrieval.losses import listwise
from ray_retrieval.losses.listwise import quantised_ap_losses, smooth_ap_losses

LOSSES = [smooth_ap_losses, quantised_ap_losses]


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def naive_smooth(row, positives, negatives, temperature=0.01):
    total = 0.0
    for a in positives:
        good = 1 + sum(sigmoid((row[j] - row[a]) / temperature) for j in positives if j != a)
        total += good / (good + sum(sigmoid((row[j] - row[a]) / temperature) for j in negatives))
    return 1 - total / len(positives)


def naive_quantised(row, positives, negatives, bins=20):
    width = 2 / (bins - 1)
    precision_recall = right = everything = 0.0
    for number in range(bins):
        centre = 1 - number * width

        def counted(which, centre=centre):
            return sum(max(0.0, 1 - abs(row[j] - centre) / width) for j in which)

        more = counted(positives)
        right, everything = right + more, everything + more + counted(negatives)
        precision_recall += right / everything * more / len(positives) if everything else 0
    return 1 - precision_recall


NAIVE = dict(zip(LOSSES, [naive_smooth, naive_quantised], strict=True))


def example(seed, n, m, *, valid=0.8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(n, m, generator=generator, dtype=dtype) * 2 - 1
    same = torch.rand(n, m, generator=generator) < 0.4
    counts = torch.rand(n, m, generator=generator) < valid
    return similarity, same & counts, ~same & counts


def places(mask):
    return torch.nonzero(mask)[:, 0].tolist()


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(0, 4), m=st.integers(0, 9), block=st.integers(1, 40))
def test_each_query_has_the_loss_of_the_loop(loss, seed, n, m, block):
    similarity, positives, negatives = example(seed, n, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listwise, "_BLOCK_CPU", block)
        found = loss(similarity, positives, negatives)
    expected = [
        NAIVE[loss](similarity[i].tolist(), places(positives[i]), places(negatives[i]))
        if positives[i].any()
        else 0.0
        for i in range(n)
    ]
    assert found.values.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.active.tolist() == positives.any(dim=1).long().tolist()


@pytest.mark.parametrize("options", [{"temperature": 0.2}, {"bins": 7}], ids=["smooth", "quantised"])
@pytest.mark.parametrize("block", [1, 12, 1000])
def test_gradients(options, block, monkeypatch):
    monkeypatch.setattr(listwise, "_BLOCK_CPU", block)
    loss = smooth_ap_losses if "temperature" in options else quantised_ap_losses
    similarity, positives, negatives = example(5, 4, 7)
    positives[2] = False  # a query without positives
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    similarity.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: weights * loss(s, positives, negatives, **options).values, (similarity,)
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), m=st.integers(1, 30))
def test_with_a_small_temperature_smooth_ap_is_average_precision(seed, m):
    similarity, positives, negatives = example(seed, 3, m)
    found = smooth_ap_losses(similarity, positives, negatives, temperature=1e-9).values
    for i in range(3):
        counts = positives[i] | negatives[i]
        if positives[i].any():
            ap = average_precision_score(positives[i][counts].numpy(), similarity[i][counts].numpy())
            assert float(found[i]) == pytest.approx(1 - ap, abs=1e-9)


def test_with_many_bins_quantised_ap_is_average_precision():
    # Similarities on the centres of bins, so that nothing is shared between two of them.
    similarity = 1 - torch.randperm(101, generator=torch.Generator().manual_seed(0)).double()[None] / 50
    positives = torch.rand(1, 101, generator=torch.Generator().manual_seed(1)) < 0.3
    found = quantised_ap_losses(similarity, positives, ~positives, bins=101)
    ap = average_precision_score(positives[0].numpy(), similarity[0].numpy())
    assert float(found.values) == pytest.approx(1 - ap, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["perfect", "worst"])
def test_losses_of_the_best_and_the_worst_ranking(loss, dtype, order):
    similarity = torch.tensor([[0.9, 0.8, -0.7, -0.8]], dtype=dtype)
    first = torch.tensor([[True, True, False, False]])
    positives = first if order == "perfect" else ~first
    found = loss(similarity, positives, ~positives)
    # At worst the positives are at ranks 3 and 4. Bins put both into one, with precision 1/2.
    worst = 1 - (1 / 3 + 2 / 4) / 2
    assert found.values.dtype == dtype
    assert float(found.values) == pytest.approx(0 if order == "perfect" else worst, abs=0.1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (0, 4)])
def test_queries_without_positives_have_no_loss_and_still_back_propagate(loss, shape):
    similarity = torch.rand(shape, requires_grad=True)
    none = torch.zeros(shape, dtype=torch.bool)
    found = loss(similarity, none, ~none)
    found.values.sum().backward()
    assert not found.values.any()
    assert not found.active.any()
    assert not similarity.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_in_neither_mask_does_not_count(loss):
    similarity, positives, negatives = example(7, 3, 8, valid=0.5)
    other = torch.where(positives | negatives, similarity, 0.99).requires_grad_()
    values = loss(other, positives, negatives).values
    assert torch.equal(values, loss(similarity, positives, negatives).values)
    values.sum().backward()
    assert not other.grad[~(positives | negatives)].any()


def test_similarities_beyond_one_by_rounding_count_as_one():
    over = torch.tensor([[1.0 + 1e-6, -1.0 - 1e-6]])
    positives = torch.tensor([[True, False]])
    assert float(quantised_ap_losses(over, positives, ~positives).values) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="2 bins or more"):
        quantised_ap_losses(over, positives, ~positives, bins=1)
