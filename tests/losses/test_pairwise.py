"""The weighted pairwise loss, against the double loop that the paper's equations say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.losses.pairwise import ClassWeights, labelled, share_a_label, weighted_pairwise_loss

WEIGHTS = [ClassWeights("batch"), ClassWeights("dataset", 0.3), ClassWeights("constant", 5.0)]


def naive(codes, others, similar, valid, alpha, weights):
    """Equations 2 to 5, pair by pair."""
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for i in range(len(codes)):
        for j in range(len(others)):
            if valid[i, j]:
                s = bool(similar[i, j])
                theta = alpha * sum(float(a) * float(b) for a, b in zip(codes[i], others[j], strict=True))
                sums[s] += math.log(1 + math.exp(theta)) - s * theta
                counts[s] += 1
    n1, n0 = counts[True], counts[False]
    if weights.kind == "batch":
        return (sums[True] / n1 if n1 else 0) + (sums[False] / n0 if n0 else 0)
    if weights.kind == "dataset":
        pairs = max(1, n1 + n0)
        return (sums[True] / weights.value + sums[False] / (1 - weights.value)) / pairs
    divisor = weights.value * n1 + n0
    return (weights.value * sums[True] + sums[False]) / divisor if divisor else 0.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 5),
    m=st.integers(1, 6),
    alpha=st.floats(0.01, 3),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    weights=st.sampled_from(WEIGHTS),
)
def test_it_is_the_double_loop_of_the_paper(seed, n, m, alpha, density, weights):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, 4, generator=generator, dtype=torch.float64) * 2 - 1
    others = torch.rand(m, 4, generator=generator, dtype=torch.float64) * 2 - 1
    similar = torch.rand(n, m, generator=generator) < density
    valid = torch.rand(n, m, generator=generator) < 0.7
    found = weighted_pairwise_loss(codes, others, similar, valid, alpha=alpha, weights=weights)
    assert float(found) == pytest.approx(naive(codes, others, similar, valid, alpha, weights), abs=1e-12)


@pytest.mark.parametrize(("weights", "expected"), [(WEIGHTS[0], 2 * math.log(2)), (WEIGHTS[2], math.log(2))])
def test_at_zero_codes_the_loss_is_known(weights, expected):
    labels = torch.arange(6) % 3
    similar = share_a_label(labels, labels)
    valid = ~torch.eye(6, dtype=torch.bool)
    zero = torch.zeros(6, 8)
    found = weighted_pairwise_loss(zero, zero, similar, valid, alpha=0.1, weights=weights)
    assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_of_both_sides(weights):
    torch.manual_seed(0)
    codes = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    others = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    similar, valid = torch.rand(4, 5) < 0.4, torch.rand(4, 5) < 0.8
    assert torch.autograd.gradcheck(
        lambda a, b: weighted_pairwise_loss(a, b, similar, valid, alpha=0.7, weights=weights), (codes, others)
    )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("all_similar", [True, False, None])
def test_one_kind_of_pairs_or_none_still_back_propagates(weights, all_similar):
    codes = torch.rand(3, 4, requires_grad=True)
    similar = torch.full((3, 3), bool(all_similar))
    valid = torch.full((3, 3), all_similar is not None)
    found = weighted_pairwise_loss(codes, codes, similar, valid, alpha=0.5, weights=weights)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(codes.grad).all()
    if all_similar is None:
        assert found.item() == 0
        assert not codes.grad.any()


def test_large_products_do_not_overflow():
    codes = torch.full((2, 64), 1.0)
    similar = torch.tensor([[True, False], [False, True]])
    valid = torch.ones(2, 2, dtype=torch.bool)
    found = weighted_pairwise_loss(codes, codes, similar, valid, alpha=100.0, weights=WEIGHTS[0])
    assert float(found) == pytest.approx(6400.0)


def test_rows_of_one_matrix_add_up_to_the_whole():
    torch.manual_seed(1)
    codes = torch.rand(6, 4, dtype=torch.float64)
    similar, valid = torch.rand(6, 6) < 0.3, torch.rand(6, 6) < 0.8
    counts = torch.tensor([(similar & valid).sum(), (~similar & valid).sum()]).double()
    for weights in WEIGHTS:
        whole = weighted_pairwise_loss(codes, codes, similar, valid, alpha=0.5, weights=weights)
        parts = [
            weighted_pairwise_loss(
                codes[rows],
                codes,
                similar[rows],
                valid[rows],
                alpha=0.5,
                weights=weights,
                over_workers=lambda _mine: counts,
            )
            for rows in (slice(0, 1), slice(1, 6))
        ]
        assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-12)


def test_sharing_a_label():
    several = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])
    assert share_a_label(several, several).tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, False],
    ]
    assert labelled(several).tolist() == [True, True, False]
    single = torch.tensor([0, 1, 0])
    assert share_a_label(single, single[:2]).tolist() == [[True, False], [False, True], [True, False]]
    assert labelled(torch.tensor([0, -1])).tolist() == [True, False]
