"""XBM: embeddings trained against a memory of those of earlier steps.

Wang, Zhang, Huang, Scott: Cross-Batch Memory for Embedding Learning, CVPR 2020.

    x = FC(pooling of the backbone's features) / its length       [n, dimension], unit vectors
    L = batch_weight · ℓ(batch, batch) + memory_weight · ℓ(batch, memory)
    ℓ(anchors, references) = the losses of the anchors' pairs over their number     losses/metric.py

The memory is a ring of the newest embeddings, without gradient. It starts to fill after the warm-up, when
embeddings change slowly enough to be compared with those of a thousand steps ago (section 3.2): batch by
batch, as in the published code, or with training images drawn at random and encoded at once, as in the paper
(`memory_init: encoded`).

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
from ray_retrieval.data.samplers import Remainder, pk_plan, usable_classes
from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import DescriptorKind, Form, Vectors
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.layers.backbones import BackboneConfig, build_feature_map
from ray_retrieval.layers.pooling import GlobalPooling, PoolingName, wide
from ray_retrieval.losses.contrastive import Pairs, contrastive_against
from ray_retrieval.losses.memory import CrossBatchMemory
from ray_retrieval.losses.metric import (
    AnchorLosses,
    contrastive_losses,
    multi_similarity_losses,
    triplet_losses,
)
from ray_retrieval.losses.pairwise import share_a_label
from ray_retrieval.methods.base import Batch, Clock, Encode, Method, MethodConfig, Outputs, Rows


class PairLossConfig(Config):
    """A loss of an anchor's pairs."""

    reduction: str
    """What the sum over all anchors of the global batch is divided by: `anchors`, all of them, or what is
    active in them."""

    def losses(self, similarity: Tensor, positives: Tensor, negatives: Tensor) -> AnchorLosses:
        """From similarities [n, m] and the masks of pairs; see `losses.metric`."""
        raise NotImplementedError

    def against(
        self, anchors: Tensor, references: Tensor, pairs: Pairs
    ) -> tuple[AnchorLosses, Tensor | None]:
        """The losses with references that are constants, and how many negatives push, where it is known.

        Args:
            anchors: [n, d], unit vectors.
            references: [m, d], unit vectors; no gradient goes into them.
            pairs: gives the masks of positives and of negatives, bool [n, run], for a run of references.
        """
        return self.losses(anchors @ references.T, *pairs(slice(0, len(references)))), None

    def reduced(self, losses: AnchorLosses, batch: Batch) -> Tensor:
        """This share's part of the loss of the global batch."""
        if self.reduction == "anchors":
            return batch.mean(losses.values)
        active = batch.gather(losses.active).sum()
        return batch.total(losses.values.sum() / active.clamp(min=1))


class ContrastiveConfig(PairLossConfig):
    """Σ over positives of 1 − s, and over negatives above the margin of s."""

    name: Literal["contrastive"] = "contrastive"
    margin: float = Field(default=0.5, ge=-1, le=1)
    """Cosine from which a negative counts."""
    reduction: Literal["anchors", "pairs"] = "anchors"
    """`anchors`: their mean, in which more pairs make a larger loss, as published; `pairs`: the mean over
    positives and negatives above the margin, whatever the size of the memory."""

    def losses(self, similarity: Tensor, positives: Tensor, negatives: Tensor) -> AnchorLosses:
        return contrastive_losses(similarity, positives, negatives, margin=self.margin)

    def against(
        self, anchors: Tensor, references: Tensor, pairs: Pairs
    ) -> tuple[AnchorLosses, Tensor | None]:
        return contrastive_against(anchors, references, pairs, margin=self.margin)


class TripletConfig(PairLossConfig):
    """Hardest negative against hardest positive, by a margin."""

    name: Literal["triplet"] = "triplet"
    margin: float = Field(default=0.1, ge=0, le=2)
    """By which the positive is to be nearer, as a difference of cosines."""
    reduction: Literal["anchors", "active"] = "anchors"
    """`anchors`: the mean over all; `active`: over those whose triplet still has a loss."""

    def losses(self, similarity: Tensor, positives: Tensor, negatives: Tensor) -> AnchorLosses:
        return triplet_losses(similarity, positives, negatives, margin=self.margin)


class MultiSimilarityConfig(PairLossConfig):
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
    reduction: Literal["anchors", "mined"] = "anchors"
    """`anchors`: the mean over all, as published; `mined`: over those that have hard pairs."""

    def losses(self, similarity: Tensor, positives: Tensor, negatives: Tensor) -> AnchorLosses:
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
    memory_init: Literal["empty", "encoded"] = "empty"
    """The memory when the warm-up ends: `empty`, as in the published code, or, as in the paper, full of
    training images drawn by the seed, none twice, `encoded` by the model as it then is."""

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
        self._training_labels: Rows = np.zeros(0, np.int64)
        self._observed: dict[str, tuple[Tensor, Tensor]] = {}

    def start_training(self, table: ImageTable, device: torch.device) -> None:
        if table.labels.ndim == 2:
            raise DataError("XBM learns from one class an image, these have several", where=table.name)
        self._training_labels = np.asarray(table.labels, np.int64)
        if self.config.memory_weight:
            self.memory = CrossBatchMemory(
                self.config.memory_size or len(table),
                self.config.dimension,
                dtype=wide(self.embedding.weight.detach()[:0]).dtype,
                device=device,
            )

    def plan(self, table: ImageTable, batch_size: int, clock: Clock) -> list[Rows]:
        """P × K batches; see `data.samplers.pk_plan`.

        Raises:
            RecipeError: if the classes cannot fill a batch, or a batch is no multiple of K.
        """
        images = self.config.images_per_class
        labels = np.asarray(table.labels, np.int64)
        usable = usable_classes(labels, images, self.config.remainder)
        if usable < batch_size // images:
            raise RecipeError(
                f"a batch of {batch_size} images takes {batch_size // images} classes of {images} images, "
                f"{usable} training classes have enough",
                where="train.batch_size",
                mend=f"lower it to {usable * images} or less, or lower method.images_per_class",
            )
        if batch_size % images:
            raise RecipeError(
                f"{batch_size} images are not a multiple of the {images} of each class",
                where="train.batch_size",
                mend=f"set it to {max(1, round(batch_size / images)) * images}, or method.images_per_class",
            )
        return pk_plan(
            labels,
            classes=batch_size // images,
            images=images,
            seed=clock.seed,
            epoch=clock.epoch,
            remainder=self.config.remainder,
        )

    def forward(self, images: Tensor) -> Outputs:
        return {"embeddings": self.vectors(images)}

    def describe(self, images: Tensor) -> Vectors:
        return Vectors(self.vectors(images).detach().float().cpu().numpy())

    def vectors(self, images: Tensor) -> Tensor:
        """Unit vectors [n, dimension], in float32 or wider."""
        embedded = self.embedding(self.pooling(self.backbone(self.normalised(images))))
        return F.normalize(wide(embedded), dim=1)

    def before_step(self, clock: Clock, encode: Encode) -> None:
        """When the warm-up ends, fill the memory where it does not start empty."""
        memory = self.memory
        if memory is None or self.config.memory_init == "empty" or clock.step != self.config.warmup_steps:
            return
        labels = self._training_labels
        drawn = np.random.default_rng([clock.seed, clock.step]).permutation(len(labels))[: memory.capacity]
        embeddings = wide(encode(drawn)["embeddings"])
        memory.write(torch.from_numpy(drawn), embeddings, torch.from_numpy(labels[drawn]), step=clock.step)

    def objective(self, outputs: Outputs, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Both terms; past the warm-up, the batch is put into the memory."""
        config, memory = self.config, self.memory
        self._observed = {}
        embeddings = wide(outputs["embeddings"])
        everyone = batch.gather(embeddings)
        itself = batch.positions[:, None] == torch.arange(batch.global_size, device=embeddings.device)
        same = share_a_label(batch.labels, batch.global_labels)
        losses = config.loss.losses(embeddings @ everyone.T, same & ~itself, ~same)
        terms = {"batch": config.batch_weight * config.loss.reduced(losses, batch)}
        if memory is None or clock.step < config.warmup_steps:
            return terms
        self._observe_drift(memory, batch, embeddings.detach())
        if not config.memory_includes_batch:
            terms["memory"] = config.memory_weight * self._against(memory, batch, embeddings)
            # What the gradient of this term needs must not be written over.
            memory.embeddings = memory.embeddings.clone()
        slots = memory.write(batch.global_rows, everyone, batch.global_labels, step=clock.step)
        if config.memory_includes_batch:
            terms["memory"] = config.memory_weight * self._against(memory, batch, embeddings, slots)
        ages = memory.ages(clock.step)
        # All workers have the same memory: each gives its part, so that steps count alike for any number.
        part = len(batch.rows) / batch.global_size
        self._observed["memory_age"] = (ages.sum() * part, torch.tensor(len(ages) * part, device=ages.device))
        return terms

    def _against(
        self, memory: CrossBatchMemory, batch: Batch, anchors: Tensor, slots: Tensor | None = None
    ) -> Tensor:
        """The memory's term; `slots` are those that hold the batch, where they do."""
        ids, references, labels = memory.contents()
        own = torch.full((len(anchors), 1), -1, device=anchors.device)
        if slots is not None:
            # A ring smaller than the batch keeps its last rows: only these have a slot of their own.
            place = batch.positions - (batch.global_size - len(slots))
            own = torch.where(place >= 0, slots[place.clamp(min=0)], -1)[:, None]

        def pairs(block: slice) -> tuple[Tensor, Tensor]:
            # What is no pair, an anchor with itself or its own image, is of one class: it is no negative.
            positives = share_a_label(batch.labels, labels[block])
            negatives = ~positives
            if self.config.same_instance == "exclude":
                positives &= batch.rows[:, None] != ids[block]
            if positives.shape[1]:
                column = (own - block.start).clamp(0, positives.shape[1] - 1)
                elsewhere = own != column + block.start
                positives.scatter_(1, column, positives.gather(1, column) & elsewhere)
            return positives, negatives

        losses, pushing = self.config.loss.against(anchors, references, pairs)
        if pushing is not None:
            self._observed["active_negatives"] = (pushing.sum(), pushing.new_tensor(len(pushing)))
        return self.config.loss.reduced(losses, batch)

    def _observe_drift(self, memory: CrossBatchMemory, batch: Batch, embeddings: Tensor) -> None:
        """‖new − old‖² of the images of the batch that the memory still holds from an earlier step."""
        slots = memory.newest(batch.rows)
        held = slots >= 0
        moved = (embeddings - memory.embeddings[slots.clamp(min=0)]).square().sum(dim=1)
        self._observed["drift"] = (torch.where(held, moved, 0).sum(), held.sum())

    def observations(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What the memory is like past the warm-up.

        drift: mean ‖new − old‖² over the images of the batch that the memory still holds, before they are
            written anew: between 0 and 4, twice 1 − cosine.
        memory_age: mean number of steps since the slots of the memory were written, the batch's own at 0.
        active_negatives: of the contrastive loss, how many negatives in the memory are above the margin, in
            the mean over the anchors.
        """
        return self._observed

    def warnings(self, table: ImageTable, steps: int) -> list[str]:  # noqa: ARG002
        if not steps or not self.config.memory_weight or self.config.warmup_steps < steps:
            return []
        return [
            f"the memory never begins: method.warmup_steps is {self.config.warmup_steps}, "
            f"and the training has {steps} steps"
        ]

    def training_state(self) -> dict[str, Any]:
        return {} if self.memory is None else {"memory": self.memory.state()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        if self.memory is not None:
            self.memory.load_state(state["memory"])
