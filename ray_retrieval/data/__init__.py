"""Images: tables, decoding, preprocessing and augmentation, splits and benchmarks."""

from ray_retrieval.data.benchmark import Benchmark, overlap
from ray_retrieval.data.datasets import Cifar10Config, DataConfig, DigitsConfig, ImagesConfig, load
from ray_retrieval.data.decode import decode
from ray_retrieval.data.source import ImageError, ImageSource, check_images, read_errors, write_errors
from ray_retrieval.data.splits import Split, SplitPlan
from ray_retrieval.data.table import ImageTable, concatenate, open_images
from ray_retrieval.data.transforms import Augmentation, Draws, Preprocessing, apply, draw, normalise, prepare

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
