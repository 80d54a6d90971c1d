"""GeM: global descriptors fine-tuned on tuples with mined hard negatives, whitened at the end.

Radenović, Tolias, Chum: Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019.

    v = pooling of the backbone's last activation / its length, optionally through a linear layer and / its
        length again                                          [n, dimension], unit vectors
    L = Σ over tuples of ℓ(query, positive, hard negatives)   losses/tuples.py

The tuples of an epoch are drawn by (seed, epoch); its negatives are the images of a random pool that the
network takes for the query's like (data/mining.py). Other objectives on the same descriptor: average
precision over a batch (losses/listwise.py) and classification with an angular margin (losses/arcface.py).

As in the published code, the statistics of batch normalisation stay as they are, the learning rate of the
pooling's exponent is 10 times the network's (100 times with one exponent a channel), without decay, and the
gradients of tuples add up. Images keep their proportions; each size is a pass of its own, and a batch goes
through the network twice, so that no more than one pass is in memory whatever the loss compares.

When training ends, whitening is learned from descriptors of the training images at all scales, and becomes a
part of the model.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ray_retrieval.data.mining import LabelPairs, epoch_plan, hard_negatives, pairs_of_labels
from ray_retrieval.data.samplers import pk_plan, usable_classes
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.descriptors import DescriptorKind, Form, Vectors
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.layers.backbones import (
    BackboneConfig,
    build_feature_map,
    least_side,
    map_channels,
    side_for_cells,
)
from ray_retrieval.layers.pooling import (
    SuperGlobalPooling,
    combine_scales,
    l2_normalised,
    padded_to,
    wide,
)
from ray_retrieval.layers.regions import PoolingKind, RegionalPooling, build_pooling
from ray_retrieval.layers.whitening import PAIRS_A_DIMENSION, Whitening
from ray_retrieval.losses.arcface import CosineClassifier, arcface_losses
from ray_retrieval.losses.pairwise import share_a_label
from ray_retrieval.methods.base import (
    Batch,
    Clock,
    Encode,
    Method,
    MethodConfig,
    Outputs,
    ParameterGroup,
    Rows,
)
from ray_retrieval.methods.gem_objectives import (
    ArcFaceConfig,
    ContrastiveTuples,
    ListLossConfig,
    LossConfig,
    TupleLossConfig,
)
from ray_retrieval.methods.gem_whitening import (
    WhiteningConfig,
    learn_by_images,
    learn_by_pairs,
    spread,
    start_as_identity,
    start_by_places,
)

_STARTED = ("local.", "pooling.whitening.", "projection.")
"""Layers that start from a whitening of the training images, by the beginning of their tensors' names."""
_SHARES = 1 << 40
"""Of a pixel, in which scales are counted."""
_MAPS = 2000
"""Training images whose maps are looked at for the start of layers that whiten places or regions."""


class GemConfig(MethodConfig):
    """GeM."""

    vectors_by = "map"

    name: Literal["gem"] = "gem"
    image: Preprocessing = Preprocessing(size=362, resize="long_side")
    backbone: BackboneConfig = BackboneConfig(name="resnet50")
    """The network below the pooling."""
    pooling: PoolingKind = "gem"
    """How the map of features becomes a vector: `max` (MAC), `average` (SPoC), `gem`, `gemmp` (one exponent a
    channel) or `rmac`."""
    p: float = Field(default=3.0, ge=1)
    """Exponent of `gem` and `gemmp` at the start; it is learnt."""
    regional: bool = False
    """Pool by regions, each whitened by a layer that is learnt."""
    local_whitening: bool = False
    """A linear layer at every place of the map before the pooling."""
    projection: bool = False
    """A linear layer behind the pooling that is trained with the network (the `w` of published names). As
    the other linear layers it starts from a whitening of the training images, where there are enough."""
    dimension: int | None = Field(default=None, ge=1)
    """Of a descriptor; unset: the channels of the map. Fewer need a `projection` or a `whitening`."""
    loss: LossConfig = ContrastiveTuples()
    """What is trained for."""
    train_batch_norm: bool = True
    """Whether scale and shift of batch normalisation are trained; its statistics never are."""
    whitening: WhiteningConfig = WhiteningConfig()
    """Learned when training has ended, and part of the model."""
    scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = Field(default=(1.0,), min_length=1)
    """Sizes at which an image is described, as factors of its own; their descriptors are combined. Published:
    1, 0.7071 and 0.5."""
    combine: Literal["mean", "max"] = "mean"
    """How: the generalised mean with the exponent of `gem` where nothing follows the pooling, else the mean;
    or the maximum, as SuperGlobal does."""
    describe_with: Literal["pooling", "superglobal"] = "pooling"
    """The pooling of descriptors: that of the training, or SuperGlobal's, which needs no training."""

    @model_validator(mode="after")
    def _check(self) -> "GemConfig":
        channels = map_channels(self.backbone.name)
        cut = self.projection or self.whitening.name != "none"
        if self.dimension is not None and self.dimension != channels and not cut:
            raise ValueError(
                f"'dimension' is {channels}, the channels of {self.backbone.name}, without 'projection' and "
                "'whitening'"
            )
        if self.dimension is not None and self.dimension > channels:
            raise ValueError(f"'dimension' is at most the {channels} channels of {self.backbone.name}")
        if self.describe_with == "superglobal" and (self.regional or self.pooling == "rmac"):
            raise ValueError("'describe_with: superglobal' has regions of its own, the pooling has none then")
        return self

    @property
    def form(self) -> Form:
        return Form(DescriptorKind.VECTORS, self.dimension or map_channels(self.backbone.name))

    @property
    def projected(self) -> int:
        """Dimensions before the whitening that is learned at the end."""
        channels = map_channels(self.backbone.name)
        return self.form.size if self.projection and self.whitening.name == "none" else channels


class Gem(Method):
    """A backbone, a pooling and what makes its descriptor comparable, under one of several objectives."""

    whole_batches: ClassVar[bool] = True
    repeatable: ClassVar[bool] = True
    config: GemConfig

    def __init__(self, config: GemConfig, *, classes: int, pretrained: bool = True) -> None:
        super().__init__(config, classes=classes, pretrained=pretrained)
        self.backbone, channels = build_feature_map(config.backbone, pretrained=pretrained)
        self.local = Whitening(channels, channels) if config.local_whitening else None
        self.pooling = build_pooling(config.pooling, channels, p=config.p, regional=config.regional)
        self.projection = Whitening(channels, config.projected) if config.projection else None
        self.classifier = (
            CosineClassifier(config.projected, classes) if isinstance(config.loss, ArcFaceConfig) else None
        )
        self.whitening: Whitening | None = None
        if config.whitening.name != "none":
            self.whitening = Whitening(config.projected, config.form.size).requires_grad_(requires_grad=False)
        self.whitened: Tensor
        self.initialised: Tensor  # whether the layers of `_STARTED` have had their start
        self.register_buffer("whitened", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("initialised", torch.zeros(len(_STARTED), dtype=torch.uint8))
        for layer in self.modules():
            if isinstance(layer, Whitening):
                start_as_identity(layer)
        if not config.train_batch_norm:
            for layer in self._batch_norms():
                layer.requires_grad_(requires_grad=False)
        self._labels: Rows = np.zeros(0, np.int64)
        self._pairs: Rows | LabelPairs | None = None
        self._mined: dict[str, Any] = {}
        self._observed: dict[str, tuple[Tensor, Tensor]] = {}
        self._observed_images = 0
        self._whitens = False  # told without a look at the buffer

    def train(self, mode: bool = True) -> "Gem":
        """Training mode, but for batch normalisation, whose statistics stay as they are."""
        super().train(mode)
        for layer in self._batch_norms():
            layer.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [layer for layer in self.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]

    def parameter_groups(self) -> list[ParameterGroup]:
        exponents = [value for name, value in self.pooling.named_parameters() if name.split(".")[-1] == "p"]
        known = {id(value) for value in exponents}
        others = [value for value in self.parameters() if value.requires_grad and id(value) not in known]
        factor = 100.0 if self.config.pooling == "gemmp" else 10.0
        groups = [ParameterGroup(others)]
        return [*groups, ParameterGroup(exponents, factor, decays=False)] if exponents else groups

    # Descriptors

    def forward(self, images: Tensor) -> Outputs:
        embeddings = self._embed(self._features(self.normalised(images)))
        if self.classifier is not None:
            return {"cosines": self.classifier(embeddings)}
        return {"embeddings": embeddings}

    def describe(self, images: Tensor) -> Vectors:
        return Vectors(self.vectors(images).detach().float().cpu().numpy())

    def vectors(self, images: Tensor) -> Tensor:
        """Unit vectors [n, dimension] of uint8 images [n, 3, h, w], in float32 or wider."""
        vectors = self._described(images)
        if self.whitening is not None and (self._whitens or int(self.whitened)):
            vectors = l2_normalised(self.whitening(vectors))
        return F.normalize(vectors, dim=1)

    def fix_for_export(self) -> None:
        self._whitens = bool(self.whitened)
        if not self._whitens:
            self.whitening = None

    @property
    def least_side(self) -> int:
        """From which on nothing is padded, maps have cells that can be told apart, and windows are whole."""
        cells = 3 if self.config.describe_with == "superglobal" else 2
        return math.ceil(side_for_cells(self.backbone, cells) / min(self.config.scales))

    def _features(self, images: Tensor) -> Tensor:
        features = self._map(images)
        return features if self.local is None else self.local(features)

    def _map(self, images: Tensor) -> Tensor:
        """The backbone's last map; a side that is too short for it is padded with the border."""
        features: Tensor = self.backbone(padded_to(images, least_side(self.config.backbone.name)))
        return features

    def _embed(self, features: Tensor, pooling: nn.Module | None = None) -> Tensor:
        """Unit vectors [n, dimensions before whitening], in float32 or wider."""
        vectors = l2_normalised(wide((pooling or self.pooling)(features)))
        return vectors if self.projection is None else l2_normalised(wide(self.projection(vectors)))

    def _described(self, images: Tensor) -> Tensor:
        """What `describe` gives before whitening: of all scales, [n, d] in float32 or wider."""
        pooling = SuperGlobalPooling() if self.config.describe_with == "superglobal" else None
        normalised = self.normalised(images)
        found = [
            self._embed(self._features(_scaled(normalised, scale)), pooling) for scale in self.config.scales
        ]
        return combine_scales(torch.stack(found), self.config.combine, p=self._exponent_of_scales())

    def _exponent_of_scales(self) -> Tensor | float:
        """The learnt exponent where descriptors are what the pooling gave, so that none is negative."""
        config = self.config
        plain = config.pooling == "gem" and not (config.regional or config.projection)
        if not plain or len(config.scales) == 1 or config.describe_with == "superglobal":
            return 1.0
        exponent: Tensor = self.pooling.exponent  # type: ignore[assignment]
        return exponent

    # Tuples and batches

    def start_training(self, table: ImageTable, device: torch.device) -> None:  # noqa: ARG002
        self._labels = _labels(table)
        # Classes of one image each can be told apart, though there is no pair among them.
        alone = isinstance(self.config.loss, ArcFaceConfig) and len(set(self._labels.tolist())) == len(table)
        self._pairs = None if alone else _pairs(table)
        self.whitened.zero_()  # that of a model that the training starts from is of another network

    def warnings(self, table: ImageTable, steps: int) -> list[str]:  # noqa: ARG002
        config = self.config.whitening
        images = min(config.images, len(table))
        if config.name == "pca" and images <= self.config.form.size:
            return [f"whitening to {self.config.form.size} dimensions is learned from {images} images only"]
        if config.name != "learned":
            return []
        pairs, dimensions = min(config.images // 2, len(_pairs(table))), self.config.projected
        if pairs >= PAIRS_A_DIMENSION * dimensions:
            return []
        return [
            f"whitening of {dimensions} dimensions is learned from {pairs} pairs only, and shrunk for that: "
            "whitening pca or a smaller backbone may do better"
        ]

    @property
    def rounds(self) -> int:
        return self.config.loss.rounds if isinstance(self.config.loss, TupleLossConfig) else 1

    def plan_sizes(self, table: ImageTable, batch_size: int, clock: Clock) -> list[int]:
        loss = self.config.loss
        if not isinstance(loss, TupleLossConfig):
            return super().plan_sizes(table, batch_size, clock)
        size = 2 + loss.negatives
        if batch_size < size:
            raise RecipeError(
                f"a tuple has {size} images: query, positive and {loss.negatives} negatives",
                where="train.batch_size",
                mend=f"set it to a multiple of {size}, or lower method.loss.negatives",
            )
        clusters = len(np.unique(_labels(table)))
        if clusters <= loss.negatives:
            raise DataError(
                f"{clusters} clusters, and the {loss.negatives} negatives of a query are of as many others",
                where=table.name,
                mend="give images of more things, or lower method.loss.negatives",
            )
        pairs = len(_pairs(table))
        if not pairs:
            raise DataError(
                "the column 'positives' lists no pair of images to train on",
                where=table.name,
                mend="list some, or leave the column out: images of one class are pairs then",
            )
        tuples = min(max(1, loss.queries // loss.rounds), pairs)
        batches = np.array_split(np.arange(tuples), max(1, round(tuples / (batch_size // size))))
        return [size * len(batch) for batch in batches]

    def plan(self, table: ImageTable, batch_size: int, clock: Clock) -> list[Rows]:
        """Batches of whole tuples, one after another; of P × K images; or of all images once."""
        loss = self.config.loss
        if isinstance(loss, TupleLossConfig):
            ends = np.cumsum(self.plan_sizes(table, batch_size, clock))
            return np.split(self._mined["tuples"].reshape(-1), ends[:-1])
        if isinstance(loss, ListLossConfig):
            return _list_plan(_labels(table), loss.images_per_class, batch_size, clock)
        return super().plan(table, batch_size, clock)

    def before_round(self, clock: Clock, encode: Encode) -> None:
        """Mine the tuples of a round."""
        loss, place = self.config.loss, [clock.epoch, clock.round]
        if not isinstance(loss, TupleLossConfig) or self._mined.get("place") == place:
            return
        assert self._pairs is not None
        plan = epoch_plan(
            self._pairs,
            len(self._labels),
            max(1, loss.queries // loss.rounds),
            loss.pool,
            seed=clock.seed,
            epoch=clock.epoch,
            repeat=clock.round,
        )
        tuples = [plan.queries[:, None], plan.positives[:, None]]
        if loss.negatives:
            rows = plan.described
            vectors = wide(encode(rows)["embeddings"]).float().cpu().numpy()
            queries, pool = (np.searchsorted(rows, some) for some in (plan.queries, plan.pool))
            found = hard_negatives(
                vectors[queries],
                self._labels[plan.queries],
                vectors[pool],
                self._labels[plan.pool],
                loss.negatives,
                threads=torch.get_num_threads(),
            )
            tuples.append(plan.pool[found])
        self._mined = {"place": place, "tuples": np.concatenate(tuples, axis=1)}

    # Objectives

    def objective(self, outputs: Outputs, batch: Batch, clock: Clock) -> dict[str, Tensor]:  # noqa: ARG002
        loss = self.config.loss
        self._observed, self._observed_images = {}, len(batch.rows)
        if isinstance(loss, ArcFaceConfig):
            values = arcface_losses(
                wide(outputs["cosines"]), batch.labels, margin=loss.margin, scale=loss.scale
            )
            return {"classes": batch.mean(values)}
        embeddings = wide(outputs["embeddings"])
        everyone = batch.gather(embeddings)
        if isinstance(loss, ListLossConfig):
            # Neither an image itself nor a copy of it, which fills a small class up, is a positive.
            another = batch.rows[:, None] != batch.global_rows
            same = share_a_label(batch.labels, batch.global_labels)
            found = loss.losses(embeddings @ everyone.T, same & another, ~same)
            return {"precision": batch.mean(found.values)}
        return {"tuples": self._of_tuples(loss, everyone, batch)}

    def _of_tuples(self, loss: TupleLossConfig, everyone: Tensor, batch: Batch) -> Tensor:
        """This share's part of the sum over all tuples: those whose query it has."""
        size = 2 + loss.negatives
        tuples = everyone.view(-1, size, everyone.shape[1])
        queries = size * torch.arange(len(tuples), device=everyone.device)
        mine = (queries >= batch.start) & (queries < batch.start + len(batch.rows))
        chosen = tuples[mine]
        if loss.negatives:
            gaps = (chosen[:, :1] - chosen[:, 2:]).detach().norm(dim=2)
            self._observed["negative_distance"] = (gaps.sum(), gaps.new_tensor(gaps.numel()))
        return batch.total(loss.losses(chosen[:, 0], chosen[:, 1], chosen[:, 2:]).sum())

    def observations(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What is worth watching.

        negative_distance: of tuples, the mean distance of queries to hard negatives, which should rise.
        p: the exponent of `gem` or the mean of those of `gemmp`.
        """
        exponents = [value for name, value in self.pooling.named_parameters() if name.split(".")[-1] == "p"]
        if not exponents:
            return self._observed
        exponent = exponents[0].detach().clamp(min=1).mean()
        # By images, so that each step counts alike however many workers it had.
        images = torch.full_like(exponent, self._observed_images)
        return {**self._observed, "p": (exponent * images, images)}

    # Whitening

    def before_training(self, encode: Encode) -> None:
        """Let linear layers start from whitenings of the untrained network's features, one after another."""
        count, images = len(self._labels), self.config.whitening.images
        local, regions, projection = (not done for done in self.initialised.tolist())
        if self.local is not None and local:
            start_by_places(self.local, count, _MAPS, encode, self._places)
        if isinstance(self.pooling, RegionalPooling) and self.pooling.whitening is not None and regions:
            start_by_places(self.pooling.whitening, count, _MAPS, encode, self._regions)
        # What too few pairs do not determine would be blown up.
        pairs = 0 if self._pairs is None else min(images // 2, len(self._pairs))
        if (
            self.projection is not None
            and projection
            and pairs >= PAIRS_A_DIMENSION * self.projection.in_features
        ):
            assert self._pairs is not None
            learn_by_pairs(self.projection, self._pairs, images, encode, self._pooled)
        self.initialised.fill_(1)

    def started_from(self, lacking: list[str]) -> None:
        """Layers that the other model lacks still have their start before them."""
        for number, layer in enumerate(_STARTED):
            if any(name.startswith(layer) for name in lacking):
                self.initialised[number] = 0

    def _places(self, images: Tensor) -> Outputs:
        return {"vectors": spread(wide(self._map(self.normalised(images))).flatten(2).transpose(1, 2))}

    def _regions(self, images: Tensor) -> Outputs:
        assert isinstance(self.pooling, RegionalPooling)
        return {"vectors": spread(self.pooling.regions(self._features(self.normalised(images))))}

    def _pooled(self, images: Tensor) -> Outputs:
        return {"vectors": l2_normalised(wide(self.pooling(self._features(self.normalised(images)))))}

    def after_training(self, encode: Encode) -> None:
        """Learn the whitening, from descriptors as `describe` makes them.

        Raises:
            DataError: if it is learned from pairs, and there is none; or as `learn_by_pairs`.
        """
        if self.whitening is None:
            return
        config = self.config.whitening

        def describe(images: Tensor) -> Outputs:
            return {"vectors": self._described(images)}

        if config.name == "learned":
            if self._pairs is None:
                raise DataError(
                    "whitening is learned from pairs, and no two images are of one class",
                    where="method.whitening",
                    mend="set it to pca or none",
                )
            learn_by_pairs(self.whitening, self._pairs, config.images, encode, describe)
        else:
            count, shrinkage = len(self._labels), config.shrinkage
            learn_by_images(self.whitening, count, config.images, encode, describe, shrinkage=shrinkage)
        self.whitened.fill_(1)

    # What a checkpoint holds beside the weights

    def training_state(self) -> dict[str, Any]:
        if not self._mined:
            return {}
        return {"place": self._mined["place"], "tuples": torch.from_numpy(self._mined["tuples"])}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._mined = {"place": state["place"], "tuples": state["tuples"].cpu().numpy()} if state else {}


def _scaled(images: Tensor, scale: float) -> Tensor:
    """Normalised images at another size, in whole pixels: bilinear, without a filter before, as published."""
    if scale == 1.0:
        return images
    sides = [max(1, scaled_side(side, scale)) for side in images.shape[2:]]
    return F.interpolate(images, size=sides, mode="bilinear", align_corners=False)


def scaled_side(side: int, scale: float) -> int:
    """What a side times a scale is, cut to whole pixels.

    By whole numbers alone, since a graph of ONNX has only float32 for it. Where the product is a whole number
    it is that, which products of floats may fall short of.
    """
    return side * math.ceil(scale * _SHARES) // _SHARES


def _labels(table: ImageTable) -> Rows:
    if table.labels.ndim == 2:
        raise DataError("GeM learns from one cluster or class an image, these have several", where=table.name)
    return np.asarray(table.labels, np.int64)


def _pairs(table: ImageTable) -> Rows | LabelPairs:
    """Those that the table lists in its column `positives`, or else of equal labels."""
    listed = table.column("positives")
    if listed is None:
        return pairs_of_labels(_labels(table))
    lengths = np.asarray(listed.fill_null([]).value_lengths())
    queries = np.repeat(np.arange(len(table)), lengths)
    return np.stack([queries, np.asarray(listed.flatten())], axis=1).astype(np.int64)


def _list_plan(labels: Rows, images: int, batch_size: int, clock: Clock) -> list[Rows]:
    classes = batch_size // images
    usable = usable_classes(labels, images, "pad")
    if batch_size % images or usable < classes:
        raise RecipeError(
            f"a batch of {batch_size} images is to have {batch_size / images:g} classes of {images} images; "
            f"{usable} training classes have enough",
            where="train.batch_size",
            mend=f"set it to a multiple of {images}, {usable * images} at most, or lower "
            "method.loss.images_per_class",
        )
    return pk_plan(
        labels, classes=classes, images=images, seed=clock.seed, epoch=clock.epoch, remainder="pad"
    )
