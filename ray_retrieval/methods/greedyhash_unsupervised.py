"""GreedyHash without labels: codes that are as similar to each other as the features they are made from.

Su, Zhang, Han, Tian: Greedy Hash: Towards Fast Optimization for Accurate Hash Coding in CNN, NeurIPS 2018,
section 4.3.

    x = features of a frozen backbone                       [n, width]
    h = hash layer of x,  b = sign(h)                       straight-through gradient
    L = mean over pairs (cos(b_i, b_j) − cos(x_i, x_j))² + penalty · mean(||h| − 1|³)

Image i of a batch's first half is paired with image i of its second half, as in the authors' code. Where we
differ: they leave the dropout of VGG-16 on while training, so that their target cosines are noisy; here the
frozen backbone is in evaluation mode.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.layers.pooling import wide
from ray_retrieval.layers.sign import straight_through_sign
from ray_retrieval.methods.base import Batch, Clock, Outputs
from ray_retrieval.methods.greedyhash import quantisation_penalties
from ray_retrieval.methods.hashing import HashingConfig, HashingMethod


class GreedyHashUnsupervisedConfig(HashingConfig):
    """GreedyHash without labels."""

    name: Literal["greedyhash_unsupervised"] = "greedyhash_unsupervised"
    penalty: float = Field(default=0.1, ge=0)
    """Weight of the term that draws relaxed codes to ±1; published: 0.1."""
    backbone: BackboneConfig = BackboneConfig(name="vgg16")
    """The network below the hash layer; it stays as it is. Published: VGG-16."""


class GreedyHashUnsupervised(HashingMethod):
    """A frozen backbone under a hash layer that keeps the cosines of its features."""

    whole_batches = True
    config: GreedyHashUnsupervisedConfig

    def __init__(
        self, config: GreedyHashUnsupervisedConfig, *, classes: int, pretrained: bool = True
    ) -> None:
        super().__init__(config, classes=classes, pretrained=pretrained)
        self.backbone.requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> "GreedyHashUnsupervised":
        super().train(mode)
        self.backbone.eval()  # neither dropout nor new statistics in what stays as it is
        return self

    def forward(self, images: Tensor) -> Outputs:
        with torch.no_grad():
            features = self.backbone(self.normalised(images))
        return {"features": features, "relaxed": self.hash_layer(features)}

    def objective(self, outputs: Outputs, batch: Batch, clock: Clock) -> dict[str, Tensor]:  # noqa: ARG002
        relaxed = wide(outputs["relaxed"])
        codes = nn.functional.normalize(straight_through_sign(relaxed), dim=1)
        features = nn.functional.normalize(wide(outputs["features"]), dim=1)
        pairs = batch.global_size // 2
        mine = torch.nonzero(batch.positions < pairs)[:, 0]
        partners = batch.positions[mine] + pairs
        others, other_features = batch.gather(codes)[partners], batch.gather(features)[partners]
        wanted = (features[mine] * other_features).sum(dim=1)
        errors = ((codes[mine] * others).sum(dim=1) - wanted).square()
        return {
            "similarity": batch.total(errors.sum() / max(1, pairs)),
            "penalty": self.config.penalty * batch.mean(quantisation_penalties(relaxed)),
        }
