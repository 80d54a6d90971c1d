"""Benchmarks: what to train on and what to measure, one file per family.

    benchmark = load(DigitsConfig(), seed=0, splits=Folder("run/split"))

To add one: a file with a config (its `name` a literal) and a `load` of the same form, and a line in both
places here.
"""

from typing import Annotated, Any

from pydantic import Field

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.datasets import cifar10, digits, images
from ray_retrieval.data.datasets.cifar10 import Cifar10Config
from ray_retrieval.data.datasets.digits import DigitsConfig
from ray_retrieval.data.datasets.images import ImagesConfig
from ray_retrieval.storage import Folder

DataConfig = Annotated[DigitsConfig | Cifar10Config | ImagesConfig, Field(discriminator="name")]
"""Any benchmark's configuration, told by its `name`."""

_LOADERS: dict[str, Any] = {"digits": digits.load, "cifar10": cifar10.load, "images": images.load}


def load(config: DigitsConfig | Cifar10Config | ImagesConfig, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark that a configuration describes.

    Args:
        config: which one, and its options.
        seed: of the split, where none is saved yet.
        splits: the folder of the split: read where there is one, else drawn and saved.

    Raises:
        DataError: if images or labels are missing or not what they should be, or a saved split does not fit.
        ArtefactError: if a saved split is damaged.
    """
    benchmark: Benchmark = _LOADERS[config.name](config, seed=seed, splits=splits)
    return benchmark


__all__ = ["Cifar10Config", "DataConfig", "DigitsConfig", "ImagesConfig", "load"]
