"""From a map of features to one vector: global maximum, average, or generalised mean.

Also what descriptors need around it: borders for small images, unit length, several scales as one.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_retrieval.errors import RecipeError

PoolingName = Literal["max", "average", "gem"]
GlobalPoolingName = Literal["max", "average", "gem", "gemmp"]

EPSILON = 1e-6  # features below it count as it: the root of a mean of zeros has no finite gradient


class GlobalPooling(nn.Module):
    """Pools float [n, channels, h, w] to [n, channels].

    Args:
        kind: `max` (MAC), `average` (SPoC), `gem`: (mean of x^p)^(1/p), which is the average for p = 1 and
            nears the maximum as p grows, p is learnt; or `gemmp`: the same with one p a channel.
        p: where the exponent starts. Below 1 it counts as 1, and has no gradient any more.
        channels: how many the map has; `gemmp` alone needs it.

    Raises:
        RecipeError: `gemmp` without `channels`, or p below 1.

    Reference: Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2018, eq. 3.
    """

    def __init__(self, kind: GlobalPoolingName, *, p: float = 3.0, channels: int | None = None) -> None:
        super().__init__()
        self.kind = kind
        if p < 1:
            raise RecipeError(f"the exponent of generalised-mean pooling is 1 or more, found {p}", where="p")
        if kind == "gem":
            self.p = nn.Parameter(torch.tensor([p]))
        elif kind == "gemmp":
            if channels is None:
                raise RecipeError(
                    "gemmp has one exponent a channel, and the number of channels is not given",
                    where="pooling",
                    mend="choose gem, whose one exponent serves all channels",
                )
            self.p = nn.Parameter(torch.full((channels,), p))

    def forward(self, features: Tensor) -> Tensor:
        if self.kind == "max":
            return features.amax(dim=(2, 3))
        if self.kind == "average":
            return features.mean(dim=(2, 3))
        return generalised_mean(features, self.exponent)

    @property
    def exponent(self) -> Tensor:
        """What `gem` and `gemmp` raise to: p, at least 1. [1] or [channels]."""
        return self.p.clamp(min=1)


class SuperGlobalPooling(nn.Module):
    """Pools float [n, channels, h, w] to [n, channels] when a network that was trained with GeM describes.

    Three steps, none with anything to learn: features below `floor` are set to it (ReLUP); each feature
    becomes the mean of itself and of the generalised mean with exponent `regional_p` of the
    `window` × `window` features around it, the map mirrored at its borders (regional GeM); a generalised mean
    with exponent `p` (GeM+). A side too short to be mirrored by half a window has a shorter window: three
    features for a side of two, one for a side of one.

    Reference: Shao et al., Global Features are All You Need for Image Retrieval and Reranking, ICCV 2023. In
    the authors' code the floor is within the ResNet, in the blocks before the last stage, and the last map
    has none: that takes a network of its own, this one goes with any.
    """

    def __init__(
        self, *, floor: float = 0.014, window: int = 5, regional_p: float = 2.5, p: float = 4.6
    ) -> None:
        super().__init__()
        if window < 1 or window % 2 == 0:
            raise RecipeError(f"the window of regional GeM has an odd side, found {window}", where="window")
        self.floor, self.window, self.regional_p, self.p = floor, window, regional_p, p

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            raised = wide(features).clamp(min=max(self.floor, EPSILON))
            smoothed = (raised + self._regional(raised)) / 2
        return generalised_mean(smoothed, self.p)

    def _regional(self, features: Tensor) -> Tensor:
        """The generalised mean of the window around each feature, shape kept."""
        half_h, half_w = (min(self.window // 2, side - 1) for side in features.shape[2:])
        mirrored = F.pad(features.pow(self.regional_p), (half_w, half_w, half_h, half_h), mode="reflect")
        means = F.avg_pool2d(mirrored, (2 * half_h + 1, 2 * half_w + 1), stride=1)
        return means.pow(1 / self.regional_p)


def generalised_mean(features: Tensor, p: Tensor | float) -> Tensor:
    """(mean over the map of x^p)^(1/p) of float [n, channels, h, w], as [n, channels] in float32 or wider.

    Features below 1e-6 count as 1e-6. Each channel is divided by its maximum before and multiplied by it
    after, which changes neither value nor gradient: x^p neither overflows nor vanishes, however large p is.

    Args:
        features: the maps, of any float type.
        p: the exponent, above 0: a number, or a tensor [1] or [channels] that the gradient reaches.
    """
    with torch.autocast(features.device.type, enabled=False):
        clamped = wide(features).clamp(min=EPSILON)
        peaks = clamped.detach().amax(dim=(2, 3))
        each = p[:, None, None] if isinstance(p, Tensor) else p
        return peaks * (clamped / peaks[:, :, None, None]).pow(each).mean(dim=(2, 3)).pow(1 / p)


def wide(values: Tensor) -> Tensor:
    """The values [...] in float32 or wider: lengths, powers and losses are not computed in 16 bits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def l2_normalised(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors [..., d, ...] divided by (their length + 1e-6) along `dim`, as float32 or wider.

    One of zeros stays so.
    """
    vectors = wide(vectors)
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / (lengths + EPSILON)


def padded_to(images: Tensor, side: int) -> Tensor:
    """Images whose height or width is below `side`, with their borders repeated evenly up to it.

    Where the missing pixels are odd in number, the bottom or the right gets one more.

    Args:
        images: float [n, 3, h, w].
        side: of the least image that a network takes, in pixels.

    Returns:
        Float [n, 3, max(h, side), max(w, side)]; `images` itself where nothing is missing.
    """
    lacking_h, lacking_w = (max(0, side - length) for length in images.shape[2:])
    if not lacking_h and not lacking_w:
        return images
    left, top = lacking_w // 2, lacking_h // 2
    return F.pad(images, (left, lacking_w - left, top, lacking_h - top), mode="replicate")


def combine_scales(
    descriptors: Tensor, kind: Literal["mean", "max"] = "mean", *, p: Tensor | float = 1.0
) -> Tensor:
    """One unit vector an image from its descriptors at several scales.

    Args:
        descriptors: float [scales, n, d], unit vectors.
        kind: `mean`: (mean over scales of v^p)^(1/p); `max`: the largest value at each dimension.
        p: the exponent of `mean`. Other values than 1 need entries that are not negative: the learnt exponent
            of GeM where nothing follows the pooling (power of a negative entry: NaN).

    Returns:
        float [n, d], in float32 or wider, divided by their lengths.

    Reference: Radenović et al. 2018, §3.5 (mean); Shao et al. 2023 (max).
    """
    descriptors = wide(descriptors)
    if kind == "max":
        return l2_normalised(descriptors.amax(dim=0))
    if not isinstance(p, Tensor) and p == 1:
        return l2_normalised(descriptors.mean(dim=0))
    return l2_normalised(descriptors.pow(p).mean(dim=0).pow(1 / p))
