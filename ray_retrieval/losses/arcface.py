"""Classification by angles with an additive margin (ArcFace), which trains descriptors on class labels.

    cos θ_c     of a descriptor with the weights of class c, both of unit length
    logits      scale · cos(θ_y + margin) for the image's class y, scale · cos θ_c for the others
    loss        cross-entropy

Where θ_y + margin is beyond π, cos(θ_y + margin) would rise again; there the target's logit is
scale · (cos θ_y − margin · sin margin) instead, which goes on falling (the authors' code without its "easy
margin"). Far from the class and near to it, the gradient is finite.

Reference: Deng et al., ArcFace, CVPR 2019, eq. 3. The defaults, scale 30 and margin 0.15, are those of
DELG-pytorch for global descriptors on GLDv2-clean.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_retrieval.errors import RecipeError

# sin² θ is kept above this: its root has no finite derivative at 0. An angle of 0.001 is next to none.
_LEAST_SINE_SQUARED = 1e-6


class CosineClassifier(nn.Module):
    """Cosines of descriptors with one learned direction a class.

    Args:
        dimension: d of the descriptors.
        classes: number of classes.

    Attributes:
        weight: float [classes, d]; its rows are brought to unit length where they are used.
    """

    def __init__(self, dimension: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, dimension))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, descriptors: Tensor) -> Tensor:
        """Float [n, classes], cosines, in float32 or wider whatever autocast says.

        Args:
            descriptors: float [n, d], of any length.
        """
        with torch.autocast(descriptors.device.type, enabled=False):
            wide = torch.promote_types(descriptors.dtype, self.weight.dtype)
            directions = F.normalize(self.weight.to(wide), dim=1)
            return F.linear(F.normalize(descriptors.to(wide), dim=1), directions)


def arcface_losses(cosines: Tensor, labels: Tensor, *, margin: float = 0.15, scale: float = 30.0) -> Tensor:
    """Cross-entropy of each image with the margin on its own class: float [n], 0 for images without a label.

    Args:
        cosines: float [n, classes], in float32 or wider.
        labels: int64 [n], class numbers; below 0: the image has no label.
        margin: radians, added to the angle with the image's own class; from 0 to π/2.
        scale: of the logits.

    Raises:
        RecipeError: if the margin is not within its bounds.
    """
    known = labels >= 0
    targets = labels.clamp(min=0)
    losses = F.cross_entropy(
        arcface_logits(cosines, targets, margin=margin, scale=scale), targets, reduction="none"
    )
    return torch.where(known, losses, 0)


def arcface_logits(cosines: Tensor, labels: Tensor, *, margin: float = 0.15, scale: float = 30.0) -> Tensor:
    """Float [n, classes]: scale · cos θ, with the margin added to the angle of each image's own class.

    Args:
        cosines: float [n, classes], in float32 or wider.
        labels: int64 [n], each in 0…classes − 1.
        margin: radians, from 0 to π/2.
        scale: of the logits.

    Raises:
        RecipeError: if the margin is not within its bounds.
    """
    if not 0 <= margin <= math.pi / 2:  # With more, the target's logit would not fall where it goes on.
        raise RecipeError(
            f"a margin is an angle from 0 to π/2, found {margin}",
            where="margin",
            mend="set it to 1.57 at most; 0.1 to 0.5 is usual",
        )
    own = cosines.gather(1, labels[:, None])
    sine = (1 - own.square()).clamp(min=_LEAST_SINE_SQUARED).sqrt()
    turned = own * math.cos(margin) - sine * math.sin(margin)
    beyond = own - margin * math.sin(margin)
    target = torch.where(own > -math.cos(margin), turned, beyond)
    return scale * cosines.scatter(1, labels[:, None], target)
