import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_retrieval.layers.sign import pack_signs, straight_through_sign


def test_sign_has_two_values_and_zero_is_positive():
    relaxed = torch.tensor([[-2.0, -0.0, 0.0, 1e-9, 3.0]])
    assert straight_through_sign(relaxed).tolist() == [[-1.0, 1.0, 1.0, 1.0, 1.0]]


def test_gradient_passes_through_unchanged():
    relaxed = torch.randn(4, 6, requires_grad=True)
    weights = torch.randn(4, 6)
    (straight_through_sign(relaxed) * weights).sum().backward()
    assert torch.equal(relaxed.grad, weights)


@given(st.integers(0, 9), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_packing_equals_numpy(rows, bits, seed):
    relaxed = np.random.default_rng(seed).standard_normal((rows, bits)).astype(np.float32)
    expected = np.packbits(relaxed >= 0, axis=1)
    assert np.array_equal(pack_signs(torch.from_numpy(relaxed)).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_types_are_kept(dtype):
    assert straight_through_sign(torch.randn(2, 3, dtype=dtype)).dtype == dtype
