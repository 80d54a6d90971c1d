"""The contrastive loss against references that are constants, such as a memory, in one pass over them.

    ℓ_i = Σ_P (1 − s_ij) + Σ_N [s_ij > margin] s_ij         s_ij = a_i · r_j

is, between its jumps, linear in the anchor. With c_ij = −1 on P, 1 on the negatives above the margin and 0
elsewhere, and g_i = Σ_j c_ij r_j,

    ℓ_i = |P_i| + a_i · g_i         ∂ℓ_i / ∂a_i = g_i

so that value and gradient come out of the same sums. They are formed in blocks of references: nothing of the
size anchors × references is held, let alone once for each operation, as automatic differentiation would.

Same loss: `losses.metric.contrastive_losses`, whose gradient goes into the references too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ray_retrieval.losses.metric import AnchorLosses

Pairs = Callable[[slice], tuple[Tensor, Tensor]]
"""The masks of pairs with a run of references: bool [n, run] of P, bool [n, run] of N."""

# Similarities of a block: few enough for a processor's cache, or enough to keep a GPU busy.
_BLOCK_CPU, _BLOCK_GPU = 1 << 18, 1 << 24


def contrastive_against(
    anchors: Tensor, references: Tensor, pairs: Pairs, *, margin: float = 0.5
) -> tuple[AnchorLosses, Tensor]:
    """Σ_P (1 − s) + Σ_N [s > margin] s of each anchor.

    Args:
        anchors: float [n, d], in float32 or wider; the gradient goes into these alone.
        references: float [m, d], of the same type.
        pairs: tells the pairs of a block of references; called once for each block, in order.
        margin: cosine from which a negative pair counts.

    Returns:
        The losses, zeros where there are no references; and int64 [n], how many negatives are above the
        margin.
    """
    found = _Contrastive.apply(anchors, references, pairs, margin)  # type: ignore[no-untyped-call]
    values, pulling, pushing = found
    return AnchorLosses(values, pulling + pushing), pushing


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, anchors: Tensor, references: Tensor, pairs: Pairs, margin: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        slopes = torch.zeros_like(anchors)
        pulling, pushing = (torch.zeros_like(anchors[:, 0], dtype=torch.int64) for _ in range(2))
        limit = _BLOCK_GPU if anchors.device.type == "cuda" else _BLOCK_CPU
        size = max(1, limit // max(1, len(anchors)))
        for start in range(0, len(references), size):
            block = slice(start, min(start + size, len(references)))
            some = references[block]
            positives, negatives = pairs(block)
            signs = ((anchors @ some.T > margin) & negatives).to(anchors.dtype)
            # Sums of so few ones are exact, and many times faster than those of booleans.
            near = signs.sum(dim=1)
            signs.masked_fill_(positives, -1)
            slopes.addmm_(signs, some)
            pushing += near.long()
            pulling += (near - signs.sum(dim=1)).long()
        context.save_for_backward(slopes)
        context.mark_non_differentiable(pulling, pushing)
        return pulling + (anchors * slopes).sum(dim=1), pulling, pushing

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = context.saved_tensors
        return gradients[0][:, None] * slopes, None, None, None
