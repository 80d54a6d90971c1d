"""From an image file to what a network sees: preprocessing, the same everywhere, and augmentation.

Preprocessing belongs to the model and travels with it. `prepare` works on one file and gives uint8, which is
what crosses process borders; `normalise` runs on the device.

Augmentation is split in two. `draw` takes all random numbers of a whole global batch from one generator;
`apply` is a pure function of images and draws. Each worker applies its slice of the same draws, so the result
does not depend on how many workers there are.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from ray_retrieval.config import Config
from ray_retrieval.data.decode import decode
from ray_retrieval.data.sizes import bucket, fitted, inside
from ray_retrieval.errors import DataError

_CROP_TRIES = 10  # as torchvision's RandomResizedCrop
_GREY = (0.2989, 0.587, 0.114)  # ITU-R BT.601, in torchvision's rounding


class Preprocessing(Config):
    """How an image file becomes the network's input."""

    size: int = Field(default=224, ge=1, le=4096)
    """Side of the square input, in pixels; of `long_side`, the longer side at most."""
    resize: Literal["squash", "short_side", "long_side"] = "squash"
    """`squash` makes the whole image a square; `short_side` keeps proportions, and the crop cuts the rest;
    `long_side` keeps proportions and the whole image, whose longer side becomes `size` or stays as it is
    where it is shorter: images have different sizes then, as `shapes` says."""
    shapes: Literal["exact", "buckets", "pad"] = "exact"
    """Of `long_side`. `exact`: each image has its own size, and images of equal size share a pass;
    `buckets`: it is stretched to the nearest of 19 proportions, from 1:4 over 1:1 to 4:1, so that more share
    one; its shorter side becomes at most 12 % longer or shorter than it would be, up to whole pixels, and an
    image that is still longer keeps its own proportions. `pad`: it lies in the middle of a square of the mean
    colour."""
    resize_to: int | None = Field(default=None, ge=1, le=8192)
    """Side after the resize and before the centre crop, in pixels; default `size`."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each channel in 0…1, subtracted; the default is ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel in 0…1, divided by; the default is ImageNet's."""

    @model_validator(mode="after")
    def _check(self) -> "Preprocessing":
        if self.resize_to is not None and self.resize_to < self.size:
            raise ValueError(f"'resize_to' is at least 'size' ({self.size}), got {self.resize_to}")
        if self.resize != "long_side" and self.shapes != "exact":
            raise ValueError("'shapes' is for resize: long_side, all other images are squares")
        if self.resize == "long_side" and self.resize_to is not None:
            raise ValueError("'resize_to' is for a crop, and 'long_side' keeps the whole image")
        if min(self.std) <= 0:
            raise ValueError(f"'std' is above 0, got {self.std}")
        return self

    @property
    def square(self) -> bool:
        """Whether all images come out as squares of side `size`."""
        return self.resize != "long_side" or self.shapes == "pad"


def prepare(
    data: bytes, preprocessing: Preprocessing, box: Sequence[float] | None = None
) -> npt.NDArray[np.uint8]:
    """uint8 [3, size, size], RGB: decoded, resized by an antialiased bilinear filter, cropped at the centre.

    Of `long_side`, uint8 [3, h, w] by a Lanczos filter, never enlarged but for the stretch to a bucket.

    Args:
        data: the file's bytes.
        preprocessing: how.
        box: left, top, right, bottom in pixels of the upright image: what lies outside is cut off first. With
            `long_side`, what is left is then made smaller by the factor that the whole image would be.

    Raises:
        DataError: if the bytes cannot be decoded, or nothing of the image is in the box.
    """
    side = preprocessing.resize_to or preprocessing.size
    image = decode(data, target=decode_target(preprocessing, box))
    if preprocessing.resize == "long_side":
        return _whole(image, preprocessing, box)
    if box is not None:
        image = _cut(image, box)
    width, height = side, side
    if preprocessing.resize == "short_side":
        # The long side is cut to whole pixels, as torchvision's Resize does.
        short = min(image.size)
        width, height = (int(side * length / short) for length in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left = round((width - preprocessing.size) / 2.0)
    top = round((height - preprocessing.size) / 2.0)
    pixels = np.asarray(image)[top : top + preprocessing.size, left : left + preprocessing.size]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_target(preprocessing: Preprocessing, box: Sequence[float] | None = None) -> int | None:
    """The `target` that `prepare` decodes for. A box counts in pixels of the whole image: None."""
    return None if box is not None else preprocessing.resize_to or preprocessing.size


def prepared_shape(
    size: tuple[int, int], preprocessing: Preprocessing, box: Sequence[float] | None = None
) -> tuple[int, int]:
    """Height and width of what `prepare` makes.

    Args:
        size: width and height of the upright image, decoded for `decode_target`.
        preprocessing: how it is prepared.
        box: as for `prepare`.

    Raises:
        DataError: if nothing of the image is in the box.
    """
    if preprocessing.square:
        return preprocessing.size, preprocessing.size
    width, height = _whole_size(size, preprocessing, box)
    return height, width


def _whole_size(
    size: tuple[int, int], preprocessing: Preprocessing, box: Sequence[float] | None
) -> tuple[int, int]:
    """Width and height to which the image, or what is in its box, is resized by `long_side`."""
    side = preprocessing.size
    if box is not None:
        longer = max(size)
        left, top, right, bottom = inside(box, size)
        size = (right - left, bottom - top)
        side = max(1, int(side * max(size) / longer))
    return bucket(size, side) if preprocessing.shapes == "buckets" else fitted(size, side)


def _whole(
    image: Image.Image, preprocessing: Preprocessing, box: Sequence[float] | None
) -> npt.NDArray[np.uint8]:
    """The whole image, or what is in the box, with its proportions: uint8 [3, h, w].

    A box keeps the scale of its image, as in the code of Radenović et al. since version 1.2.
    """
    size = _whole_size(image.size, preprocessing, box)
    if box is not None:
        image = _cut(image, box)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    if preprocessing.shapes == "pad":
        square = np.empty((preprocessing.size, preprocessing.size, 3), np.uint8)
        square[:] = np.rint(255 * np.array(preprocessing.mean))
        top, left = ((preprocessing.size - length) // 2 for length in pixels.shape[:2])
        square[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        pixels = square
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _cut(image: Image.Image, box: Sequence[float]) -> Image.Image:
    return image.crop(inside(box, image.size))


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """float32 [n, 3, h, w] on the images' device: (value / 255 - mean) / std.

    Args:
        images: uint8 [n, 3, h, w].
        preprocessing: gives mean and standard deviation.
    """
    std = torch.tensor(preprocessing.std, device=images.device).view(1, 3, 1, 1)
    mean = torch.tensor(preprocessing.mean, device=images.device).view(1, 3, 1, 1)
    return images.to(torch.float32).mul_(1 / (255 * std)).sub_(mean / std)


class Augmentation(Config):
    """Random changes of the training images; all are off by default."""

    crop_scale: tuple[float, float] | None = None
    """Cut a random box of this share of the area (lowest, highest) and scale it to the full size."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Lowest and highest width/height of that box."""
    random_crop: bool = False
    """Cut the box of the input's size at a random place of the central square of side `image.resize_to`,
    rather than at its centre; needs an `image.resize_to` above `image.size`."""
    pad: int = Field(default=0, ge=0)
    """Shift by up to this many pixels each way; the border is mirrored, edge pixel included."""
    flip: bool = False
    """Mirror left and right, every second time."""
    brightness: float = Field(default=0.0, ge=0.0)
    """Multiply by a factor within 1 ± this (not below 0)."""
    contrast: float = Field(default=0.0, ge=0.0)
    """Stretch around the mean grey by a factor within 1 ± this (not below 0)."""
    saturation: float = Field(default=0.0, ge=0.0)
    """Stretch around the pixel's grey by a factor within 1 ± this (not below 0)."""

    @model_validator(mode="after")
    def _check(self) -> "Augmentation":
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"'crop_scale' is lowest and highest share within 0…1, got {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"'crop_ratio' is lowest and highest ratio, got {self.crop_ratio}")
        if self.random_crop and self.crop_scale is not None:
            raise ValueError("'random_crop' and 'crop_scale' are two kinds of crops: give one")
        return self

    def source(self, preprocessing: Preprocessing) -> Preprocessing:
        """How training images are prepared: as all others, but whole where a crop is to be cut from them."""
        crops = self.random_crop or self.crop_scale is not None
        side = preprocessing.resize_to if crops else None
        return preprocessing.model_copy(update={"size": side}) if side else preprocessing


@dataclass(frozen=True)
class Draws:
    """What is done to each image of a batch, in the order of the fields.

    Attributes:
        boxes: int64 [n, 4], top, left, height, width of the crop in pixels.
        shifts: int64 [n, 2], pixels by which the window moves down and right over the cropped image.
        flips: bool [n], whether left and right change places.
        brightness: float32 [n], factors.
        contrast: float32 [n], factors.
        saturation: float32 [n], factors.
        size: side of the images, in pixels.
        output: side of what `apply` makes of them.
    """

    boxes: Tensor
    shifts: Tensor
    flips: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    size: int
    output: int

    def __len__(self) -> int:
        return len(self.flips)

    def take(self, index: Any) -> "Draws":
        """The draws of some images: a slice, a list or a tensor of positions."""
        return self._map(lambda field: field[index])

    def to(self, device: torch.device) -> "Draws":
        return self._map(lambda field: field.to(device))

    def _map(self, change: Any) -> "Draws":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **{name: change(value) for name, value in tensors.items()})


def draw(
    augmentation: Augmentation, count: int, generator: torch.Generator, size: int, output: int | None = None
) -> Draws:
    """The random numbers of a whole global batch.

    The generator advances by the same amount whatever is switched on, so that switching one thing on leaves
    the draws of the others as they were.

    Args:
        augmentation: what may happen.
        count: images in the global batch.
        generator: on the CPU; the only source of randomness.
        size: side of the images, in pixels.
        output: side of what `apply` makes of them, at most `size`; default the same.

    Raises:
        DataError: if `pad` is more than the side that comes out.
    """
    output = output or size
    if augmentation.pad > output:
        raise DataError(f"'pad' is at most the side of the images, {output}, got {augmentation.pad}")
    crops = torch.rand((count, _CROP_TRIES, 4), generator=generator, dtype=torch.float64)
    others = torch.rand((count, 6), generator=generator, dtype=torch.float64)
    reach = 2 * augmentation.pad + 1
    return Draws(
        boxes=_windows(crops, size, output)
        if augmentation.random_crop
        else _boxes(augmentation, crops, size),
        shifts=(others[:, :2] * reach).floor().long() - augmentation.pad,
        flips=(others[:, 2] < 0.5) & augmentation.flip,
        brightness=_factors(others[:, 3], augmentation.brightness),
        contrast=_factors(others[:, 4], augmentation.contrast),
        saturation=_factors(others[:, 5], augmentation.saturation),
        size=size,
        output=output,
    )


def _windows(uniform: Tensor, size: int, output: int) -> Tensor:
    """Boxes of the output's side anywhere in the image, from each image's first proposal: int64 [n, 4]."""
    corners = (uniform[:, 0, 2:] * (size - output + 1)).floor().long()
    return torch.cat([corners, torch.full_like(corners, output)], dim=1)


def _boxes(augmentation: Augmentation, uniform: Tensor, size: int) -> Tensor:
    """The first of ten proposals that fits, else the whole image, as torchvision: int64 [n, 4]."""
    count = len(uniform)
    whole = torch.tensor([0, 0, size, size]).expand(count, 4)
    if augmentation.crop_scale is None:
        return whole.clone()
    low, high = augmentation.crop_scale
    area = (low + uniform[..., 0] * (high - low)) * size * size
    log_low, log_high = (math.log(ratio) for ratio in augmentation.crop_ratio)
    ratio = torch.exp(log_low + uniform[..., 1] * (log_high - log_low))
    width = torch.sqrt(area * ratio).round().long()
    height = torch.sqrt(area / ratio).round().long()
    top = (uniform[..., 2] * (size - height + 1)).floor().long()
    left = (uniform[..., 3] * (size - width + 1)).floor().long()
    fits = (width > 0) & (width <= size) & (height > 0) & (height <= size)
    # argmax gives the first of equal maxima only by custom; ranks make it certain.
    first = torch.where(fits, torch.arange(_CROP_TRIES), _CROP_TRIES).min(dim=1).values
    chosen = first.clamp(max=_CROP_TRIES - 1).view(-1, 1, 1).expand(-1, 1, 4)
    boxes = torch.stack([top, left, height, width], dim=-1).gather(1, chosen)[:, 0]
    return torch.where((first < _CROP_TRIES).unsqueeze(1), boxes, whole)


def _factors(uniform: Tensor, reach: float) -> Tensor:
    low, high = max(0.0, 1 - reach), 1 + reach
    return (low + uniform * (high - low)).float()


def apply(images: Tensor, draws: Draws) -> Tensor:
    """uint8 [n, 3, output, output]: the images changed as drawn, on their own device.

    Crop, shift and flip are one bilinear resampling (without antialiasing, as a crop hardly shrinks); then
    brightness, contrast and saturation, each clipped to 0…255; rounded once at the end. An image whose draws
    are the identity comes back bit for bit, also among others.

    Args:
        images: uint8 [n, 3, s, s].
        draws: of the same n images and side; see `Draws.take` for a worker's share.

    Raises:
        DataError: if images and draws do not belong together.
    """
    if images.dtype != torch.uint8 or images.shape != (len(draws), 3, draws.size, draws.size):
        raise DataError(
            f"the draws are for uint8 [{len(draws)}, 3, {draws.size}, {draws.size}], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if not len(draws):
        return images
    colours = [
        (change, factors)
        for change, factors in (
            (_brighter, draws.brightness),
            (_contrasted, draws.contrast),
            (_saturated, draws.saturation),
        )
        if not torch.equal(factors, torch.ones_like(factors))
    ]
    in_place = _leaves_geometry(draws)
    if in_place and not colours:
        return images
    pixels = images.to(torch.float32)
    if not in_place:
        pixels = _resample(pixels, draws.to(images.device))
    for change, factors in colours:
        pixels = change(pixels, factors.to(images.device).view(-1, 1, 1, 1)).clamp_(0, 255)
    return pixels.round_().to(torch.uint8)


def _leaves_geometry(draws: Draws) -> bool:
    whole = torch.tensor([0, 0, draws.size, draws.size], device=draws.boxes.device)
    same = draws.size == draws.output and (draws.boxes == whole).all()
    return bool(same and not draws.shifts.any() and not draws.flips.any())


def _resample(pixels: Tensor, draws: Draws) -> Tensor:
    """One grid_sample for all three. Source positions are computed per axis, in pixels, then normalised."""
    side = draws.output
    steps = torch.arange(side, device=pixels.device)
    columns = torch.where(draws.flips.unsqueeze(1), side - 1 - steps, steps)
    x = _positions(
        _mirrored(columns + draws.shifts[:, 1:2], side), draws.boxes[:, 1:2], draws.boxes[:, 3:4], draws
    )
    y = _positions(
        _mirrored(steps + draws.shifts[:, 0:1], side), draws.boxes[:, 0:1], draws.boxes[:, 2:3], draws
    )
    grid = torch.stack([x.unsqueeze(1).expand(-1, side, -1), y.unsqueeze(2).expand(-1, -1, side)], dim=-1)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _mirrored(steps: Tensor, size: int) -> Tensor:
    """Positions beyond the border, mirrored at it; the edge pixel is repeated."""
    steps = torch.where(steps < 0, -1 - steps, steps)
    return torch.where(steps >= size, 2 * size - 1 - steps, steps)


def _positions(steps: Tensor, start: Tensor, length: Tensor, draws: Draws) -> Tensor:
    """float32 [n, output], grid_sample's -1…1: where the pixels of a box scaled to the output come from.

    Positions are kept inside the box, so that the result is that of cropping first and resizing then.
    """
    inside = ((steps + 0.5) * (length / draws.output) - 0.5).clamp(min=0.0)
    inside = torch.minimum(inside, (length - 1).to(inside.dtype))
    return (2 * (start + inside) + 1) / draws.size - 1


def _brighter(pixels: Tensor, factors: Tensor) -> Tensor:
    return pixels * factors


def _contrasted(pixels: Tensor, factors: Tensor) -> Tensor:
    mean = _grey(pixels).mean(dim=(1, 2, 3), keepdim=True)
    return pixels * factors + mean * (1 - factors)


def _saturated(pixels: Tensor, factors: Tensor) -> Tensor:
    return pixels * factors + _grey(pixels) * (1 - factors)


def _grey(pixels: Tensor) -> Tensor:
    """float32 [n, 1, s, s]."""
    red, green, blue = pixels[:, 0:1], pixels[:, 1:2], pixels[:, 2:3]
    return red * _GREY[0] + green * _GREY[1] + blue * _GREY[2]
