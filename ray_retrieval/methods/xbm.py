"""XBM: embeddings trained against a memory of those of earlier steps.

Wang, Zhang, Huang, Scott: Cross-Batch Memory for Embedding Learning, CVPR 2020.

    x = FC(pooling of the backbone's features) / its length       [n, dimension], unit vectors
    L = batch_weight · ℓ(batch, batch) + memory_weight · ℓ(batch, memory)
    ℓ(anchors, references) = mean over the anchors of a loss of their pairs       losses/metric.py

The memory is a ring of the newest embeddings, without gradient. It starts to fill after the warm-up, when
embeddings change slowly enough to be compared with those of a thousand steps ago (section 3.2).

As in the published code, the batch is put into the memory before the second term is computed, so that its
pairs count in that term too; `memory_includes_batch: false` leaves them out. An anchor is never paired with
itself: its own slot is left out by its number, where the published code leaves out all pairs of a similarity
above 1 − 1e-5, other images of equal pixels among them.
"""

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ray_retrieval.config import Config
from ray_retrieval.data.samplers import Remainder, pk_plan
from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import DescriptorKind, Form, Vectors
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.layers.backbones import BackboneConfig, build_feature_map
from ray_retrieval.layers.pooling import GlobalPooling, PoolingName
from ray_retrieval.losses.memory import CrossBatchMemory
from ray_retrieval.losses.metric import contrastive_losses, multi_similarity_losses, triplet_losses
from ray_retrieval.losses.pairwise import share_a_label
from ray_retrieval.methods.base import Batch, Clock, Method, MethodConfig, Outputs, Rows
from ray_retrieval.methods.hashing import wide


class ContrastiveConfig(Config):
    """Σ over positives of 1 − s, and over negatives above the margin of s."""

    name: Literal["contrastive"] = "contrastive"
    margin: float = Field(default=0.5, ge=-1, le=1)
    """Cosine from which a negative counts."""

    def losses(self, similarity: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        return contrastive_losses(similarity, positives, negatives, margin=self.margin)


class TripletConfig(Config):
    """Hardest negative against hardest positive, by a margin."""

    name: Literal["triplet"] = "triplet"
    margin: float = Field(default=0.1, ge=0, le=2)
    """By which the positive is to be nearer, as a difference of cosines."""

    def losses(self, similarity: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        return triplet_losses(similarity, positives, negatives, margin=self.margin)


class MultiSimilarityConfig(Config):
    """Soft weights on mined pairs."""

    name: Literal["multi_similarity"] = "multi_similarity"
    alpha: float = Field(default=2.0, gt=0)
    """Sharpness on positives."""
    beta: float = Field(default=40.0, gt=0)
    """Sharpness on negatives."""
    base: float = Field(default=0.5, ge=-1, le=1)
    """Similarity around which pairs are weighted."""
    mining: float = Field(default=0.1, ge=0)
    """Margin of the mining of hard pairs."""

    def losses(self, similarity: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        return multi_similarity_losses(
            similarity,
            positives,
            negatives,
            alpha=self.alpha,
            beta=self.beta,
            base=self.base,
            mining=self.mining,
        )


LossConfig = Annotated[ContrastiveConfig | TripletConfig | MultiSimilarityConfig, Field(discriminator="name")]


class XbmConfig(MethodConfig):
    """XBM."""

    name: Literal["xbm"] = "xbm"
    dimension: int = Field(default=128, ge=1)
    """Length of an embedding."""
    backbone: BackboneConfig = BackboneConfig(name="resnet50")
    """The network below the pooling."""
    pooling: PoolingName = "max"
    """How the map of features becomes one vector; the published code takes the maximum."""
    loss: LossConfig = ContrastiveConfig()
    """The loss of an anchor's pairs, in both terms."""
    images_per_class: int = Field(default=4, ge=2)
    """K: images of each class in a batch, which has batch_size / K classes."""
    remainder: Remainder = "pad"
    """Images of a class beyond a multiple of K: `pad` with others of the class, `drop` for this epoch, or
    `carry` into the next."""
    batch_weight: float = Field(default=1.0, ge=0)
    """Weight of the pairs within the batch."""
    memory_weight: float = Field(default=1.0, ge=0)
    """Weight of the pairs with the memory; 0 trains without one."""
    memory_size: int | None = Field(default=None, ge=1)
    """Slots of the memory; unset: as many as training images. Published: 55,000 of SOP's 59,551."""
    memory_includes_batch: bool = True
    """Whether the pairs of the batch count in the memory's term too."""
    same_instance: Literal["positive", "exclude"] = "positive"
    """What an earlier embedding of the anchor's own image is, where the memory still holds one: a positive
    like other images of its class, or no pair."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps before the memory begins to fill; published: 1,000."""

    @property
    def form(self) -> Form:
        return Form(DescriptorKind.VECTORS, self.dimension)


class Xbm(Method):
    """A backbone, global pooling and a linear layer under a loss on the batch and on a memory."""

    whole_batches: ClassVar[bool] = True
    config: XbmConfig

    def __init__(self, config: XbmConfig, *, classes: int, pretrained: bool = True) -> None:
        super().__init__(config, classes=classes, pretrained=pretrained)
        self.backbone, channels = build_feature_map(config.backbone, pretrained=pretrained)
        self.pooling = GlobalPooling(config.pooling)
        self.embedding = nn.Linear(channels, config.dimension)
        nn.init.kaiming_normal_(self.embedding.weight, mode="fan_out")
        nn.init.zeros_(self.embedding.bias)
        self.memory: CrossBatchMemory | None = None

    def start_training(self, table: ImageTable, device: torch.device) -> None:
        if table.labels.ndim == 2:
            raise DataError("XBM learns from one class an image, these have several", where=table.name)
        if self.config.memory_weight:
            self.memory = CrossBatchMemory(
                self.config.memory_size or len(table),
                self.config.dimension,
                dtype=wide(self.embedding.weight.detach()[:0]).dtype,
                device=device,
            )

    def plan(self, table: ImageTable, batch_size: int, clock: Clock) -> list[Rows]:
        """P × K batches; see `data.samplers.pk_plan`."""
        images = self.config.images_per_class
        if batch_size % images:
            raise RecipeError(
                f"{batch_size} images are not a multiple of the {images} of each class",
                where="train.batch_size",
                mend=f"set it to {max(1, round(batch_size / images)) * images}, or method.images_per_class",
            )
        return pk_plan(
            np.asarray(table.labels, np.int64),
            classes=batch_size // images,
            images=images,
            seed=clock.seed,
            epoch=clock.epoch,
            remainder=self.config.remainder,
        )

    def forward(self, images: Tensor) -> Outputs:
        return {"embeddings": self._embed(images)}

    def describe(self, images: Tensor) -> Vectors:
        return Vectors(self._embed(images).detach().float().cpu().numpy())

    def _embed(self, images: Tensor) -> Tensor:
        """Unit vectors [n, dimension], in float32 or wider."""
        embedded = self.embedding(self.pooling(self.backbone(self.normalised(images))))
        return F.normalize(wide(embedded), dim=1)

    def objective(self, outputs: Outputs, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Both terms; past the warm-up, the batch is put into the memory."""
        config = self.config
        embeddings = wide(outputs["embeddings"])
        everyone = batch.gather(embeddings)
        own = batch.positions[:, None] == torch.arange(batch.global_size, device=embeddings.device)
        terms = {
            "batch": config.batch_weight * self._term(batch, embeddings, everyone, batch.global_labels, own)
        }
        if self.memory is None or clock.step < config.warmup_steps:
            return terms
        if not config.memory_includes_batch:
            terms["memory"] = config.memory_weight * self._against(self.memory, batch, embeddings)
            # What the gradient of this term needs must not be written over.
            self.memory.embeddings = self.memory.embeddings.clone()
        slots = self.memory.write(batch.global_rows, everyone, batch.global_labels)
        if config.memory_includes_batch:
            terms["memory"] = config.memory_weight * self._against(self.memory, batch, embeddings, slots)
        return terms

    def _against(
        self, memory: CrossBatchMemory, batch: Batch, anchors: Tensor, slots: Tensor | None = None
    ) -> Tensor:
        """The memory's term; `slots` are those that hold the batch, where they do."""
        excluded = ~memory.seen.expand(len(anchors), -1)
        if slots is not None:
            # A ring smaller than the batch keeps its last rows: only these have a slot of their own.
            kept = torch.arange(batch.global_size - len(slots), batch.global_size, device=slots.device)
            excluded[:, slots] |= batch.positions[:, None] == kept
        if self.config.same_instance == "exclude":
            excluded |= batch.rows[:, None] == memory.ids
        return self._term(batch, anchors, memory.embeddings, memory.labels, excluded)

    def _term(
        self, batch: Batch, anchors: Tensor, references: Tensor, labels: Tensor, excluded: Tensor
    ) -> Tensor:
        same = share_a_label(batch.labels, labels)
        losses = self.config.loss.losses(anchors @ references.T, same & ~excluded, ~same & ~excluded)
        return batch.mean(losses)

    def training_state(self) -> dict[str, Any]:
        return {} if self.memory is None else {"memory": self.memory.state()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        if self.memory is not None:
            self.memory.load_state(state["memory"])
