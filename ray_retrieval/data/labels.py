"""What the labels of a set of images say about its pairs."""

from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK = 4096
"""Rows whose pairs with as many others are counted at once: 64 MB of float32."""


def sharing_pairs(labels: npt.NDArray[Any]) -> int:
    """How many ordered pairs of rows share a label, a row with itself included.

    Args:
        labels: int64 [n], or bool multi-hot [n, classes], where a row without a label shares none, not even
            with itself.

    Returns:
        For class numbers Σ n_c²; for multi-hot labels Σ_ij [y_i · y_j > 0], counted block by block.
    """
    if labels.ndim == 1:
        counts = np.unique(labels, return_counts=True)[1].astype(np.int64)
        return int((counts**2).sum())
    # Equal rows share with the same others: real lists have far fewer different rows than rows.
    rows, counts = np.unique(np.packbits(labels.astype(bool), axis=1), axis=0, return_counts=True)
    different = np.unpackbits(rows, axis=1, count=labels.shape[1]).astype(np.float32)
    total = 0
    for start in range(0, len(different), _BLOCK):
        mine = slice(start, start + _BLOCK)
        for other in range(start, len(different), _BLOCK):
            theirs = slice(other, other + _BLOCK)
            shared = (different[mine] @ different[theirs].T > 0).astype(np.float32)
            # Sums of fewer than 2^24 rows are exact in float32.
            found = counts[mine] @ (shared @ counts[theirs].astype(np.float32)).astype(np.int64)
            total += int(found) * (1 if other == start else 2)
    return total


def positive_pair_rate(labels: npt.NDArray[Any]) -> float:
    """Share of all ordered pairs of rows, each with itself included, that share a label; 0 without rows.

    Args:
        labels: as of `sharing_pairs`.

    Reference: the number that the class weights of HashNet's authors follow, (n₀ + n₁)/n₁ = 1/rate.
    """
    return sharing_pairs(labels) / len(labels) ** 2 if len(labels) else 0.0
