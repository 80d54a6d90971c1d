"""The contrastive loss against constants, against loops and automatic differentiation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.losses import contrastive
from ray_retrieval.losses.contrastive import contrastive_against
from ray_retrieval.losses.metric import contrastive_losses


def unit(count, seed, width=5):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=1)


def masks(anchors, references, seed):
    """Each pair is a positive, a negative or none."""
    kinds = torch.randint(0, 3, (anchors, references), generator=torch.Generator().manual_seed(seed))
    return kinds == 0, kinds == 1


def blocks_of(positives, negatives):
    return lambda block: (positives[:, block], negatives[:, block])


@settings(max_examples=40, deadline=None)
@given(
    anchors=st.integers(1, 5),
    references=st.integers(0, 9),
    block=st.integers(1, 60),
    margin=st.floats(-1, 1),
    seed=st.integers(0, 9),
)
def test_value_gradient_and_count_are_those_of_loops_over_pairs(anchors, references, block, margin, seed):
    a, r = unit(anchors, seed).requires_grad_(), unit(references, seed + 100)
    positives, negatives = masks(anchors, references, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "_BLOCK_CPU", block)
        losses, pushing = contrastive_against(a, r, blocks_of(positives, negatives), margin=margin)
    expected, pairs, counts = [], [], []
    for i in range(anchors):
        similarities = [float(a[i].detach() @ r[j]) for j in range(references)]
        pushed = [s for j, s in enumerate(similarities) if negatives[i, j] and s > margin]
        expected.append(sum(pushed) + sum(1 - s for j, s in enumerate(similarities) if positives[i, j]))
        counts.append(len(pushed))
        pairs.append(len(pushed) + int(positives[i].sum()))
    assert losses.values.detach().tolist() == pytest.approx(expected, abs=1e-12)
    assert (pushing.tolist(), losses.active.tolist()) == (counts, pairs)
    weights = torch.arange(1.0, anchors + 1, dtype=torch.float64)
    (weights * losses.values).sum().backward()
    other = a.detach().clone().requires_grad_()
    again = contrastive_losses(other @ r.T, positives, negatives, margin=margin)
    (weights * again.values).sum().backward()
    assert torch.allclose(a.grad, other.grad, atol=1e-12)


def test_its_gradient_is_that_of_small_differences():
    a, r = unit(4, 1).requires_grad_(), unit(11, 2)
    pairs = blocks_of(*masks(4, 11, 3))
    assert torch.autograd.gradcheck(lambda x: contrastive_against(x, r, pairs, margin=0.2)[0].values, (a,))


def test_no_gradient_goes_into_the_references():
    a, r = unit(3, 1).requires_grad_(), unit(4, 2).requires_grad_()
    contrastive_against(a, r, blocks_of(*masks(3, 4, 0)))[0].values.sum().backward()
    assert r.grad is None


def test_references_may_be_written_over_before_the_backward_pass():
    a, r = unit(3, 1).requires_grad_(), unit(4, 2)
    pairs = blocks_of(*masks(3, 4, 0))
    losses, _ = contrastive_against(a, r, pairs)
    expected = torch.autograd.grad(losses.values.sum(), a, retain_graph=True)[0]
    r.zero_()
    assert torch.equal(torch.autograd.grad(losses.values.sum(), a)[0], expected)
