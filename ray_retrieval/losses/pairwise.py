"""The weighted pairwise cross-entropy of similarity-preserving hashing.

For a pair of relaxed codes u, v with s = 1 where the images share a label and s = 0 where they do not,

    θ = α · u·v        ℓ = log(1 + e^θ) − s·θ

Similar pairs are rarer than dissimilar ones, so both kinds are weighted: see `ClassWeights`.

Reference: Cao et al., HashNet, ICCV 2017, eqs. 2 to 5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClassWeights:
    """How similar and dissimilar pairs are balanced; Σ₊, Σ₋ are the sums of ℓ, n₁, n₀ the numbers of pairs.

    Attributes:
        kind: `batch`: Σ₊/n₁ + Σ₋/n₀, the means of the pairs at hand.
            `dataset`: (Σ₊/p + Σ₋/(1 − p)) / (n₁ + n₀), with p the share of similar pairs in the training set:
            the expectation of `batch` without its noise in small batches.
            `constant`: (c·Σ₊ + Σ₋) / (c·n₁ + n₀).
        value: p or c; unused for `batch`.
    """

    kind: Literal["batch", "dataset", "constant"]
    value: float = 1.0

    def of(self, similar: Tensor, dissimilar: Tensor) -> tuple[Tensor, Tensor]:
        """(w₁, w₀), what one similar and one dissimilar pair count, from the numbers of each; all scalars [].

        Where there is no pair of a kind, it has nothing to weight, and the other kind still counts.
        """
        if self.kind == "batch":
            return 1 / similar.clamp(min=1), 1 / dissimilar.clamp(min=1)
        if self.kind == "dataset":
            pairs = (similar + dissimilar).clamp(min=1)
            # A training set without similar (or without dissimilar) pairs never asks for their weight.
            rate = min(max(self.value, 1e-12), 1 - 1e-12)
            return 1 / (rate * pairs), 1 / ((1 - rate) * pairs)
        divisor = self.value * similar + dissimilar
        divisor = torch.where(divisor > 0, divisor, torch.ones_like(divisor))
        return self.value / divisor, 1 / divisor


def weighted_pairwise_loss(
    codes: Tensor,
    others: Tensor,
    similar: Tensor,
    valid: Tensor,
    *,
    alpha: float,
    weights: ClassWeights,
    over_workers: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Tensor:
    """The weighted sum of ℓ over all valid pairs of a row of `codes` with a row of `others`.

    Args:
        codes: float [n, bits], relaxed codes in −1…1, in float32 or wider.
        others: float [m, bits]; gradients go into both sides where they can.
        similar: bool [n, m], whether the images of a pair share a label.
        valid: bool [n, m], the pairs that count.
        alpha: α, the slope of the sigmoid.
        weights: balance of the two kinds of pairs.
        over_workers: sums the numbers of pairs, float [2], over workers, where each computes its own rows of
            one large matrix of pairs. The sum of their results is then the loss of the whole matrix.

    Returns:
        A scalar; 0, with gradients of 0, where no pair is valid.

    Reference: eq. 4 and 5. Written so that e^θ cannot overflow: max(θ, 0) − s·θ + log(1 + e^−|θ|).
    """
    theta = alpha * (codes @ others.T)
    positives, negatives = similar & valid, ~similar & valid
    counts = over_workers(torch.stack([positives.sum(), negatives.sum()]).to(theta.dtype))
    weight_similar, weight_dissimilar = weights.of(counts[0], counts[1])
    each = positives * weight_similar + negatives * weight_dissimilar
    losses = F.binary_cross_entropy_with_logits(theta, similar.to(theta.dtype), reduction="none")
    return (each * losses).sum()


def share_a_label(labels: Tensor, others: Tensor) -> Tensor:
    """Bool [n, m]: whether two images share a label.

    Args:
        labels: int64 [n], or multi-hot [n, classes].
        others: int64 [m], or multi-hot [m, classes].
    """
    if labels.ndim == 1:
        return labels[:, None] == others[None, :]
    return labels.float() @ others.float().T > 0


def labelled(labels: Tensor) -> Tensor:
    """Bool [n]: whether an image has a label at all; class numbers below 0 stand for none."""
    return labels >= 0 if labels.ndim == 1 else labels.any(dim=1)
