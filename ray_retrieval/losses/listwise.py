"""Losses of whole rankings: 1 − average precision, made differentiable in two ways, one value a query.

The rows that count for query i are its positives P_i and its negatives N_i, as in `losses.metric`; what is in
neither, such as the query itself, is not in its ranking. A query without positives has no loss.

    Smooth-AP       a rank is 1 plus a number of better rows; each step of that count becomes a sigmoid
    quantised AP    similarities are counted softly in bins, precision and recall taken bin by bin

Reference: Brown et al., Smooth-AP, ECCV 2020; Revaud et al., Learning with Average Precision: Training Image
Retrieval with a Listwise Loss, ICCV 2019.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ray_retrieval.losses.metric import AnchorLosses

# Differences of similarities that are held at once, in a few tables of this size.
_BLOCK_CPU, _BLOCK_GPU = 1 << 22, 1 << 25


def smooth_ap_losses(
    similarity: Tensor, positives: Tensor, negatives: Tensor, *, temperature: float = 0.01
) -> AnchorLosses:
    """1 − (1/|P|) Σ_{a ∈ P} (1 + Σ_{j ∈ P∖a} σ((s_j − s_a)/τ)) / (1 + Σ_{j ∈ (P ∪ N)∖a} σ((s_j − s_a)/τ)).

    With τ → 0 it is 1 − AP. The differences of all positives with all rows are never there at once: value
    and gradient are formed for a block of positives at a time. Second derivatives are not supported.

    Args:
        similarity: float [n, m], in float32 or wider.
        positives: bool [n, m], the pairs of P.
        negatives: bool [n, m], the pairs of N.
        temperature: τ, in units of similarity; published: 0.01.

    Returns:
        Losses in 0…1, and 1 for each query that has positives; 0 and 0 for those without.

    Reference: Brown et al. 2020, eq. 7.
    """
    values: Tensor = _SmoothAP.apply(similarity, positives, negatives, temperature)  # type: ignore[no-untyped-call]
    return AnchorLosses(values, positives.any(dim=1).long())


class _SmoothAP(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, similarity: Tensor, positives: Tensor, negatives: Tensor, temperature: float
    ) -> Tensor:
        slopes = torch.zeros_like(similarity)
        found = similarity.new_zeros(len(similarity))
        numbers = positives.sum(dim=1)
        for query, place in _blocks(positives):
            # One line for each positive a of the block: its query's row of similarities.
            own = similarity[query, place, None]
            ahead = torch.sigmoid((similarity[query] - own) / temperature)
            ahead.masked_fill_(~(positives[query] | negatives[query]), 0)
            ahead.scatter_(1, place[:, None], 0)
            same = positives[query]
            good = 1 + torch.where(same, ahead, 0).sum(dim=1, keepdim=True)
            bad = torch.where(same, 0, ahead).sum(dim=1, keepdim=True)
            number, rank = numbers[query, None], good + bad
            found.index_add_(0, query, (good / rank / number)[:, 0])
            # dL/dσ is −bad/rank² for a positive and good/rank² for a negative, each over |P|;
            # dσ/ds_j = σ(1 − σ)/τ = −dσ/ds_a.
            steps = torch.where(same, -bad, good) / rank.square() / number
            steps *= ahead * (1 - ahead) / temperature
            slopes.index_add_(0, query, steps)
            slopes.index_put_((query, place), -steps.sum(dim=1), accumulate=True)
        context.save_for_backward(slopes)
        return torch.where(numbers > 0, 1 - found, 0)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = context.saved_tensors
        return gradients[0][:, None] * slopes, None, None, None


def _blocks(positives: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and places, int64 [block] each, of all positives, so many at a time as may be held at once."""
    query, place = positives.nonzero(as_tuple=True)
    limit = _BLOCK_GPU if positives.device.type == "cuda" else _BLOCK_CPU
    size = max(1, limit // max(1, positives.shape[1]))
    for start in range(0, len(query), size):
        yield query[start : start + size], place[start : start + size]


def quantised_ap_losses(
    similarity: Tensor, positives: Tensor, negatives: Tensor, *, bins: int = 20
) -> AnchorLosses:
    """1 − Σ_b P_b (R_b − R_{b−1}), precision P_b and recall R_b at bin b from soft counts of similarities.

    Bins have their centres evenly on −1…1, Δ apart, the highest first. A similarity counts
    max(0, 1 − |s − centre| / Δ) in a bin, so that it is shared by the two bins beside it. P_b is the share of
    positives in the first b bins, R_b that of the positives that are there.

    Args:
        similarity: float [n, m], cosines, in float32 or wider; what rounding puts beyond ±1 counts as ±1.
        positives: bool [n, m], the pairs of P.
        negatives: bool [n, m], the pairs of N.
        bins: number of bins, at least 2; published: 20 to 25.

    Returns:
        Losses in 0…1, and 1 for each query that has positives; 0 and 0 for those without.

    Raises:
        ValueError: if there are fewer than 2 bins.

    Reference: Revaud et al. 2019, eqs. 4 to 8.
    """
    if bins < 2:
        raise ValueError(f"average precision is quantised in 2 bins or more, got {bins}")
    from_the_top = (1 - similarity.clamp(-1, 1)) * ((bins - 1) / 2)
    upper = from_the_top.detach().floor().clamp(max=bins - 2).long()
    lower_share = from_the_top - upper
    # Into the bin above and the bin below: the other bins get nothing.
    right = _soft_counts(upper, lower_share, positives, bins)
    all_ = right + _soft_counts(upper, lower_share, negatives, bins)
    numbers = positives.sum(dim=1)
    # An empty beginning has no positives either: anything above 0 may divide it.
    tiny = torch.finfo(similarity.dtype).tiny
    precision = right.cumsum(dim=1) / all_.cumsum(dim=1).clamp(min=tiny)
    found = (precision * right).sum(dim=1) / numbers.clamp(min=1)
    return AnchorLosses(torch.where(numbers > 0, 1 - found, 0), (numbers > 0).long())


def _soft_counts(upper: Tensor, lower_share: Tensor, chosen: Tensor, bins: int) -> Tensor:
    """Float [n, bins]: the chosen columns of each row, shared between the bin `upper` and the one below."""
    counts = lower_share.new_zeros((len(upper), bins))
    counts = counts.scatter_add(1, upper, torch.where(chosen, 1 - lower_share, 0))
    return counts.scatter_add(1, upper + 1, torch.where(chosen, lower_share, 0))
