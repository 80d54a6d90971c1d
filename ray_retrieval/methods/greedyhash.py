"""GreedyHash: the sign itself in the forward pass, its gradient passed straight through.

Su, Zhang, Han, Tian: Greedy Hash: Towards Fast Optimization for Accurate Hash Coding in CNN, NeurIPS 2018.

    h = hash layer of the backbone's features          relaxed code, [n, bits]
    b = sign(h),  ∂b/∂h = 1                            eq. 6: greedy update with a straight-through gradient
    L = CE(W·b, label) + penalty · mean(||h| − 1|³)    eq. 7 with p = 3, averaged over images and bits
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ray_retrieval.layers.pooling import wide
from ray_retrieval.layers.sign import straight_through_sign
from ray_retrieval.methods.base import Batch, Clock, Outputs
from ray_retrieval.methods.hashing import HashingConfig, HashingMethod


class GreedyHashConfig(HashingConfig):
    """GreedyHash."""

    name: Literal["greedyhash"] = "greedyhash"
    penalty: float = Field(default=0.1, ge=0)
    """Weight of the term that draws relaxed codes to ±1: 0.1 for CIFAR-10, 1.0 for ImageNet in the paper."""
    head_lr_factor: float = Field(default=1.0, gt=0)
    """Learning rate of the hash layer and the classifier, as a multiple of the backbone's; published: 1."""


def classification_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every image.

    Several labels become the soft target y/|y|, so that each of an image's classes counts the same; an image
    without any label has no target and loses 0.

    Args:
        logits: float [n, classes].
        labels: int64 [n], or float [n, classes] multi-hot.

    Returns:
        float [n].
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    target = labels / labels.sum(dim=1, keepdim=True).clamp(min=1)
    return F.cross_entropy(logits, target, reduction="none")


def quantisation_penalties(relaxed: Tensor) -> Tensor:
    """Mean over bits of ||h| − 1|³ for every image: float [n, bits] to float [n].

    Reference: eq. 7, p = 3; the norm there is divided by images × bits, as in the authors' code.
    """
    return (relaxed.abs() - 1).abs().pow(3).mean(dim=1)


class GreedyHash(HashingMethod):
    """A backbone, a hash layer, and a classifier on the signs (without bias, as published)."""

    config: GreedyHashConfig

    def __init__(self, config: GreedyHashConfig, *, classes: int, pretrained: bool = True) -> None:
        super().__init__(config, classes=classes, pretrained=pretrained)
        self.classifier = nn.Linear(config.bits, classes, bias=False)

    def forward(self, images: Tensor) -> Outputs:
        relaxed = self.relaxed(images)
        return {"relaxed": relaxed, "logits": self.classifier(straight_through_sign(relaxed))}

    def objective(self, outputs: Outputs, batch: Batch, clock: Clock) -> dict[str, Tensor]:  # noqa: ARG002
        classification = classification_losses(wide(outputs["logits"]), batch.labels)
        penalty = quantisation_penalties(wide(outputs["relaxed"]))
        return {
            "classification": batch.mean(classification),
            "penalty": self.config.penalty * batch.mean(penalty),
        }

    def class_probabilities(self, images: Tensor) -> Tensor:
        return wide(self.forward(images)["logits"]).softmax(dim=1)
