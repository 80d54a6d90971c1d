"""Which pixels a cell of a feature map sees, and where in the image it is, derived from the layers.

Along either axis cell i of a map sees `size` pixels, the first of which is number `stride · i − padding`; its
centre is at `stride · i + (size − 1) / 2 − padding`, where 0 is the centre of the image's first pixel.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_retrieval.errors import ModelError


@dataclass(frozen=True)
class ReceptiveField:
    """Of the cells of a map, in pixels of the network's input; the same along both axes.

    Attributes:
        size: pixels that a cell sees.
        stride: pixels from a cell to the next.
        padding: pixels beyond the image's border that the first cell sees.
    """

    size: int = 1
    stride: int = 1
    padding: int = 0

    @property
    def offset(self) -> float:
        """Where the centre of the first cell is, in pixels; 0 is the centre of the first pixel."""
        return (self.size - 1) / 2 - self.padding

    def boxes(self, height: int, width: int, *, device: torch.device | None = None) -> Tensor:
        """What the cells of a map see, row by row: float32 [height · width, 4] of left, top, right, bottom.

        In pixels, from border to border: each box is `size` wide and high, and may reach beyond the image.
        """
        corners = self.stride * _cells(height, width, device) - self.padding - 0.5
        return torch.cat([corners, corners + self.size], dim=1)

    def then(self, window: int, stride: int, padding: int) -> "ReceptiveField":
        """That of a layer behind: each of its cells takes `window` of these, `stride` apart."""
        return ReceptiveField(
            self.size + (window - 1) * self.stride, self.stride * stride, self.padding + padding * self.stride
        )


def receptive_field(module: nn.Module) -> ReceptiveField:
    """The receptive field of a network's map.

    Args:
        module: convolutions, poolings and what works at each place alone, in sequences, residual blocks of
            torchvision's ResNets and inverted residuals of its MobileNets. Branches that are added together
            see what any of them sees.

    Raises:
        ModelError: for other modules, and those whose two axes differ.

    Reference: Araujo et al., Computing Receptive Fields of Convolutional Neural Networks, Distill 2019. For
    torchvision's ResNet-50 up to layer3: 267 pixels, stride 16, padding 133.
    """
    return _behind(ReceptiveField(), module)


def locations(
    height: int,
    width: int,
    field: ReceptiveField,
    ratio_x: float,
    ratio_y: float,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Where the cells of a map are in the image before it was resized.

    Args:
        height: of the map, in cells.
        width: of the map, in cells.
        field: of its cells, in pixels of the resized image.
        ratio_x: width of the resized image / width of the image.
        ratio_y: likewise of the heights.
        device: of the result.

    Returns:
        float32 [height · width, 2], row by row: x and y in pixels of the image, (0, 0) the centre of its
        first. The centre c of a pixel of the resized image is at (c + 0.5) / ratio − 0.5.
    """
    ratios = torch.tensor([ratio_x, ratio_y], dtype=torch.float64, device=device)
    centres = field.stride * _cells(height, width, device).double() + field.offset
    return ((centres + 0.5) / ratios - 0.5).float()


def _cells(height: int, width: int, device: torch.device | None) -> Tensor:
    """float32 [height · width, 2]: column and row of each cell, row by row."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([columns, rows], dim=-1).reshape(-1, 2).float()


_POINTWISE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout, nn.Softplus)


def _behind(field: ReceptiveField, module: nn.Module) -> ReceptiveField:
    """That of a module which works on a map of this receptive field."""
    if isinstance(module, _POINTWISE):
        return field
    if isinstance(module, nn.Sequential):
        return _behind_all(field, module)
    if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        dilation = _side(module, "dilation") if hasattr(module, "dilation") else 1
        window = dilation * (_side(module, "kernel_size") - 1) + 1
        return field.then(window, _side(module, "stride"), _side(module, "padding"))
    return _behind_block(field, module)


def _behind_block(field: ReceptiveField, module: nn.Module) -> ReceptiveField:
    from torchvision.models.mobilenetv2 import InvertedResidual  # see `layers.backbones`
    from torchvision.models.resnet import BasicBlock, Bottleneck

    if isinstance(module, BasicBlock | Bottleneck):
        last = [module.conv3] if isinstance(module, Bottleneck) else []
        inner = _behind_all(field, [module.conv1, module.conv2, *last])
        return _united(inner, _behind(field, module.downsample or nn.Identity()))
    if isinstance(module, InvertedResidual):
        inner = _behind(field, module.conv)
        return _united(inner, field) if module.use_res_connect else inner
    raise ModelError(f"the receptive field of {type(module).__name__} is not known")


def _behind_all(field: ReceptiveField, modules: Iterable[nn.Module]) -> ReceptiveField:
    for module in modules:
        field = _behind(field, module)
    return field


def _united(one: ReceptiveField, other: ReceptiveField) -> ReceptiveField:
    """That of the sum of two maps: from the first pixel that either sees to the last."""
    assert one.stride == other.stride, "maps that are added have the same stride"
    padding = max(one.padding, other.padding)
    size = max(one.size - one.padding, other.size - other.padding) + padding
    return ReceptiveField(size, one.stride, padding)


def _side(module: nn.Module, name: str) -> int:
    """A setting of a layer that is the same along both axes."""
    value = getattr(module, name)
    sides = set(value) if isinstance(value, tuple) else {value}
    if len(sides) != 1 or not isinstance(value, int | tuple):
        raise ModelError(f"{name} {value} of {type(module).__name__} is not the same number along both axes")
    return int(sides.pop())
