"""NUS-WIDE as deep hashing uses it: web photographs with 21 or 81 concepts, MAP@5000.

| classes | train                      | queries | database |
|---------|----------------------------|---------|----------|
| 21      | 10,500, in the database    | 2,100   | 193,734  |
| 81      | 10,000, in the database    | 5,000   | the rest |

The lists of 21 concepts are DeepHash-pytorch's, those of 81 thuml/HashNet's; 2,185 training images of the
latter have no label at all. Lists with other images of the same names give other numbers. Copies of NUS-WIDE
lack some images: `missing: drop` leaves them out.

Reference: Chua et al. 2009, NUS-WIDE; Cao et al., HashNet, ICCV 2017.
"""

from typing import Literal

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.datasets.lists import ListFilesConfig, Protocol, from_parts, read_parts
from ray_retrieval.storage import Folder

COUNTS: dict[int, dict[str, int | None]] = {
    21: {"train": 10_500, "queries": 2_100, "database": 193_734},
    81: {"train": 10_000, "queries": 5_000, "database": None},
}


class NusWideConfig(ListFilesConfig):
    """NUS-WIDE with several labels an image."""

    name: Literal["nuswide"] = "nuswide"
    """The benchmark."""
    root: str = "data/nuswide"
    """Folder that the paths in the lists start from."""
    classes: Literal[21, 81] = 81
    """Concepts: the 21 most frequent, or all 81. Their lists are different splits."""


def load(config: NusWideConfig, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark, by the lists `train.txt`, `test.txt` and `database.txt`.

    Raises:
        DataError: if lists or images are missing or not the published ones.
        ArtefactError: if the saved split is damaged.
    """
    protocol = Protocol(f"NUS-WIDE ({config.classes})", 5000, COUNTS[config.classes], config.classes)
    return from_parts(config, read_parts(config), protocol, seed=seed, splits=splits)
