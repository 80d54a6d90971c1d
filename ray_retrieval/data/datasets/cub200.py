"""CUB-200-2011: photographs of 200 species of birds; the first 100 are learned from, the others searched.

    train      5,864 images of 100 classes
    test       5,924 images of 100 other classes, each a query in all others

The `train_test_split.txt` that comes with the data set (5,994 and 5,794 images of the same 200 classes) is
that of classification and plays no part here.

Reference: Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011; for the split Oh Song et al., CVPR 2016,
section 6.
"""

from typing import Literal

from ray_retrieval.data.datasets.disjoint import Count, Disjoint, DisjointConfig, Parts, read_rows
from ray_retrieval.errors import DataError

TRAIN_CLASSES = 100
"""Classes 1 to 100 are learned from."""
COUNTS = {
    "train": (Count(5_864, 100),),
    "queries": (Count(5_924, 100),),
    "database": (Count(5_924, 100),),
}


class Cub200Config(DisjointConfig):
    """CUB-200-2011."""

    name: Literal["cub200"] = "cub200"
    """The benchmark."""
    root: str = "data/CUB_200_2011"
    """Folder with `images/`, `images.txt` and `image_class_labels.txt`; a path or URI."""

    @property
    def protocol(self) -> Disjoint:
        """What is published."""
        return Disjoint("CUB-200-2011", COUNTS, (1, 2, 4, 8))

    def needs(self) -> list[str]:
        """The files that are read."""
        return ["images.txt", "image_class_labels.txt"]

    def read(self) -> Parts:
        """The images of both parts, whether they are there or not.

        Raises:
            DataError: if a file is missing or damaged.
        """
        files = self.paths()
        images, labels = (read_rows(file, 2) for file in files)
        if [row[0] for row in images] != [row[0] for row in labels] or not all(
            row[1].isdigit() for row in labels
        ):
            raise DataError(
                "not a class number for each image of images.txt, in the same order",
                where=files[1],
                mend="the files are not the published ones: get them anew",
            )
        rows = zip(images, labels, strict=True)
        return Parts.by_number(
            [
                (f"images/{name}", int(number), name.partition("/")[0])
                for (_, name, *_), (_, number, *_) in rows
            ],
            TRAIN_CLASSES,
        )
