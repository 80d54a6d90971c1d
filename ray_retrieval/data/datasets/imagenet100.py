"""ImageNet-100 as deep hashing uses it: 100 classes of ILSVRC 2012, MAP@1000.

    train      13,000, 130 a class, in the database
    queries     5,000, 50 a class, from the validation images of ILSVRC
    database  128,503, the training images of ILSVRC

The lists are thuml/HashNet's (DeepHash-pytorch's are the same); the images need an account at image-net.org.

Reference: Russakovsky et al. 2015, ImageNet; Cao et al., HashNet, ICCV 2017, section 4.1.
"""

from typing import Literal

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.datasets.lists import ListFilesConfig, Protocol, from_parts, read_parts
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder

CLASSES = 100
COUNTS: dict[str, int | None] = {"train": 13_000, "queries": 5_000, "database": 128_503}


class ImageNet100Config(ListFilesConfig):
    """100 classes of ILSVRC 2012."""

    name: Literal["imagenet100"] = "imagenet100"
    """The benchmark."""
    root: str = "data/imagenet"
    """Folder with `train/` and `val/`."""


def load(config: ImageNet100Config, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark, by the lists `train.txt`, `test.txt` and `database.txt`.

    Raises:
        DataError: if lists or images are missing or not the published ones.
        ArtefactError: if the saved split is damaged.
    """
    protocol = Protocol("ImageNet-100", 1000, COUNTS)
    benchmark = from_parts(config, read_parts(config), protocol, seed=seed, splits=splits)
    if benchmark.database.classes != CLASSES:
        raise DataError(
            f"{CLASSES} classes are expected, there are {benchmark.database.classes}",
            where=config.folder,
            mend="the lists are not those of ImageNet-100",
        )
    return benchmark
