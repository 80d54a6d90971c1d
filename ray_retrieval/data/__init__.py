"""Images: tables, decoding, preprocessing and augmentation, splits and benchmarks.

Names are imported when they are first used: whoever decodes images needs no network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ray_retrieval.data.decode import decode  # Now, as its module has the same name.

if TYPE_CHECKING:
    from ray_retrieval.data.benchmark import Benchmark, overlap
    from ray_retrieval.data.datasets import Cifar10Config, DataConfig, DigitsConfig, ImagesConfig, load
    from ray_retrieval.data.source import ImageError, ImageSource, check_images, read_errors, write_errors
    from ray_retrieval.data.splits import Split, SplitPlan
    from ray_retrieval.data.table import ImageTable, concatenate, open_images
    from ray_retrieval.data.transforms import (
        Augmentation,
        Draws,
        Preprocessing,
        apply,
        draw,
        normalise,
        prepare,
    )

_HOMES = {
    "Augmentation": "transforms",
    "Benchmark": "benchmark",
    "Cifar10Config": "datasets",
    "DataConfig": "datasets",
    "DigitsConfig": "datasets",
    "Draws": "transforms",
    "ImageError": "source",
    "ImageSource": "source",
    "ImageTable": "table",
    "ImagesConfig": "datasets",
    "Preprocessing": "transforms",
    "Split": "splits",
    "SplitPlan": "splits",
    "apply": "transforms",
    "check_images": "source",
    "concatenate": "table",
    "draw": "transforms",
    "load": "datasets",
    "normalise": "transforms",
    "open_images": "table",
    "overlap": "benchmark",
    "prepare": "transforms",
    "read_errors": "source",
    "write_errors": "source",
}

__all__ = [
    "Augmentation",
    "Benchmark",
    "Cifar10Config",
    "DataConfig",
    "DigitsConfig",
    "Draws",
    "ImageError",
    "ImageSource",
    "ImageTable",
    "ImagesConfig",
    "Preprocessing",
    "Split",
    "SplitPlan",
    "apply",
    "check_images",
    "concatenate",
    "decode",
    "draw",
    "load",
    "normalise",
    "open_images",
    "overlap",
    "prepare",
    "read_errors",
    "write_errors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ray_retrieval.data' has no attribute {name!r}")
    return getattr(import_module(f"ray_retrieval.data.{_HOMES[name]}"), name)
