"""Losses of metric learning, from similarities and two masks of pairs: one value an anchor.

    s_ij    cosine of anchor i and reference j; references are the batch, or a memory of earlier ones
    P_i     references of the anchor's class, but for itself
    N_i     references of other classes

Each loss also says how much of an anchor is active, which is what a mean may be taken over:

    contrastive         the sum over its pairs; active are its positives, and its negatives above the margin
    triplet             its hardest triplet, active where its loss is above 0
    multi-similarity    the two soft maxima over its mined pairs, active where there are mined pairs
"""

from typing import NamedTuple

import torch
from torch import Tensor


class AnchorLosses(NamedTuple):
    """The losses of some anchors.

    Attributes:
        values: float [n].
        active: int64 [n], without gradient.
    """

    values: Tensor
    active: Tensor


def contrastive_losses(
    similarity: Tensor, positives: Tensor, negatives: Tensor, *, margin: float = 0.5
) -> AnchorLosses:
    """Σ_P (1 − s) + Σ_N [s > margin] s.

    The negative term is s rather than s − margin: its gradient is the same, its value jumps at the margin.

    Args:
        similarity: float [n, m], in float32 or wider.
        positives: bool [n, m], the pairs of P.
        negatives: bool [n, m], the pairs of N.
        margin: cosine from which a negative pair counts.

    Reference: Hadsell et al. 2006, in the form of the code of Wang et al., XBM, CVPR 2020.
    """
    near = negatives & (similarity > margin)
    pulled = torch.where(positives, 1 - similarity, 0)
    pushed = torch.where(near, similarity, 0)
    return AnchorLosses((pulled + pushed).sum(dim=1), (positives | near).sum(dim=1))


def triplet_losses(
    similarity: Tensor, positives: Tensor, negatives: Tensor, *, margin: float = 0.1
) -> AnchorLosses:
    """max(0, hardest negative − hardest positive + margin); 0 without a positive or a negative.

    Args:
        similarity: float [n, m], in float32 or wider.
        positives: bool [n, m], the pairs of P.
        negatives: bool [n, m], the pairs of N.
        margin: by which a positive is to be more similar than any negative, as a difference of cosines.

    Reference: Hermans et al. 2017, arXiv 1703.07737, eq. 5 ("batch hard"), on cosines.
    """
    if not similarity.shape[1]:
        return _no_pairs(similarity)
    furthest = torch.where(positives, similarity, torch.inf).amin(dim=1)
    nearest = torch.where(negatives, similarity, -torch.inf).amax(dim=1)
    complete = positives.any(dim=1) & negatives.any(dim=1)
    # Without the inner choice, 0 times an infinite gradient would be no number.
    gap = torch.where(complete, nearest, 0) - torch.where(complete, furthest, 0)
    values = torch.where(complete, (gap + margin).clamp(min=0), 0)
    return AnchorLosses(values, (values > 0).long())


def multi_similarity_losses(
    similarity: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 40.0,
    base: float = 0.5,
    mining: float = 0.1,
) -> AnchorLosses:
    """log(1 + Σ_P e^{−α(s − base)}) / α + log(1 + Σ_N e^{β(s − base)}) / β over the mined pairs.

    A negative is mined where s + mining > the least similar positive, a positive where s − mining < the most
    similar negative; an anchor that is left without either has no loss.

    Args:
        similarity: float [n, m], in float32 or wider.
        positives: bool [n, m], the pairs of P.
        negatives: bool [n, m], the pairs of N.
        alpha: sharpness on positives.
        beta: sharpness on negatives; 40 in the authors' code.
        base: λ, the similarity around which pairs are weighted.
        mining: margin of the mining.

    Reference: Wang et al., Multi-Similarity Loss, CVPR 2019, eqs. 7, 8 and 15.
    """
    if not similarity.shape[1]:
        return _no_pairs(similarity)
    furthest = torch.where(positives, similarity, torch.inf).amin(dim=1, keepdim=True)
    nearest = torch.where(negatives, similarity, -torch.inf).amax(dim=1, keepdim=True)
    hard_positives = positives & (similarity - mining < nearest)
    hard_negatives = negatives & (similarity + mining > furthest)
    complete = hard_positives.any(dim=1) & hard_negatives.any(dim=1)
    pulled = _log_one_plus_sum(-alpha * (similarity - base), hard_positives) / alpha
    pushed = _log_one_plus_sum(beta * (similarity - base), hard_negatives) / beta
    return AnchorLosses(torch.where(complete, pulled + pushed, 0), complete.long())


def _no_pairs(similarity: Tensor) -> AnchorLosses:
    values = similarity.sum(dim=1)
    return AnchorLosses(values, torch.zeros_like(values, dtype=torch.int64))


def _log_one_plus_sum(exponents: Tensor, chosen: Tensor) -> Tensor:
    """log(1 + Σ e^x) over the chosen columns of each row, without overflow: float [n]."""
    masked = torch.where(chosen, exponents, -torch.inf)
    one = torch.zeros((len(masked), 1), dtype=masked.dtype, device=masked.device)
    return torch.cat([one, masked], dim=1).logsumexp(dim=1)
