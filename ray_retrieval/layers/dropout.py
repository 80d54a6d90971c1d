"""Dropout whose masks are those of the whole global batch.

With masks that each worker draws for itself, or for each part of its batch, the same recipe trains
differently on one and on two workers, and in one part and in several. Here every worker draws the mask of the
global batch from the same seed, for each part anew, and takes its own rows of it, so that they all drop what
one worker would that has the whole batch at hand.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GlobalDropout(nn.Dropout):
    """`nn.Dropout` that draws for the global batch; all generators have to be in one state before each part.

    Called on float [n, …], the rows of a worker or of a part of its batch, it gives the same shape and type.

    Attributes:
        start: position of the first of these rows in the global batch.
        total: rows of the global batch; 0 draws for the rows at hand alone.
    """

    start = 0
    total = 0

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or not self.total:
            return super().forward(values)
        # Of ones, so that the draws are those of one worker that drops from the whole batch.
        ones = torch.ones((self.total, *values.shape[1:]), dtype=values.dtype, device=values.device)
        mask = F.dropout(ones, self.p)
        return values * mask[self.start : self.start + len(values)]


def synchronise_dropout(module: nn.Module) -> list[GlobalDropout]:
    """Make every `nn.Dropout` inside a `GlobalDropout`, and return them, to be told each batch."""
    layers = []
    for layer in module.modules():
        if type(layer) is nn.Dropout:
            layer.__class__ = GlobalDropout
        if isinstance(layer, GlobalDropout):
            layers.append(layer)
    return layers
