"""DELF: local features that a network learns to attend to, and classes of images that teach it which.

Noh, Araujo, Sim, Weyand, Han: Large-Scale Image Retrieval with Attentive Deep Local Features, ICCV 2017; with
the joint training, the autoencoder and the global head of Cao, Araujo, Sim: Unifying Deep Local and Global
Features for Image Search (DELG), ECCV 2020.

    S = the backbone's map at conv4                                       [n, channels, h, w]
    a = softplus of two 1 × 1 convolutions of S, one score a cell         [n, h, w]
    y = mean over cells of a · S / its length;  logits = W y + b          trained by classes of images

Three stages: `tuning` trains the backbone by classification on conv5; `attention` trains the scores on a
frozen backbone; `joint` does both at once, without letting the scores' gradients into the backbone. When a
training that has scores ends, the principal components of the features that they select become a part of the
model. An image is described at several scales by the features of the highest scores.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ray_retrieval.config import Config
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.descriptors import DescriptorKind, Form, Local
from ray_retrieval.errors import DataError, ModelError, RecipeError
from ray_retrieval.layers.attention import Attention, Autoencoder, attentive_pooling, reconstruction_losses
from ray_retrieval.layers.backbones import BackboneConfig, build_stages, side_for_cells, stage_channels
from ray_retrieval.layers.pooling import GlobalPooling, l2_normalised, wide
from ray_retrieval.layers.pyramid import Found, Pyramid, PyramidConfig
from ray_retrieval.layers.receptive_field import receptive_field
from ray_retrieval.layers.whitening import pca
from ray_retrieval.losses.arcface import CosineClassifier, arcface_losses
from ray_retrieval.methods.base import Batch, Clock, Encode, Method, MethodConfig, Outputs, Rows
from ray_retrieval.methods.statistics import statistics_of

_SEED = int.from_bytes(b"delf", "big")
"""Of the training images that principal components and threshold are learned from."""
_OF_THE_HEAD = ("above.", "global_pooling.", "global_projection.")
_NO_FEATURES = "no features were found in the training images: there is nothing to learn from"


class ReductionConfig(Config):
    """How a feature becomes a descriptor."""

    name: Literal["pca", "autoencoder"] = "pca"
    """`pca`: principal components of the model's own features, when training has ended; `autoencoder`: the
    code of an autoencoder that is trained with the joint stage."""
    whiten: bool = False
    """Of `pca`: give all components the same variance."""
    images: int = Field(default=2000, ge=1)
    """Training images that the components are learned from, at most, drawn at random."""


class GlobalHead(Config):
    """A global descriptor from the same pass, as in DELG."""

    dimension: int = Field(default=2048, ge=1)
    p: float = Field(default=3.0, ge=1)
    """Exponent of the generalised mean over conv5; it is learnt."""
    margin: float = Field(default=0.1, ge=0, le=1.57)
    """Of ArcFace, in radians."""
    scale: float = Field(default=45.25, gt=0)
    """Of ArcFace's logits; published: the root of 2048."""
    scales: tuple[float, ...] = (0.7071, 1.0, 1.4142)
    """Those of the pyramid whose descriptors are combined, by the nearest."""


class DelfConfig(MethodConfig):
    """DELF."""

    name: Literal["delf"] = "delf"
    image: Preprocessing = Preprocessing(size=1024, resize="long_side")
    """How an image is described: whole, its longer side at most so many pixels before the pyramid."""
    crop: Preprocessing = Preprocessing(size=321, resize="short_side", resize_to=368)
    """How an image is prepared for training and validation: squares, of which `train.augmentation.crop_scale`
    cuts random parts."""
    backbone: BackboneConfig = BackboneConfig(name="resnet50")
    stage: Literal["tuning", "attention", "joint"] = "joint"
    """What is trained. `attention` starts from a model that was tuned: `train.start`, or `stages`."""
    stride: Literal[16, 32] = 16
    """Pixels between two features. 32: every second one of each row and column, as in the official code."""
    hidden: int = Field(default=512, ge=1)
    """Channels within the attention head."""
    dimension: int = Field(default=40, ge=1)
    """Of a descriptor; published: 40, and later 128."""
    reduction: ReductionConfig = ReductionConfig()
    normalised_scores: bool = False
    """Divide the scores of a map by their mean before they weigh its features in training, so that a factor
    common to all of them has no gradient; published without."""
    attention_weight: float = Field(default=1.0, gt=0)
    """Of the attention's loss."""
    autoencoder_weight: float = Field(default=10.0, gt=0)
    """Of the autoencoder's loss."""
    pyramid: PyramidConfig = PyramidConfig()
    """Scales of an image and choice of its features."""
    keep_share: float | None = Field(default=None, gt=0, le=1)
    """Calibrate a threshold of the scores when training has ended: so large a share of the features that are
    chosen of training images is above it. The scores' unit differs from model to model, so a number from
    another one means nothing. Unset: no threshold."""
    global_head: GlobalHead | None = None
    """A global descriptor besides the local ones; it needs stage `tuning` or `joint`."""

    @model_validator(mode="after")
    def _check(self) -> "DelfConfig":
        if self.reduction.name == "autoencoder" and self.stage == "tuning":
            raise ValueError(
                "'reduction: autoencoder' is trained with the attention: 'stage' is attention or joint"
            )
        if not self.crop.square:
            raise ValueError("'crop' makes squares: 'crop.resize' is squash or short_side")
        if self.image.resize == "short_side" or self.image.shapes == "pad":
            raise ValueError("'image' is described whole: 'image.resize' is long_side, without 'shapes: pad'")
        try:
            channels, _ = stage_channels(self.backbone.name)
        except RecipeError as error:
            raise ValueError(f"'backbone.name': {error.problem}: {error.mend}") from None
        if self.dimension > channels:
            name = self.backbone.name
            raise ValueError(
                f"'dimension' is at most {channels}, the channels of {name}, got {self.dimension}"
            )
        return self

    @property
    def needs_start(self) -> bool:
        return self.stage == "attention" and self.global_head is not None

    @property
    def training_image(self) -> Preprocessing:
        return self.crop

    @property
    def form(self) -> Form:
        head = self.global_head
        return Form(DescriptorKind.LOCAL, self.dimension, head.dimension if head else 0)

    def check_described(self) -> None:
        if self.stage == "tuning":
            raise RecipeError(
                "a network that is only tuned does not know which features to take",
                where="method.stage",
                mend="set it to joint, or to attention after a stage of tuning; `train` alone leaves a tuned "
                "one",
            )


class Level(NamedTuple):
    """What a network makes of images at one scale."""

    descriptors: Tensor
    """float [n, dimension, h, w], of length 1, one for each cell."""
    scores: Tensor
    """float [n, h, w]."""
    vectors: Tensor | None
    """float [n, g]: global descriptors of length 1, where the model makes any."""


class Delf(Method):
    """A backbone, scores for its features, and the classifiers that teach both."""

    backbones = ("backbone", "above")
    config: DelfConfig

    def __init__(self, config: DelfConfig, *, classes: int, pretrained: bool = True) -> None:
        super().__init__(config, classes=classes, pretrained=pretrained)
        stages = build_stages(config.backbone, stride=config.stride, pretrained=pretrained)
        channels, top = stages.channels_below, stages.channels_above
        self.backbone, head = stages.below, config.global_head
        tuned, attended = config.stage != "attention", config.stage != "tuning"
        self.above = stages.above if tuned or head else None
        self.global_pooling = GlobalPooling("gem", p=head.p) if head else None
        self.global_projection = nn.Linear(top, head.dimension) if head else None
        self.classifier: nn.Module | None = None
        if tuned:
            self.classifier = CosineClassifier(head.dimension, classes) if head else nn.Linear(top, classes)
        self.attention = Attention(channels, config.hidden) if attended else None
        self.attention_classifier = nn.Linear(channels, classes) if attended else None
        coded = attended and config.reduction.name == "autoencoder"
        self.autoencoder = Autoencoder(channels, config.dimension) if coded else None
        self.components: Tensor
        self.centre: Tensor
        self.threshold: Tensor
        self.register_buffer("components", torch.eye(config.dimension, channels))
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("threshold", torch.tensor(float("-inf")))
        self.field = receptive_field(self.backbone)
        self._images = 0
        for part in self._frozen():
            part.requires_grad_(requires_grad=False)

    def _frozen(self) -> list[nn.Module]:
        """What the stage leaves as it is."""
        if self.config.stage != "attention":
            return []
        parts = [self.backbone, self.above, self.global_pooling, self.global_projection]
        return [part for part in parts if part is not None]

    def train(self, mode: bool = True) -> "Delf":
        """Training mode, but for what is frozen: the statistics of its batch normalisation stay too."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    # Training

    def forward(self, images: Tensor) -> Outputs:
        """What the stage has of the classifiers' outputs.

        Args:
            images: uint8 [n, 3, h, w].

        Returns:
            `logits` [n, classes] of the tuned classifier, `attention_logits` [n, classes], `rebuilding`.
        """
        return self._classified(self._features(self.normalised(images)))

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(images)
        return features

    def _classified(self, features: Tensor) -> Outputs:
        outputs: Outputs = {}
        if self.classifier is not None:
            outputs["logits"] = _widely(self.classifier, self._global(features))
        if self.attention_classifier is not None:
            # The scores learn from what the backbone gives, and do not change it.
            fixed = features.detach()
            rebuilt = self._rebuilt(fixed)
            pooled = self._attended(fixed, rebuilt)
            outputs["attention_logits"] = _widely(self.attention_classifier, pooled)
            if self.autoencoder is not None:
                outputs["rebuilding"] = reconstruction_losses(fixed, rebuilt)
        return outputs

    def _rebuilt(self, features: Tensor) -> Tensor:
        """What the classifier of the attention sees of each feature: what its code is enough to say."""
        if self.autoencoder is None:
            return features
        rebuilt: Tensor = self.autoencoder(features)
        return rebuilt

    def _attended(self, features: Tensor, shown: Tensor) -> Tensor:
        """The features that are shown, pooled by the scores of the features: [n, channels]."""
        assert self.attention is not None
        normalised = self.config.normalised_scores
        return attentive_pooling(shown, self.attention(features), normalised_scores=normalised)

    def _global(self, features: Tensor) -> Tensor:
        """What the tuned classifier sees of conv4's map: [n, width]."""
        assert self.above is not None
        top = self.above(features)
        if self.global_pooling is None or self.global_projection is None:
            return wide(top).mean(dim=(2, 3))
        return _widely(self.global_projection, self.global_pooling(top))

    def started_from(self, lacking: list[str]) -> None:
        """Raise ModelError for a start that lacks what this stage leaves as it is."""
        names = [name for name in lacking if name.startswith(_OF_THE_HEAD)]
        if self.config.stage == "attention" and names:
            raise ModelError(
                f"its global head, which stage attention leaves as it is, lacks {', '.join(names[:3])}",
                where="train.start",
                mend="start from a model that was tuned with the same method.global_head",
            )

    def start_training(self, table: ImageTable, device: torch.device) -> None:  # noqa: ARG002
        if table.labels.ndim == 2:
            raise DataError("DELF learns from one class an image, these have several", where=table.name)
        self._images = len(table)

    def objective(self, outputs: Outputs, batch: Batch, clock: Clock) -> dict[str, Tensor]:  # noqa: ARG002
        config, terms = self.config, {}
        if "logits" in outputs:
            terms["classes"] = batch.mean(self._losses(outputs["logits"], batch.labels))
        if "attention_logits" in outputs:
            losses = F.cross_entropy(outputs["attention_logits"], batch.labels, reduction="none")
            terms["attention"] = config.attention_weight * batch.mean(losses)
        if "rebuilding" in outputs:
            terms["autoencoder"] = config.autoencoder_weight * batch.mean(outputs["rebuilding"])
        return terms

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        head = self.config.global_head
        if head is None:
            return F.cross_entropy(logits, labels, reduction="none")
        return arcface_losses(logits, labels, margin=head.margin, scale=head.scale)

    # What validation looks at

    def compared(self, images: Tensor) -> Tensor:
        """Unit vectors [n, d] of images uint8 [n, 3, h, w]: what the classifier that the stage trains sees.

        Where a stage trains both, that of the attention; with a global head the global descriptor, which
        makes the shortlists.
        """
        features = self._features(self.normalised(images))
        if self._by_attention:
            return l2_normalised(self._attended(features, self._rebuilt(features)))
        return l2_normalised(self._global(features))

    def class_probabilities(self, images: Tensor) -> Tensor:
        """[n, classes], of images uint8 [n, 3, h, w], by the classifier that `compared` looks at."""
        outputs = self._classified(self._features(self.normalised(images)))
        if self._by_attention:
            return outputs["attention_logits"].softmax(dim=1)
        head = self.config.global_head
        return (outputs["logits"] * (head.scale if head else 1.0)).softmax(dim=1)

    @property
    def _by_attention(self) -> bool:
        return self.attention is not None and (self.classifier is None or self.config.global_head is None)

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """`attention`: the images, uint8 [n, 3, h, w], brightest where their scores are highest."""
        if self.attention is None:
            return {}
        scores = self.attention(self._features(self.normalised(images)))
        maps = F.interpolate(wide(scores)[:, None], size=images.shape[2:], mode="bilinear")
        low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
        shown = (maps - low) / (high - low).clamp(min=1e-12)
        return {"attention": (images * (0.25 + 0.75 * shown)).round().to(torch.uint8)}

    # Descriptors

    def describe(self, images: Tensor) -> Local:
        """Sets of features of images uint8 [n, 3, h, w]; locations and sizes are in these images' pixels."""
        gathered: dict[float, list[Tensor]] = {scale: [] for scale in sorted(self.global_scales)}
        found = self._found(images, self._project, threshold=float(self.threshold), gathered=gathered)

        def whole() -> Tensor:
            return l2_normalised(self._global(self._features(self.normalised(images))))

        return self._local(images, found, gathered, whole)

    def describe_by(self, images: Tensor, level: Callable[[Tensor], Level]) -> Local:
        """What `describe` gives, where something else computes what the network does.

        Args:
            images: float32 [n, 3, h, w], values from 0 to 255.
            level: from such images at one scale to what `level` makes of them once they are normalised.
        """
        gathered: dict[float, list[Tensor]] = {scale: [] for scale in sorted(self.global_scales)}
        scores: list[Tensor] = []

        def look(resized: Tensor, scale: float) -> Tensor:
            made = level(resized)
            scores.append(made.scores)
            if scale in gathered and made.vectors is not None:
                gathered[scale].append(made.vectors)
            return made.descriptors

        def whole() -> Tensor:
            vectors = level(images).vectors
            assert vectors is not None
            return vectors

        pyramid = Pyramid(self.config.pyramid, self.field, self.config.dimension)
        found = pyramid.extract(
            images, look, lambda _map: scores.pop(), _unchanged, threshold=float(self.threshold)
        )
        return self._local(images, found, gathered, whole)

    def check_described(self) -> None:
        """Raise ModelError where there are no scores to choose features by."""
        if self.attention is None:
            raise ModelError(
                "a network that was only tuned does not know which features to take",
                where="method.stage",
                mend="train the stage attention from it, or the stage joint",
            )

    def level(self, images: Tensor) -> Level:
        """What the network makes of images at one scale, float [n, 3, h, w] and normalised."""
        assert self.attention is not None
        features = self._features(images)
        units = l2_normalised(features, dim=1).movedim(1, -1)
        vectors = None if self.global_projection is None else l2_normalised(self._global(features))
        return Level(l2_normalised(self._project(units)).movedim(-1, 1), self.attention(features), vectors)

    @property
    def least_side(self) -> int:
        """Of the images that the network gets: from which on maps have cells that can be told apart."""
        parts = [self.backbone] if self.global_projection is None else [self.backbone, self.above]
        network = nn.Sequential(*(part for part in parts if part is not None))
        return max(self.config.pyramid.min_side, side_for_cells(network, 2))

    def _local(
        self,
        images: Tensor,
        found: list[Found],
        gathered: dict[float, list[Tensor]],
        whole: Callable[[], Tensor],
    ) -> Local:
        height, width = images.shape[2:]
        counts = [len(one.scores) for one in found]
        return Local(
            np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)]),
            _joined([one.descriptors for one in found]).astype(np.float16),
            _joined([one.locations for one in found]),
            _joined([one.scales for one in found]),
            _joined([one.scores for one in found]),
            np.tile(np.array([width, height], np.int32), (len(found), 1)),
            self._combined(len(images), gathered, whole),
        )

    def _found(
        self,
        images: Tensor,
        project: Callable[[Tensor], Tensor],
        *,
        threshold: float = float("-inf"),
        gathered: dict[float, list[Tensor]] | None = None,
    ) -> list[Found]:
        """Features of each image.

        Args:
            images: uint8 [n, 3, h, w].
            project: as for `Pyramid.extract`.
            threshold: the least score.
            gathered: by the scales that count, global descriptors of runs of the images are added to it.
        """
        self.check_described()
        assert self.attention is not None

        def look(resized: Tensor, scale: float) -> Tensor:
            features = self._features(resized)
            if gathered is not None and scale in gathered:
                gathered[scale].append(l2_normalised(self._global(features)))
            return features

        pyramid = Pyramid(self.config.pyramid, self.field, self.centre.shape[0])
        return pyramid.extract(self.normalised(images), look, self.attention, project, threshold=threshold)

    def _combined(
        self, count: int, gathered: dict[float, list[Tensor]], whole: Callable[[], Tensor]
    ) -> npt.NDArray[np.float32]:
        """Global descriptors of all scales as one, float32 [n, g]; g is 0 without a global head.

        Args:
            count: images.
            gathered: by scales, descriptors of runs of the images.
            whole: makes those of the images as they are, which are too small for the pyramid.
        """
        if self.global_projection is None:
            return np.zeros((count, 0), np.float32)
        scales = [torch.cat(parts) for parts in gathered.values() if parts] or [whole()]
        return _array(l2_normalised(torch.stack(scales).mean(dim=0)))

    @property
    def global_scales(self) -> set[float]:
        """The scales of the pyramid that the global descriptor is made at."""
        head = self.config.global_head
        known = self.config.pyramid.scales
        return {min(known, key=lambda one: abs(one - scale)) for scale in head.scales} if head else set()

    def _project(self, features: Tensor) -> Tensor:
        """Descriptors, of any length, of features of length 1: [m, channels] to [m, dimension]."""
        if self.autoencoder is not None:
            return self.autoencoder.code(features)
        return (features - self.centre) @ self.components.T

    def after_training(self, encode: Encode) -> None:
        """Learn the principal components, and the threshold, of the features that are chosen.

        Raises:
            DataError: if no feature of the training images is.
        """
        if self.attention is None:
            return
        rng = np.random.default_rng(_SEED)
        rows = np.sort(rng.permutation(self._images)[: self.config.reduction.images]).astype(np.int64)
        self.threshold.fill_(float("-inf"))
        if self.autoencoder is None:
            self._learn_components(rows, encode)
        if self.config.keep_share is not None:
            scores = encode(rows, self._scores)["scores"].double().cpu().numpy()
            chosen = scores[np.isfinite(scores)]
            if not len(chosen):
                raise DataError(_NO_FEATURES)
            self.threshold.fill_(float(np.quantile(chosen, 1 - self.config.keep_share)))

    def _learn_components(self, rows: Rows, encode: Encode) -> None:
        def features(images: Tensor) -> Tensor:
            return torch.cat([one.descriptors for one in self._found(images, _unchanged)])

        statistics = statistics_of(encode, rows, features)
        if statistics.vectors < 2:
            raise DataError(_NO_FEATURES)
        shrinkage = 1.0 if self.config.reduction.whiten else 0.0
        mean, projection = pca(statistics, self.config.dimension, shrinkage=shrinkage)
        self.centre.copy_(torch.from_numpy(mean))
        self.components.copy_(torch.from_numpy(projection))

    def _scores(self, images: Tensor) -> Outputs:
        """The scores of the chosen features, [n, most], infinite where there are fewer."""
        found = self._found(images, _unchanged)
        most = self.config.pyramid.max_features
        filled = torch.full((len(found), most), float("inf"), device=images.device)
        for row, one in zip(filled, found, strict=True):
            row[: len(one.scores)] = one.scores
        return {"scores": filled}


def _widely(layer: nn.Module, values: Tensor) -> Tensor:
    """A layer in float32 or wider whatever autocast says: of many classes, logits are near each other."""
    with torch.autocast(values.device.type, enabled=False):
        found: Tensor = layer(wide(values))
    return found


def _unchanged(features: Tensor) -> Tensor:
    return features


def _joined(parts: list[Tensor]) -> npt.NDArray[np.float32]:
    return _array(torch.cat(parts))


def _array(values: Tensor) -> npt.NDArray[np.float32]:
    return values.detach().float().cpu().numpy()
