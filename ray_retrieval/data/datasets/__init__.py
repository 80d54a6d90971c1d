"""Benchmarks: what to train on and what to measure, one file per family.

    benchmark = load(DigitsConfig(), seed=0, splits=Folder("run/split"))

To add one: a file with a config (its `name` a literal) and a `load` of the same form, a line in both places
here, and what `survey` says about it. Class-disjoint ones need no `load`: their config says how to `read`.
"""

from typing import Annotated, Any, get_args

from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.datasets import (
    cifar10,
    coco,
    digits,
    disjoint,
    gldv2,
    imagenet100,
    images,
    landmarks,
    lists,
    mirflickr,
    nuswide,
    sfm,
    views,
    voc2012,
)
from ray_retrieval.data.datasets.cars196 import Cars196Config
from ray_retrieval.data.datasets.cifar10 import Cifar10Config
from ray_retrieval.data.datasets.coco import CocoConfig
from ray_retrieval.data.datasets.cub200 import Cub200Config
from ray_retrieval.data.datasets.digits import DigitsConfig
from ray_retrieval.data.datasets.gldv2 import Gldv2Config
from ray_retrieval.data.datasets.imagenet100 import ImageNet100Config
from ray_retrieval.data.datasets.images import ImagesConfig
from ray_retrieval.data.datasets.inshop import InShopConfig
from ray_retrieval.data.datasets.landmarks import (
    Oxford5kConfig,
    Paris6kConfig,
    ROxford5kConfig,
    RParis6kConfig,
)
from ray_retrieval.data.datasets.lists import ListsConfig
from ray_retrieval.data.datasets.mirflickr import MirFlickrConfig
from ray_retrieval.data.datasets.nuswide import NusWideConfig
from ray_retrieval.data.datasets.sfm import SfmConfig
from ray_retrieval.data.datasets.sop import SopConfig
from ray_retrieval.data.datasets.vehicleid import VehicleIdConfig
from ray_retrieval.data.datasets.views import ViewsConfig
from ray_retrieval.data.datasets.voc2012 import Voc2012Config
from ray_retrieval.storage import Folder

AnyDataConfig = (
    DigitsConfig
    | Cifar10Config
    | ImagesConfig
    | CocoConfig
    | NusWideConfig
    | ImageNet100Config
    | MirFlickrConfig
    | Voc2012Config
    | ListsConfig
    | SopConfig
    | Cub200Config
    | Cars196Config
    | InShopConfig
    | VehicleIdConfig
    | ViewsConfig
    | SfmConfig
    | Gldv2Config
    | Oxford5kConfig
    | Paris6kConfig
    | ROxford5kConfig
    | RParis6kConfig
)
DataConfig = Annotated[AnyDataConfig, Field(discriminator="name")]
"""Any benchmark's configuration, told by its `name`."""

CONFIGS: dict[str, type[Config]] = {
    kind.model_fields["name"].default: kind for kind in get_args(AnyDataConfig)
}
"""The class of each benchmark's configuration, by name."""

_LOADERS: dict[str, Any] = {
    "digits": digits.load,
    "cifar10": cifar10.load,
    "images": images.load,
    "coco": coco.load,
    "nuswide": nuswide.load,
    "imagenet100": imagenet100.load,
    "mirflickr": mirflickr.load,
    "voc2012": voc2012.load,
    "lists": lists.load,
    "views": views.load,
    "sfm": sfm.load,
    "gldv2": gldv2.load,
    **dict.fromkeys(landmarks.PUBLISHED, landmarks.load),
    **dict.fromkeys(("sop", "cub200", "cars196", "inshop", "vehicleid"), disjoint.load),
}


def load(config: AnyDataConfig, *, seed: int, splits: Folder) -> Benchmark:
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
