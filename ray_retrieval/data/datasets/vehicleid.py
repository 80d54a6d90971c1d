"""PKU VehicleID: photographs of vehicles from behind and in front, by surveillance cameras.

    train      113,346 images of 13,164 vehicles
    test       `small`, `medium`, `large`: the images of 800, 1,600 or 2,400 other vehicles

At test time one image of each vehicle, by chance, is what is searched (the "gallery"), and all others are the
queries; this is done ten times, and numbers are means over the ten.

The paper says 110,178 images of 13,134 vehicles to train on; the lists that are given away have more. Both
are accepted. Of the test lists the number of vehicles is asserted, as those of images differ among reports.

Reference: Liu et al., Deep Relative Distance Learning, CVPR 2016, section 4.
"""

from typing import Literal

from ray_retrieval.data.datasets.disjoint import (
    Count,
    Disjoint,
    DisjointConfig,
    Named,
    Parts,
    read_rows,
)

TRAIN = (Count(113_346, 13_164), Count(110_178, 13_134))
VEHICLES = {"small": 800, "medium": 1_600, "large": 2_400}
GALLERIES = 10


class VehicleIdConfig(DisjointConfig):
    """PKU VehicleID."""

    name: Literal["vehicleid"] = "vehicleid"
    """The benchmark."""
    root: str = "data/VehicleID_V1.0"
    """Folder with `image/` and `train_test_split/`; a path or URI."""
    size: Literal["small", "medium", "large"] = "small"
    """Which test list: 800, 1,600 or 2,400 vehicles."""

    @property
    def protocol(self) -> Disjoint:
        """What is published."""
        test = (Count(None, VEHICLES[self.size]),)
        counts = {"train": TRAIN, "queries": test, "database": test}
        return Disjoint(f"VehicleID ({self.size})", counts, (1, 5), GALLERIES)

    def needs(self) -> list[str]:
        """The lists that are read."""
        return [
            "train_test_split/train_list.txt",
            f"train_test_split/test_list_{VEHICLES[self.size]}.txt",
        ]

    def read(self) -> Parts:
        """The images of train and test, whether they are there or not.

        Raises:
            DataError: if a list is missing or damaged.
        """
        train, test = map(_listed, self.paths())
        return Parts.of(train, test)


def _listed(file: str) -> Named:
    """Lines of the number of an image and that of its vehicle."""
    rows = read_rows(file, 2)
    names = [row[0] if row[0].endswith(".jpg") else f"{row[0]}.jpg" for row in rows]
    return [f"image/{name}" for name in names], [row[1] for row in rows]
