"""In-shop Clothes Retrieval of DeepFashion: photographs of clothes in a web shop.

    train      25,882 images of 3,997 classes
    queries    14,218 images of 3,985 other classes
    database   12,612 images of the same 3,985 classes, the "gallery"

Queries and database are told by `list_eval_partition.txt` and share no image.

Reference: Liu et al., DeepFashion, CVPR 2016.
"""

from typing import Literal

from ray_retrieval.data import location
from ray_retrieval.data.datasets.disjoint import Count, Disjoint, DisjointConfig, Parts, read_rows
from ray_retrieval.errors import DataError

COUNTS = {
    "train": (Count(25_882, 3_997),),
    "queries": (Count(14_218, 3_985),),
    "database": (Count(12_612, 3_985),),
}
PARTITION = ("Eval/list_eval_partition.txt", "list_eval_partition.txt")
"""Where the list may lie."""
_STATUS = ("train", "query", "gallery")
_FOLDERS = ("", "Img/")
"""Where the `img/` of the list may lie."""


class InShopConfig(DisjointConfig):
    """In-shop Clothes Retrieval."""

    name: Literal["inshop"] = "inshop"
    """The benchmark."""
    root: str = "data/inshop"
    """Folder with `Eval/list_eval_partition.txt` and `img/` or `Img/img/`; a path or URI."""

    @property
    def protocol(self) -> Disjoint:
        """What is published."""
        return Disjoint("In-shop Clothes", COUNTS, (1, 10, 20, 30, 40, 50))

    def needs(self) -> list[str]:
        """The list that is read."""
        root = location.expand(self.root)
        there = [name for name in PARTITION if location.exists(location.join(root, name))]
        return there[:1] or [PARTITION[0]]

    def read(self) -> Parts:
        """The images of the three parts, whether they are there or not.

        Raises:
            DataError: if the list is missing or damaged.
        """
        root = location.expand(self.root)
        file = self.paths()[0]
        # A line with the number of images, one with the names of the columns.
        rows = read_rows(file, 3, header=2)
        unknown = next((row for row in rows if row[2] not in _STATUS), None)
        if unknown is not None:
            raise DataError(
                f"'{unknown[2]}' is none of {', '.join(_STATUS)}",
                where=file,
                mend="the file is not the published one: get it anew",
            )
        folders = (folder for folder in _FOLDERS if location.exists(location.join(root, folder + rows[0][0])))
        folder = next(folders, "")
        parts = []
        for status in _STATUS:
            mine = [row for row in rows if row[2] == status]
            parts.append(([folder + row[0] for row in mine], [row[1] for row in mine]))
        return Parts.of(*parts)
