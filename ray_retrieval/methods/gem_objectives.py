"""What GeM's network can be trained for: tuples with mined negatives, rankings, or classes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from ray_retrieval.config import Config
from ray_retrieval.losses.listwise import quantised_ap_losses, smooth_ap_losses
from ray_retrieval.losses.metric import AnchorLosses
from ray_retrieval.losses.tuples import contrastive_tuple_losses, triplet_tuple_losses


class TupleLossConfig(Config):
    """A loss of tuples (query, positive, mined negatives)."""

    negatives: int = Field(default=5, ge=0)
    """Hard negatives of each query, from as many clusters."""
    queries: int = Field(default=2000, ge=1)
    """Tuples of an epoch; fewer where there are fewer pairs."""
    pool: int = Field(default=22_000, ge=1)
    """Images drawn at random in which negatives are looked for; fewer where there are fewer."""
    rounds: int = Field(default=1, ge=1)
    """How often an epoch mines: each time its share of the queries, rounded down, and a pool of its own."""

    @model_validator(mode="after")
    def _check(self) -> "TupleLossConfig":
        if self.pool < 5 * self.negatives:
            raise ValueError(
                f"'pool' is at least {5 * self.negatives} for {self.negatives} negatives of different things"
            )
        return self

    def losses(self, queries: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """Float [t], from unit vectors [t, d], [t, d] and [t, negatives, d]; see `losses.tuples`."""
        raise NotImplementedError


class ContrastiveTuples(TupleLossConfig):
    """Half the squared distance to the positive, and to negatives within the margin."""

    name: Literal["contrastive"] = "contrastive"
    margin: float = Field(default=0.85, gt=0, le=2)
    """Distance within which a negative is pushed away; published: 0.85 with ResNet-101, 0.75 with VGG."""

    def losses(self, queries: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        return contrastive_tuple_losses(queries, positives, negatives, margin=self.margin)


class TripletTuples(TupleLossConfig):
    """Squared distances of positive and negative, by a margin."""

    name: Literal["triplet"] = "triplet"
    margin: float = Field(default=0.5, gt=0, le=4)
    """By which the squared distance of a negative is to be greater; published: 0.5."""

    def losses(self, queries: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        return triplet_tuple_losses(queries, positives, negatives, margin=self.margin)


class ListLossConfig(Config):
    """A loss of each image's ranking of the whole batch."""

    images_per_class: int = Field(default=4, ge=2)
    """Images of each class in a batch, which has batch_size / images_per_class classes."""

    def losses(self, similarity: Tensor, positives: Tensor, negatives: Tensor) -> AnchorLosses:
        """From cosines [n, m] and masks of pairs; see `losses.listwise`."""
        raise NotImplementedError


class SmoothAveragePrecision(ListLossConfig):
    """1 − AP with steps made smooth."""

    name: Literal["smooth_ap"] = "smooth_ap"
    temperature: float = Field(default=0.01, gt=0)
    """Of the steps, in cosines; published: 0.01."""

    def losses(self, similarity: Tensor, positives: Tensor, negatives: Tensor) -> AnchorLosses:
        return smooth_ap_losses(similarity, positives, negatives, temperature=self.temperature)


class QuantisedAveragePrecision(ListLossConfig):
    """1 − AP over soft bins of the cosine."""

    name: Literal["quantised_ap"] = "quantised_ap"
    bins: int = Field(default=20, ge=2)
    """Of the cosine; published: 20 to 25."""

    def losses(self, similarity: Tensor, positives: Tensor, negatives: Tensor) -> AnchorLosses:
        return quantised_ap_losses(similarity, positives, negatives, bins=self.bins)


class ArcFaceConfig(Config):
    """Classification of the training classes with an angular margin."""

    name: Literal["arcface"] = "arcface"
    margin: float = Field(default=0.15, ge=0, le=1.57)
    """Added to the angle between an image and its class, in radians; a right angle at most."""
    scale: float = Field(default=30.0, gt=0)
    """Of the cosines before the softmax."""


LossConfig = Annotated[
    ContrastiveTuples | TripletTuples | SmoothAveragePrecision | QuantisedAveragePrecision | ArcFaceConfig,
    Field(discriminator="name"),
]
