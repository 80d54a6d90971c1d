"""Attention to local features: scores of a map's cells, the pooling by them, and codes of the features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_retrieval.layers.pooling import EPSILON, wide


class Attention(nn.Module):
    """Scores float32 [n, h, w], above 0, of the cells of a map float [n, channels, h, w].

        a = softplus(w₂ · ReLU(BN(W₁ S + b₁)) + b₂)

    Only the order of scores has a meaning: with the classifier behind the pooling divided by c, the scores
    times c give the same loss. Scores start near 0.7, softplus(0): the batch normalisation gives the hidden
    layer a scale of its own, and PyTorch's initial w₂ is small.

    Args:
        channels: of the map.
        hidden: channels between the two convolutions of 1 × 1.

    Reference: Noh et al., Large-Scale Image Retrieval with Attentive Deep Local Features, ICCV 2017, §3.2;
    the batch normalisation is that of the authors' code.
    """

    def __init__(self, channels: int, hidden: int = 512) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)
        )
        self.score = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.hidden(features).movedim(1, -1)
        # In float32 whatever autocast says: of bfloat16's 256 steps an octave, many cells would share one.
        with torch.autocast(features.device.type, enabled=False):
            kind = torch.promote_types(hidden.dtype, torch.float32)
            raised = F.linear(hidden.to(kind), self.score.weight.to(kind), self.score.bias.to(kind))
            return F.softplus(raised).squeeze(-1)


def attentive_pooling(features: Tensor, scores: Tensor, *, normalised_scores: bool = False) -> Tensor:
    """Mean over the cells of score · feature / length of the feature, [n, channels] in float32 or wider.

    Args:
        features: float [n, channels, h, w].
        scores: float [n, h, w], of `Attention` on the same features.
        normalised_scores: divide the scores of each map by their mean: a factor common to all of them then
            neither changes the result nor has a gradient.

    Reference: Noh et al. 2017, eq. 1, with features of length 1 and the mean for the sum as in the authors'
    code.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = wide(features)
        weights = scores.to(features.dtype)
        if normalised_scores:
            weights = weights / (weights.mean(dim=(1, 2), keepdim=True) + EPSILON)
        lengths = torch.linalg.vector_norm(features, dim=1) + EPSILON
        # Weights rather than features are divided: no second map of features is made.
        pooled: Tensor = torch.einsum("nchw,nhw->nc", features, weights / lengths)
        return pooled / weights[0].numel()


class Autoencoder(nn.Module):
    """Codes of few dimensions for features, learned by making the features of them again.

        code = W S,   S′ = ReLU(W′ code + b′)

    Called on a map S, float [n, channels, h, w], it gives S′, of the same shape. The code has no bias: W′b
    would be a part of b′, and without it the direction of a code does not depend on a feature's length.

    Args:
        channels: of the map.
        dimension: of the codes.

    Reference: Cao et al., Unifying Deep Local and Global Features for Image Search (DELG), ECCV 2020, §3.2,
    where the code has a bias.
    """

    def __init__(self, channels: int, dimension: int = 128) -> None:
        super().__init__()
        self.down = nn.Linear(channels, dimension, bias=False)
        self.up = nn.Linear(dimension, channels)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.up(self.code(features.movedim(1, -1)))).movedim(-1, 1)

    def code(self, features: Tensor) -> Tensor:
        """Codes [..., dimension], of any length, of features [..., channels]."""
        codes: Tensor = self.down(features)
        return codes


def reconstruction_losses(features: Tensor, made: Tensor) -> Tensor:
    """Mean square of the difference of S′ from S for each image, [n] in float32 or wider.

    Args:
        features: S, float [n, channels, h, w]; it has no gradient.
        made: S′ of the autoencoder, of the same shape.
    """
    kind = torch.promote_types(made.dtype, torch.float32)
    return (made.to(kind) - features.detach().to(kind)).square().mean(dim=(1, 2, 3))
