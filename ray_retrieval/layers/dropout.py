"""Dropout whose masks are those of the whole global batch.

With masks that each worker draws for itself, the same recipe trains differently on one and on two workers.
Here every worker draws the mask of the global batch from the same seed and takes its own rows, so that two
workers drop what one would.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GlobalDropout(nn.Dropout):
    """`nn.Dropout` that draws for the global batch; the workers' generators have to be seeded alike.

    Called on float [n, …], this worker's rows, it gives the same shape and type.

    Attributes:
        start: position of this worker's first row in the global batch.
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
