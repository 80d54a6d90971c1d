"""Convolutional backbones that turn images into feature vectors.

torchvision is imported where a network of its is made: that takes a second, and not all processes make one.
"""

import bisect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.error import URLError

import safetensors.torch
import torch
from torch import Tensor, nn

from ray_retrieval.config import Config
from ray_retrieval.errors import ModelError, RecipeError
from ray_retrieval.storage import Folder, split_query

BackboneName = Literal[
    "small", "alexnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2", "vgg16"
]


class BackboneConfig(Config):
    """Which network makes the features, and what it starts from."""

    name: BackboneName = "alexnet"
    """The architecture; all but `small` are torchvision's."""
    weights: str = "imagenet"
    """`none` (random), `imagenet` (torchvision's IMAGENET1K_V1, downloaded once) or the path or URI of a
    state dictionary (.pth, .pt or .safetensors) of the torchvision model of that name."""


_CHANNELS: dict[BackboneName, int] = {
    "small": 128,
    "alexnet": 256,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "resnet152": 2048,
    "mobilenet_v2": 1280,
    "vgg16": 512,
}


# Where `build_stages` cuts the layers of a feature map, and the channels there.
_CUTS: dict[BackboneName, tuple[int, int]] = {
    "small": (14, 64),
    "resnet18": (7, 256),
    "resnet34": (7, 256),
    "resnet50": (7, 1024),
    "resnet101": (7, 1024),
    "resnet152": (7, 1024),
    "mobilenet_v2": (14, 96),
}


# Below it, a pooling on the way has nothing left to pool. ResNet and MobileNet pad each of their layers.
_LEAST_SIDES: dict[BackboneName, int] = {"small": 8, "alexnet": 31, "vgg16": 16}


def map_channels(name: BackboneName) -> int:
    """Channels of the map that `build_feature_map` makes, told without building the network."""
    return _CHANNELS[name]


def least_side(name: BackboneName) -> int:
    """Pixels that each side of an image needs for `build_feature_map`'s map to be at least 1 × 1."""
    return _LEAST_SIDES.get(name, 1)


def side_for_cells(network: nn.Module, cells: int) -> int:
    """The least side of squares of which a network makes a map of at least `cells` × `cells`.

    Args:
        network: from images float [n, 3, h, w] to a map [n, channels, h', w'], in evaluation mode; a larger
            image has no smaller map.
        cells: at least 1.
    """
    parameter = next(network.parameters())

    def enough(side: int) -> bool:
        try:
            with torch.inference_mode():
                made = network(parameter.new_zeros(1, 3, side, side))
        except RuntimeError:  # of a pooling that has nothing left to pool
            return False
        return bool(min(made.shape[2:]) >= cells)

    high = 1
    while not enough(high):
        high *= 2
    return bisect.bisect_left(range(high), True, lo=high // 2, key=enough)


class SmallNet(nn.Sequential):
    """Three stages of two 3×3 convolutions for small pictures of simple things; features of width 128."""

    width = 128

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, self.width):
            for _ in range(2):
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_backbone(config: BackboneConfig, *, pretrained: bool = True) -> tuple[nn.Module, int]:
    """A backbone and the width of its features.

    The network maps float [n, 3, h, w] to float [n, width]: torchvision's classifier without its last layer
    (for AlexNet and VGG with their two fully connected layers, as the hashing papers use them).

    Args:
        config: architecture and weights.
        pretrained: False leaves the weights random whatever `config.weights` says, for a model whose own
            weights are loaded next.

    Raises:
        ModelError: if weights are missing, cannot be fetched, or do not fit.
    """
    if config.name == "small":
        small = SmallNet()
        if pretrained and config.weights != "none":
            if config.weights == "imagenet":
                raise ModelError("the small backbone has no ImageNet weights", mend="set weights to none")
            _load(small, _read_weights(config.weights), where=config.weights, replaced="")
        return small, SmallNet.width
    from torchvision import models

    factory: Callable[..., nn.Module] = getattr(models, config.name)
    network = factory(weights=None)
    name, last = _last_layer(network)
    if pretrained and config.weights != "none":
        if config.weights == "imagenet":
            state, where = _imagenet_weights(config.name), f"ImageNet weights of {config.name}"
        else:
            state, where = _read_weights(config.weights), config.weights
        _load(network, state, where=where, replaced=name)
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    return network, last.in_features


def build_feature_map(config: BackboneConfig, *, pretrained: bool = True) -> tuple[nn.Module, int]:
    """A backbone up to its last convolution's activation, and the number of channels.

    The network maps float [n, 3, h, w] to float [n, channels, h', w'], of images of any size from
    `least_side` on.

    Args:
        config: architecture and weights.
        pretrained: as for `build_backbone`.

    Raises:
        ModelError: if weights are missing, cannot be fetched, or do not fit.
    """
    network, width = build_backbone(config, pretrained=pretrained)
    if isinstance(network, SmallNet):
        return nn.Sequential(*list(network)[:-2]), width
    from torchvision import models

    if isinstance(network, models.ResNet):
        return nn.Sequential(*list(network.children())[:-2]), width
    features: nn.Sequential = network.features  # type: ignore[assignment]
    if isinstance(network, models.MobileNetV2):
        return features, width
    # AlexNet and VGG end in a pooling of their own, which would come before that of the method.
    channels = [layer.out_channels for layer in features if isinstance(layer, nn.Conv2d)][-1]
    return features[:-1], channels


class Stages(NamedTuple):
    """A backbone in two parts, the second of which works on the map of the first."""

    below: nn.Sequential
    """From images float [n, 3, h, w] to a map [n, channels_below, h', w']."""
    above: nn.Sequential
    """From that map to [n, channels_above, h'', w'']."""
    channels_below: int
    channels_above: int


def stage_channels(name: BackboneName) -> tuple[int, int]:
    """Channels of the two maps that `build_stages` makes, told without building the network.

    Raises:
        RecipeError: for a backbone that is not cut into stages.
    """
    if name not in _CUTS:
        raise RecipeError(
            f"{name} is not cut into stages for local features",
            where="method.backbone.name",
            mend=f"choose one of: {', '.join(_CUTS)}",
        )
    return _CUTS[name][1], map_channels(name)


def build_stages(config: BackboneConfig, *, stride: Literal[16, 32] = 16, pretrained: bool = True) -> Stages:
    """A backbone cut before its last stage, where cells are small enough for local features.

    ResNets are cut between layer3 and layer4 (conv4 and conv5), MobileNetV2 before the last layer that has a
    stride. With stride 32 every second row and column of that map is taken, and the last stage then has no
    stride of its own: its map is as large either way. The small network has strides 4 and 8 instead.

    Args:
        config: architecture and weights.
        stride: pixels from one cell of the lower map to the next.
        pretrained: as for `build_backbone`.

    Raises:
        RecipeError: for a backbone that is not cut into stages.
        ModelError: if weights are missing, cannot be fetched, or do not fit.

    Reference: the options of the DELF authors' code, `block3_strides` off and on.
    """
    channels_below, channels_above = stage_channels(config.name)
    network, _ = build_feature_map(config, pretrained=pretrained)
    layers, cut = list(network.children()), _CUTS[config.name][0]
    below, above = nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:])
    if stride == 32:
        below.append(nn.MaxPool2d(1, stride=2))
        above = _without_strides(above)
    return Stages(below, above, channels_below, channels_above)


def _without_strides(stage: nn.Sequential) -> nn.Sequential:
    """The same layers, at the same weights, that keep the size of a map."""
    for layer in stage.modules():
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
    return nn.Sequential(*(layer for layer in stage if not isinstance(layer, nn.MaxPool2d)))


def _last_layer(network: nn.Module) -> tuple[str, nn.Linear]:
    linear = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    return linear[-1]


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    from torchvision import models

    weights = models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        reason = getattr(error, "reason", error)
        file = weights.url.rpartition("/")[2]
        raise ModelError(
            f"the ImageNet weights of {name} could not be fetched ({reason})",
            mend=f"put {file} into {folder}, or set method.backbone.weights to a file",
        ) from None


def _read_weights(name: str) -> dict[str, Tensor]:
    where = Folder(name)
    if not where.is_file():
        raise ModelError("no such weights file", where=where, mend="check method.backbone.weights")
    path = where.local_path()
    try:
        state: Any
        if os.path.splitext(split_query(where.uri)[0])[1] == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load has no error of its own: a damaged file raises anything from KeyError to UnpicklingError.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"not a file of plain tensors ({reason})", where=where) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError("not a state dictionary of tensors", where=where)
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load(network: nn.Module, state: dict[str, Tensor], *, where: object, replaced: str) -> None:
    """Load weights strictly, but for the last layer, which every method replaces."""

    def kept(key: str) -> bool:
        return not (replaced and key.startswith(f"{replaced}."))

    expected = {key: value for key, value in network.state_dict().items() if kept(key)}
    given = {key: value for key, value in state.items() if kept(key)}
    counters = {key for key in expected if key.endswith("num_batches_tracked")}  # absent from old files
    faults = {
        "missing": [key for key in expected if key not in given and key not in counters],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": [
            key for key in expected if key in given and expected[key].shape != given[key].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
            for kind, keys in faults.items()
            if keys
        )
        raise ModelError(f"weights do not fit {type(network).__name__}: {listed}", where=where)
    network.load_state_dict(given, strict=False)
