"""The sign with a straight-through gradient."""

import torch
from torch import Tensor


def straight_through_sign(relaxed: Tensor) -> Tensor:
    """Signs of the relaxed codes whose gradient passes through unchanged.

    Args:
        relaxed: float [n, bits].

    Returns:
        float [n, bits] of −1 and +1, with sign(0) = +1 so that no third symbol exists. Backward copies the
        gradient from the signs to `relaxed`.

    Reference: Su et al., Greedy Hash, NeurIPS 2018, eq. 6.
    """
    signs = torch.where(relaxed >= 0, 1.0, -1.0).to(relaxed.dtype)
    # Not relaxed + (signs - relaxed): in bfloat16 that is no ±1 for large values.
    return signs + (relaxed - relaxed.detach())


def pack_signs(relaxed: Tensor) -> Tensor:
    """Binary codes of relaxed ones: bit 1 where the value is ≥ 0.

    Args:
        relaxed: float [n, bits].

    Returns:
        uint8 [n, ceil(bits / 8)], bits big-endian within the byte as `numpy.packbits` has them; the bits
        that fill the last byte are zero.
    """
    bits = (relaxed >= 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
    bits = bits.reshape(len(bits), bits.shape[1] // 8, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    packed: Tensor = (bits * weights).sum(dim=2, dtype=torch.uint8)
    return packed
