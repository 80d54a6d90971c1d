"""Scores, the pooling by them and the autoencoder against loops over the cells of small maps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ray_retrieval.layers.attention import Attention, Autoencoder, attentive_pooling, reconstruction_losses


def maps(n=2, channels=6, height=3, width=4, seed=0, dtype=torch.float32):
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def test_scores_are_those_of_the_equation():
    torch.manual_seed(0)
    attention = Attention(6, hidden=5)
    first, norm, _ = attention.hidden
    for values in (norm.running_mean, norm.bias, norm.weight):
        nn.init.uniform_(values, 0.5, 1.5)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    features = maps()
    scores = attention.eval()(features)
    assert (scores.shape, scores.dtype) == ((2, 3, 4), torch.float32)
    for image, row, column in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        raised = first.weight[:, :, 0, 0] @ features[image, :, row, column]
        scaled = (raised - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        z = float(attention.score.weight[0] @ scaled.clamp(min=0) + attention.score.bias)
        assert float(scores[image, row, column]) == pytest.approx(math.log1p(math.exp(z)), rel=1e-4)


def test_scores_start_moderate_and_differ_whatever_the_scale_of_the_features():
    torch.manual_seed(0)
    for size in (1e-2, 1.0, 1e3):
        scores = Attention(256)(size * maps(4, 256, 8, 8).relu())
        assert 0.1 < scores.min() < scores.max() < 2
        assert scores.std() > 0.02


def test_scores_under_autocast_have_the_steps_of_float32():
    torch.manual_seed(0)
    attention = Attention(32).eval()
    features = maps(1, 32, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        rough = attention(features)
    assert rough.dtype == torch.float32
    assert len(rough.unique()) > 0.95 * rough.numel()
    torch.testing.assert_close(rough, attention(features), atol=0.01, rtol=0)


def naive_pooling(features, scores, normalised):
    n, channels, height, width = features.shape
    pooled = torch.zeros(n, channels, dtype=features.dtype)
    for image in range(n):
        mean = float(scores[image].mean()) if normalised else 1.0
        for row in range(height):
            for column in range(width):
                feature = features[image, :, row, column]
                length = math.sqrt(sum(float(value) ** 2 for value in feature)) or 1.0
                pooled[image] += float(scores[image, row, column]) / mean * feature / length
    return pooled / (height * width)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling_is_the_mean_of_scored_unit_features(normalised, dtype):
    features, scores = maps(dtype=dtype), torch.rand(2, 3, 4, dtype=dtype) * 3
    features[1, :, 2, 1] = 0  # a feature of no length has no direction and adds nothing
    pooled = attentive_pooling(features, scores, normalised_scores=normalised)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, naive_pooling(features, scores, normalised), atol=1e-5, rtol=1e-4)


def test_pooling_is_wide_in_16_bits_and_under_autocast():
    features, scores = maps().bfloat16(), torch.rand(2, 3, 4)
    expected = attentive_pooling(features.float(), scores)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attentive_pooling(features, scores), expected)


@pytest.mark.parametrize("normalised", [False, True])
def test_gradients_of_the_pooling(normalised):
    features = maps(1, 3, 2, 2, dtype=torch.float64).requires_grad_()
    scores = (torch.rand(1, 2, 2, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda some, other: attentive_pooling(some, other, normalised_scores=normalised), (features, scores)
    )


def test_features_of_zeros_have_finite_gradients():
    features, scores = torch.zeros(1, 3, 2, 2, requires_grad=True), torch.ones(1, 2, 2, requires_grad=True)
    attentive_pooling(features, scores).sum().backward()
    assert features.grad.isfinite().all()
    assert (scores.grad == 0).all()


@settings(max_examples=20)
@given(st.floats(0.1, 1000), st.integers(0, 100))
def test_normalised_scores_have_no_scale_and_no_gradient_along_it(factor, seed):
    features = maps(seed=seed, dtype=torch.float64)
    scores = 0.1 + torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores.requires_grad_()
    pooled = attentive_pooling(features, scores, normalised_scores=True)
    scaled = attentive_pooling(features, factor * scores, normalised_scores=True)
    torch.testing.assert_close(scaled, pooled, atol=1e-5, rtol=1e-4)  # the mean has a small number added
    pooled.square().sum().backward()
    along = (scores.grad * scores).sum(dim=(1, 2))
    assert along.abs().max() < 1e-5
    # Without it the length of the result is the scale.
    plain = attentive_pooling(features, scores)
    torch.testing.assert_close(attentive_pooling(features, factor * scores), factor * plain)


def test_the_autoencoder_is_its_equation_at_each_cell():
    torch.manual_seed(0)
    autoencoder, features = Autoencoder(6, dimension=2), maps()
    made = autoencoder(features)
    assert made.shape == features.shape
    for image, row, column in [(0, 0, 0), (1, 2, 3)]:
        code = autoencoder.down.weight @ features[image, :, row, column]
        torch.testing.assert_close(autoencoder.code(features[image, :, row, column]), code)
        again = (autoencoder.up.weight @ code + autoencoder.up.bias).clamp(min=0)
        torch.testing.assert_close(made[image, :, row, column], again)


def test_codes_of_features_of_another_length_have_the_same_direction():
    autoencoder, features = Autoencoder(6, dimension=3), maps().flatten(2).mT
    torch.testing.assert_close(autoencoder.code(7 * features), 7 * autoencoder.code(features))


def test_reconstruction_losses_are_mean_squares_and_leave_features_alone():
    autoencoder = Autoencoder(6, dimension=2)
    features = maps().relu().requires_grad_()
    made = autoencoder(features.detach())
    losses = reconstruction_losses(features, made)
    expected = [(made[i] - features[i]).square().mean().item() for i in range(2)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    losses.sum().backward()
    assert features.grad is None
    assert autoencoder.down.weight.grad.abs().sum() > 0
    assert reconstruction_losses(features.bfloat16(), made.bfloat16()).dtype == torch.float32


def test_an_autoencoder_learns_features_that_vary_in_few_directions():
    torch.manual_seed(0)
    autoencoder = Autoencoder(12, dimension=4)
    features = torch.einsum("nkhw,kc->nchw", maps(4, 3, 5, 5), torch.randn(3, 12)).relu()
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = reconstruction_losses(features, autoencoder(features)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
