"""The published methods. A new one is a file here and a line in `METHODS`."""

from ray_retrieval.methods.base import Method
from ray_retrieval.methods.greedyhash import GreedyHash, GreedyHashConfig

METHODS: dict[str, tuple[type[GreedyHashConfig], type[GreedyHash]]] = {
    "greedyhash": (GreedyHashConfig, GreedyHash),
}

AnyMethodConfig = GreedyHashConfig


def build(config: AnyMethodConfig, *, classes: int, pretrained: bool = True) -> Method:
    """The method that a configuration names.

    Args:
        config: of any registered method.
        classes: number of classes of the training data.
        pretrained: whether the backbone starts from the configured weights.
    """
    return METHODS[config.name][1](config, classes=classes, pretrained=pretrained)
