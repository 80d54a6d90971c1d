"""From a map of features to one vector: global maximum, average, or generalised mean."""

from typing import Literal

import torch
from torch import Tensor, nn

PoolingName = Literal["max", "average", "gem"]


class GlobalPooling(nn.Module):
    """Pools float [n, channels, h, w] to [n, channels].

    Args:
        kind: `max` (MAC), `average` (SPoC), or `gem`: (mean of x^p)^(1/p), which is the average for p = 1 and
            nears the maximum as p grows; p is learnt.
        p: where the exponent starts.

    The generalised mean is computed in float32 or wider, as x^p overflows 16 bits.

    Reference: Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2018, eq. 3.
    """

    EPSILON = 1e-6  # features below it count as it: of 0, the gradient of x^p has no limit for p < 1

    def __init__(self, kind: PoolingName, *, p: float = 3.0) -> None:
        super().__init__()
        self.kind = kind
        if kind == "gem":
            self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, features: Tensor) -> Tensor:
        if self.kind == "max":
            return features.amax(dim=(2, 3))
        if self.kind == "average":
            return features.mean(dim=(2, 3))
        with torch.autocast(features.device.type, enabled=False):
            wide = features.to(torch.promote_types(features.dtype, torch.float32)).clamp(min=self.EPSILON)
            return wide.pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)
