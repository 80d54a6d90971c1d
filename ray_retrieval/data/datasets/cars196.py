"""Cars196: photographs of 196 models of cars; the first 98 are learned from, the others searched.

    train      8,054 images of 98 classes
    test       8,131 images of 98 other classes, each a query in all others

The data set's own training and test images (8,144 and 8,041 of the same 196 classes) are the split of
classification; here both are put together and parted by class. It was published in two forms, with the same
images: `cars_annos.mat` with `car_ims/`, and a development kit with `cars_train/` and `cars_test/`, whose
test labels are in `cars_test_annos_withlabels.mat`.

Reference: Krause et al., 3D Object Representations for Fine-Grained Categorization, 3dRR 2013; for the split
Oh Song et al., CVPR 2016, section 6.
"""

import io
from typing import Any, Literal

import numpy as np

from ray_retrieval.data import location
from ray_retrieval.data.datasets.disjoint import Count, Disjoint, DisjointConfig, Parts
from ray_retrieval.errors import DataError

TRAIN_CLASSES = 98
"""Classes 1 to 98 are learned from."""
COUNTS = {
    "train": (Count(8_054, 98),),
    "queries": (Count(8_131, 98),),
    "database": (Count(8_131, 98),),
}
ANNOTATIONS = "cars_annos.mat"
KIT = {
    "devkit/cars_meta.mat": "",
    "devkit/cars_train_annos.mat": "cars_train/",
    "cars_test_annos_withlabels.mat": "cars_test/",
}
"""Files of the development kit, and where the images of each lie."""


class Cars196Config(DisjointConfig):
    """Cars196."""

    name: Literal["cars196"] = "cars196"
    """The benchmark."""
    root: str = "data/cars196"
    """Folder with `cars_annos.mat` and `car_ims/`, or with the development kit's `devkit/`, `cars_train/`,
    `cars_test/` and `cars_test_annos_withlabels.mat`; a path or URI."""

    @property
    def protocol(self) -> Disjoint:
        """What is published."""
        return Disjoint("Cars196", COUNTS, (1, 2, 4, 8))

    def needs(self) -> list[str]:
        """The files that are read: `cars_annos.mat`, unless only the development kit is there."""
        root = location.expand(self.root)
        kit = location.exists(location.join(root, "devkit"))
        if kit and not location.exists(location.join(root, ANNOTATIONS)):
            return list(KIT)
        return [ANNOTATIONS]

    def read(self) -> Parts:
        """The images of both parts, whether they are there or not.

        Raises:
            DataError: if a file is missing or damaged.
        """
        files = self.paths()
        if len(files) == 1:
            names, numbers, models = _annotated(files[0], "relative_im_path", "")
        else:
            models = _models(_open(files[0]), files[0])
            names, numbers = [], []
            for file, folder in zip(files[1:], list(KIT.values())[1:], strict=True):
                more, their, _ = _annotated(file, "fname", folder)
                names += more
                numbers += their
        if not set(numbers) <= set(range(1, len(models) + 1)):
            raise DataError(f"class numbers are not between 1 and {len(models)}", where=files[-1])
        rows = zip(names, numbers, strict=True)
        return Parts.by_number([(name, number, models[number - 1]) for name, number in rows], TRAIN_CLASSES)


def _annotated(file: str, field: str, folder: str) -> tuple[list[str], list[int], list[str]]:
    """Paths, class numbers from 1, and the names of the classes where the file has them."""
    found = _open(file)
    try:
        rows = np.atleast_1d(found["annotations"])
        names = [f"{folder}{name}" for name in rows[field]]
        numbers = [int(number) for number in rows["class"]]
    except (KeyError, ValueError, TypeError, IndexError):
        raise DataError(
            f"no annotations with '{field}' and 'class'",
            where=file,
            mend="the file is not the published one, or one without labels: get it anew",
        ) from None
    return names, numbers, _models(found, file) if "class_names" in found else []


def _models(found: dict[str, Any], file: str) -> list[str]:
    if "class_names" not in found:
        raise DataError("no 'class_names'", where=file, mend="the file is not the published one: get it anew")
    return [str(name) for name in np.atleast_1d(found["class_names"])]


def _open(file: str) -> dict[str, Any]:
    """The variables of a MATLAB file."""
    from scipy.io import loadmat

    if not location.exists(file):
        raise DataError(
            "the file is missing",
            where=file,
            mend="`ray-retrieval datasets cars196` says where it comes from",
        )
    with location.open_file(file) as source:
        data = bytes(source.read())
    try:
        return dict(loadmat(io.BytesIO(data), squeeze_me=True))
    except Exception as error:  # scipy raises whatever the damaged bytes lead to
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"not a MATLAB file ({reason})", where=file, mend="get it anew") from None
