"""Local features of images: those cells of maps at several scales that a network attends to most.

Images of one shape go through the network together, at each scale as large as they are there: nothing is
padded.
"""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ray_retrieval.config import Config
from ray_retrieval.layers.pooling import l2_normalised
from ray_retrieval.layers.receptive_field import ReceptiveField, locations

_PIXELS = 1 << 22
"""Of images that go through the network together: of a ResNet-50 in float32, activations take about 1 GB."""
_BYTES = 1024
"""Of a GPU's free memory for each pixel more: four times what activations take."""


class PyramidConfig(Config):
    """At which scales local features are looked for, and which are taken."""

    scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = Field(
        default=tuple(2 ** (step / 2) for step in range(-4, 3)), min_length=1
    )
    """Factors by which an image is resized before it goes through the network."""
    max_features: int = Field(default=1000, ge=1)
    """Features an image at most: those of the highest scores."""
    threshold: float | None = None
    """The least score of a feature. Scores have no unit, so it fits one model alone. Unset: any score."""
    nms_iou: float | None = Field(default=None, gt=0, lt=1)
    """Leave out cells whose receptive field overlaps that of a better one at the same scale by more than this
    share of what both cover. Those of scales that differ by √2 overlap by 0.5 at most. Unset: none."""
    min_side: int = Field(default=10, ge=8)
    """Scales at which the shorter side of an image has fewer pixels are left out."""


class Found(NamedTuple):
    """The local features of one image, those of the highest score first; there may be none.

    Of equal scores the first is the one at the scale that the configuration names first, then the one that
    comes first row by row.
    """

    descriptors: Tensor
    """float32 [k, d], of length 1."""
    locations: Tensor
    """float32 [k, 2]: x and y in pixels of the image as it was given; (0, 0) is the centre of its first."""
    scales: Tensor
    """float32 [k]: the factors by which the image was resized."""
    scores: Tensor
    """float32 [k]."""


class _Candidates(NamedTuple):
    """Cells of n images, k of each, those of the highest score first; a score of −∞ stands for none."""

    features: Tensor  # [n, k, channels], as the network gave them
    locations: Tensor  # float32 [n, k, 2]
    scales: Tensor  # float32 [n, k]
    scores: Tensor  # float32 [n, k]


class Pyramid:
    """Finds the local features of images.

    Args:
        config: scales, and which features are taken.
        field: the receptive field of the backbone's cells.
        channels: of the backbone's map.
    """

    def __init__(self, config: PyramidConfig, field: ReceptiveField, channels: int) -> None:
        self.config, self.field, self.channels = config, field, channels

    def images_at_once(self, height: int, width: int, device: torch.device | None = None) -> int:
        """How many images may go through the network together without much memory, at least 1.

        Args:
            height: of the images as they go through it.
            width: likewise.
            device: where the network is; a GPU with more memory takes more.
        """
        pixels = _PIXELS
        if device is not None and device.type == "cuda":
            pixels = max(pixels, torch.cuda.mem_get_info(device)[0] // _BYTES)
        return max(1, pixels // (height * width))

    def extract(
        self,
        images: Tensor,
        backbone: Callable[[Tensor, float], Tensor],
        attention: Callable[[Tensor], Tensor],
        project: Callable[[Tensor], Tensor],
        *,
        threshold: float = -math.inf,
    ) -> list[Found]:
        """The local features of each image.

        Args:
            images: float32 [n, 3, h, w], normalised as the network takes them.
            backbone: from some of the images, [m, 3, h', w'], and their scale to a map
                [m, channels, h'', w'']. Called for each scale at which the images are not too small, in the
                configuration's order, with runs of as many images as `images_at_once` says.
            attention: from such a map to scores [n, h'', w'']. A score that is NaN makes no feature.
            project: from features of length 1, float32 [m, channels], to [m, d], of any length; called once,
                and without autocast.
            threshold: the least score of a feature, besides that of the configuration.

        Returns:
            One for each image. No more than `max_features` features an image and scale are held at a time,
            and those alone are projected.
        """
        least = max(threshold, -math.inf if self.config.threshold is None else self.config.threshold)
        height, width = images.shape[2:]
        best: _Candidates | None = None
        for scale in self.config.scales:
            sides = round(height * scale), round(width * scale)
            if min(sides) < self.config.min_side:
                continue
            ratios = sides[1] / width, sides[0] / height
            levels = []
            for some in torch.split(images, self.images_at_once(*sides, images.device)):
                features = backbone(resized(some, sides), scale)
                levels.append(self._level(features, attention(features).float(), least, scale, ratios))
            level = _Candidates(*(torch.cat(parts) for parts in zip(*levels, strict=True)))
            best = level if best is None else self._merged(best, level)
        return _found(self._none(images) if best is None else best, project)

    def _level(
        self, features: Tensor, scores: Tensor, least: float, scale: float, ratios: tuple[float, float]
    ) -> _Candidates:
        """The best cells of the maps at one scale."""
        count, _, height, width = features.shape
        flat = scores.flatten(1)
        flat = torch.where(flat >= least, flat, -math.inf)  # no NaN passes
        if self.config.nms_iou is not None:
            flat = _suppressed(flat, self.field.boxes(height, width, device=flat.device), self.config.nms_iou)
        ordered, order = flat.sort(dim=1, descending=True, stable=True)
        ordered, order = ordered[:, : self.config.max_features], order[:, : self.config.max_features]
        images = torch.arange(count, device=order.device)[:, None]
        return _Candidates(
            features.flatten(2).mT[images, order],
            locations(height, width, self.field, *ratios, device=order.device)[order],
            torch.full_like(ordered, scale),
            ordered,
        )

    def _merged(self, one: _Candidates, other: _Candidates) -> _Candidates:
        """The best of both; of equals, those of `one`."""
        joined = _Candidates(*(torch.cat(pair, dim=1) for pair in zip(one, other, strict=True)))
        order = joined.scores.argsort(dim=1, descending=True, stable=True)[:, : self.config.max_features]
        images = torch.arange(len(order), device=order.device)[:, None]
        return _Candidates(*(values[images, order] for values in joined))

    def _none(self, images: Tensor) -> _Candidates:
        """No cells of any of the images."""
        count = len(images)
        return _Candidates(
            images.new_zeros(count, 0, self.channels),
            images.new_zeros(count, 0, 2),
            images.new_zeros(count, 0),
            images.new_zeros(count, 0),
        )


def resized(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """Images at another height and width, smoothed before they are made smaller.

    Args:
        images: float [n, 3, h, w].
        sides: height and width in pixels.

    Returns:
        float [n, 3, height, width] of the same type; the images themselves where they are of these sides.
    """
    if sides == tuple(images.shape[2:]):
        return images
    return F.interpolate(images, size=sides, mode="bilinear", align_corners=False, antialias=True)


def _suppressed(scores: Tensor, boxes: Tensor, iou: float) -> Tensor:
    """Scores [n, cells] with −∞ for each cell whose box [cells, 4] overlaps that of a better one too much."""
    from torchvision.ops import batched_nms  # see `layers.backbones`

    images, cells = torch.nonzero(scores > -math.inf, as_tuple=True)
    kept = batched_nms(boxes[cells], scores[images, cells], images, iou)
    remaining = torch.full_like(scores, -math.inf)
    remaining[images[kept], cells[kept]] = scores[images[kept], cells[kept]]
    return remaining


def _found(best: _Candidates, project: Callable[[Tensor], Tensor]) -> list[Found]:
    taken = best.scores > -math.inf
    counts = taken.sum(dim=1).tolist()
    with torch.autocast(best.scores.device.type, enabled=False):
        descriptors = l2_normalised(project(l2_normalised(best.features[taken].float())))
    columns = (descriptors, best.locations[taken], best.scales[taken], best.scores[taken])
    return [Found(*rows) for rows in zip(*(torch.split(column, counts) for column in columns), strict=True)]
