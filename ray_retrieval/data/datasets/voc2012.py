"""PASCAL VOC 2012 as deep hashing uses it: 11,540 photographs, 20 labels, MAP over the whole database.

    train      4,000, not in the database
    queries    1,000
    database   6,540

The parts are DeepHash-pytorch's lists; where these are not there, they are drawn by the seed from VOC's own
`ImageSets/Main/<class>_trainval.txt`, where 1 stands for a label, and 0 for one that is difficult to see.

Reference: Everingham et al., The PASCAL Visual Object Classes Challenge 2012.
"""

from typing import Literal

import numpy as np

from ray_retrieval.data import location
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.columns import lists_of_classes
from ray_retrieval.data.datasets.lists import (
    Listed,
    ListFilesConfig,
    Protocol,
    from_parts,
    listed_or_drawn,
)
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder

TITLE = "PASCAL VOC 2012"
_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)
CLASS_NAMES = tuple(_NAMES.split())
COUNTS: dict[str, int | None] = {"train": 4_000, "queries": 1_000, "database": 6_540}


class Voc2012Config(ListFilesConfig):
    """PASCAL VOC 2012 with several labels an image."""

    name: Literal["voc2012"] = "voc2012"
    """The benchmark."""
    root: str = "data/VOCdevkit/VOC2012"
    """Folder with `JPEGImages/` and `ImageSets/Main/`."""


def load(config: Voc2012Config, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark, by the lists `train.txt`, `test.txt` and `database.txt`, or drawn by the seed.

    Raises:
        DataError: if lists and image sets are missing, or images are.
        ArtefactError: if the saved split is damaged.
    """
    parts, notes = listed_or_drawn(config, annotated, COUNTS, seed=seed, splits=splits, where=TITLE)
    names = CLASS_NAMES if notes else None  # lists do not say whose columns theirs are
    protocol = Protocol(TITLE, None, COUNTS, len(CLASS_NAMES), names)
    return from_parts(config, parts, protocol, seed=seed, splits=splits, notes=notes)


def annotated(root: str) -> Listed:
    """All images of `trainval` with the labels of VOC's image sets.

    Raises:
        DataError: if a file is missing or is no image set.
    """
    columns = []
    numbers: list[str] = []
    for name in CLASS_NAMES:
        file = location.join(location.expand(root), f"ImageSets/Main/{name}_trainval.txt")
        if not location.exists(file):
            raise DataError(
                "neither lists nor this image set are there",
                where=file,
                mend="put train.txt, test.txt and database.txt, or VOC's own files, under data.root",
            )
        with location.open_file(file) as source:
            words = bytes(source.read()).decode("utf-8", "replace").split()
        found, marks = words[::2], words[1::2]
        if set(marks) - {"-1", "0", "1"} or (numbers and found != numbers):
            raise DataError("not an image set: lines of a number and -1, 0 or 1 are expected", where=file)
        numbers = found
        columns.append(np.array(marks) == "1")
    names = [f"JPEGImages/{number}.jpg" for number in numbers]
    return Listed(names, lists_of_classes(np.stack(columns, axis=1)), len(CLASS_NAMES))
