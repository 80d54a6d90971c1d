"""The published methods. A new one is a file here, a line in `METHODS` and a place in `AnyMethodConfig`."""

from typing import Annotated

from pydantic import Field

from ray_retrieval.methods.base import Method, MethodConfig
from ray_retrieval.methods.delf import Delf, DelfConfig
from ray_retrieval.methods.gem import Gem, GemConfig
from ray_retrieval.methods.greedyhash import GreedyHash, GreedyHashConfig
from ray_retrieval.methods.greedyhash_unsupervised import (
    GreedyHashUnsupervised,
    GreedyHashUnsupervisedConfig,
)
from ray_retrieval.methods.hashnet import HashNet, HashNetConfig
from ray_retrieval.methods.xbm import Xbm, XbmConfig

METHODS: dict[str, tuple[type[MethodConfig], type[Method]]] = {
    "greedyhash": (GreedyHashConfig, GreedyHash),
    "greedyhash_unsupervised": (GreedyHashUnsupervisedConfig, GreedyHashUnsupervised),
    "hashnet": (HashNetConfig, HashNet),
    "xbm": (XbmConfig, Xbm),
    "gem": (GemConfig, Gem),
    "delf": (DelfConfig, Delf),
}

AnyMethodConfig = Annotated[
    GreedyHashConfig | GreedyHashUnsupervisedConfig | HashNetConfig | XbmConfig | GemConfig | DelfConfig,
    Field(discriminator="name"),
]
"""The configurations that a recipe may give, told apart by `name`."""


def build(config: MethodConfig, *, classes: int, pretrained: bool = True) -> Method:
    """The method that a configuration names.

    Args:
        config: of any registered method.
        classes: number of classes of the training data.
        pretrained: whether the backbone starts from the configured weights.
    """
    return METHODS[config.name][1](config, classes=classes, pretrained=pretrained)
