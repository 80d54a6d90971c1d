"""MIRFlickr-25k as deep hashing uses it: 25,000 photographs, 38 labels, MAP over the whole database.

    train       4,000, not in the database
    queries     1,000
    database   20,000

The parts are DeepHash-pytorch's lists; where these are not there, they are drawn by the seed from MIRFlickr's
own annotations (a file a label with the numbers of its images; `_r1` are the narrower ones). Some images have
no label: as queries they can only score 0.

Reference: Huiskes & Lew 2008, The MIR Flickr Retrieval Evaluation.
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

TITLE = "MIRFlickr-25k"
IMAGES, CLASSES = 25_000, 38
COUNTS: dict[str, int | None] = {"train": 4_000, "queries": 1_000, "database": 20_000}


class MirFlickrConfig(ListFilesConfig):
    """MIRFlickr-25k with several labels an image."""

    name: Literal["mirflickr"] = "mirflickr"
    """The benchmark."""
    root: str = "data/mirflickr"
    """Folder with `im1.jpg` … `im25000.jpg`, and with `annotations/` where the parts are to be drawn."""


def load(config: MirFlickrConfig, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark, by the lists `train.txt`, `test.txt` and `database.txt`, or drawn by the seed.

    Raises:
        DataError: if lists and annotations are missing, or images are.
        ArtefactError: if the saved split is damaged.
    """
    parts, notes = listed_or_drawn(config, annotated, COUNTS, seed=seed, splits=splits, where=TITLE)
    protocol = Protocol(TITLE, None, COUNTS, CLASSES)
    return from_parts(config, parts, protocol, seed=seed, splits=splits, notes=notes)


def annotated(root: str) -> Listed:
    """All images with the labels of MIRFlickr's annotation files, labels by the name of their file.

    Raises:
        DataError: if the files are missing, not 38, or name another image.
    """
    folder = location.join(location.expand(root), "annotations")
    there = location.exists(folder)
    files = (
        [n for n in location.files_in(folder) if n.endswith(".txt") and n != "README.txt"] if there else []
    )
    if len(files) != CLASSES:
        raise DataError(
            f"neither lists nor the {CLASSES} annotation files are there ({len(files)} found)",
            where=folder,
            mend="put train.txt, test.txt and database.txt, or mirflickr25k_annotations, under data.root",
        )
    hot = np.zeros((IMAGES, CLASSES), np.bool_)
    for column, name in enumerate(sorted(files)):
        file = location.join(folder, name)
        with location.open_file(file) as source:
            words = bytes(source.read()).decode("utf-8", "replace").split()
        if not all(word.isdigit() and 1 <= int(word) <= IMAGES for word in words):
            raise DataError(f"not a list of numbers of images, 1 to {IMAGES}", where=file)
        hot[[int(word) - 1 for word in words], column] = True
    return Listed([f"im{number}.jpg" for number in range(1, IMAGES + 1)], lists_of_classes(hot), CLASSES)
