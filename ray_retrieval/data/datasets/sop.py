"""Stanford Online Products: 120,053 photographs of 22,634 things that were sold on eBay.

    train      59,551 images of 11,318 classes
    test       60,502 images of 11,316 other classes, each a query in all others

The lists are the official `Ebay_train.txt` and `Ebay_test.txt` (a header, then image, class and super-class
number and path), or else `train_list.txt` and `test_list.txt` (path, class and perhaps the image's number).

Reference: Oh Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016.
"""

from typing import Literal

from ray_retrieval.data import location
from ray_retrieval.data.datasets.disjoint import (
    Count,
    Disjoint,
    DisjointConfig,
    Named,
    Parts,
    read_rows,
)
from ray_retrieval.data.datasets.lists import strip_prefixes

OFFICIAL = ("Ebay_train.txt", "Ebay_test.txt")
LISTS = ("train_list.txt", "test_list.txt")
COUNTS = {
    "train": (Count(59_551, 11_318),),
    "queries": (Count(60_502, 11_316),),
    "database": (Count(60_502, 11_316),),
}


class SopConfig(DisjointConfig):
    """Stanford Online Products."""

    name: Literal["sop"] = "sop"
    """The benchmark."""
    root: str = "data/Stanford_Online_Products"
    """Folder with the lists and twelve folders of images, `bicycle_final/` and others; a path or URI."""

    @property
    def protocol(self) -> Disjoint:
        """What is published."""
        return Disjoint("Stanford Online Products", COUNTS, (1, 10, 100, 1000))

    def needs(self) -> list[str]:
        """The lists that are read: the official ones, unless only the others are there."""
        root = location.expand(self.root)
        there = [
            all(location.exists(location.join(root, name)) for name in names) for names in (OFFICIAL, LISTS)
        ]
        return list(LISTS if there == [False, True] else OFFICIAL)

    def read(self) -> Parts:
        """The images of both parts, whether they are there or not.

        Raises:
            DataError: if a list is missing or damaged.
        """
        official = self.needs() == list(OFFICIAL)
        root = location.expand(self.root)
        lists = []
        for file in self.paths():
            rows = read_rows(file, 4 if official else 2, header=1 if official else 0)
            names = [row[3] if official else row[0] for row in rows]
            lists.append((strip_prefixes(names, root), [row[1] for row in rows]))
        # Official numbers run on from train to test. Where both lists count from 0, equal numbers are no
        # equal classes: the counts of both parts are then what is asserted.
        again = not official and bool(set(lists[0][1]) & set(lists[1][1]))
        return Parts.of(_named(*lists[0]), _named(*lists[1], prefix="test " if again else ""))


def _named(names: list[str], numbers: list[str], prefix: str = "") -> Named:
    """Classes such as `bicycle 17`, after the folder and the number."""
    kinds = [name.split("/")[-2].removesuffix("_final") if "/" in name else "" for name in names]
    return names, [f"{prefix}{kind} {number}".strip() for kind, number in zip(kinds, numbers, strict=True)]
