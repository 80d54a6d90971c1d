"""COCO 2014 as deep hashing uses it: all labelled images of train2014 and val2014, 80 labels, MAP@5000.

| protocol  | train                         | queries | database                                       |
|-----------|-------------------------------|---------|------------------------------------------------|
| `hashnet` | 10,000, not in the database   | 5,000   | 112,218, the queries among them                |
| `clean`   | 10,000, in the database       | 5,000   | 117,218: all 122,218 labelled but the queries  |

`hashnet` is what the lists in use say (thuml/HashNet and its ports), and what published numbers were measured
on. `clean` is what the paper says: the same queries and training images, the database is the rest.

The list of the database need not be there: it follows from COCO's own annotations and the list of training
images, as 122,218 = 112,218 + 10,000.

Reference: Lin et al. 2014, Microsoft COCO; Cao et al., HashNet, ICCV 2017, section 4.1; for the leak
thuml/HashNet issue 41.
"""

import json
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa

from ray_retrieval.data import location
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.columns import lists_of_classes
from ray_retrieval.data.datasets.lists import (
    PARTS,
    Listed,
    ListFilesConfig,
    Protocol,
    from_parts,
    list_files,
    read_part,
)
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder

_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, "
    "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, "
    "backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, "
    "baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, "
    "knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, "
    "chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, "
    "cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, "
    "hair drier, toothbrush"
)
CLASS_NAMES = tuple(sorted(_NAMES.split(", ")))
"""In the order of the columns of the lists, which is the alphabet's and not that of COCO's categories."""

COUNTS: dict[str, dict[str, int | None]] = {
    "hashnet": {"train": 10_000, "queries": 5_000, "database": 112_218},
    "clean": {"train": 10_000, "queries": 5_000, "database": 117_218},
}
ANNOTATIONS = {part: f"annotations/instances_{part}.json" for part in ("train2014", "val2014")}


class CocoConfig(ListFilesConfig):
    """COCO 2014 with several labels an image."""

    name: Literal["coco"] = "coco"
    """The benchmark."""
    root: str = "data/coco"
    """Folder with `train2014/` and `val2014/`."""
    protocol: Literal["hashnet", "clean"] = "hashnet"
    """What the database is. `hashnet`: 112,218 images, those of the lists in use, with the queries among them
    and without the training images; `clean`: the 117,218 that are no query, as the paper says."""


def load(config: CocoConfig, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark, by the lists `train.txt`, `test.txt` and `database.txt`.

    Raises:
        DataError: if lists or images are missing or not the published ones.
        ArtefactError: if the saved split is damaged.
    """
    title = f"COCO 2014 ({config.protocol})"
    protocol = Protocol(title, 5000, COUNTS[config.protocol], len(CLASS_NAMES), CLASS_NAMES)
    notes = []
    if not location.exists(list_files(config)["database"]):
        notes.append("the database follows from COCO's annotations: its order is not that of the list in use")
    return from_parts(config, parts_of(config), protocol, seed=seed, splits=splits, notes=notes)


def parts_of(config: CocoConfig) -> dict[str, Listed]:
    """Train, queries and database as the protocol has them."""
    files = list_files(config)
    train, queries = (_read(files[part], config.root) for part in ("train", "queries"))
    if location.exists(files["database"]):
        database = _read(files["database"], config.root)
    else:
        database = _but(_labelled(config.root, files["database"]), train)
    if config.protocol == "clean":
        database = _but(_and(database, train), queries)
    return dict(zip(PARTS, (train, queries, database), strict=True))


def _read(file: str, root: str) -> Listed:
    """A list with paths as COCO has them, `train2014/name.jpg`, whether the images are there or not."""
    found = read_part(file, root)
    return replace(found, names=["/".join(name.split("/")[-2:]) for name in found.names])


def _labelled(root: str, list_file: str) -> Listed:
    """All labelled images by COCO's own annotations: train2014 then val2014, each by the image's number."""
    files = {part: location.join(location.expand(root), name) for part, name in ANNOTATIONS.items()}
    missing = [file for file in files.values() if not location.exists(file)]
    if missing:
        raise DataError(
            f"there is neither a list of the database nor {missing[0]}, from which it follows",
            where=list_file,
            mend="put the list there, or COCO's annotations_trainval2014 under data.root",
        )
    names: list[str] = []
    hot = []
    for part, file in files.items():
        try:
            labels = _annotated(file)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"not COCO's annotations ({reason})", where=file, mend="get them anew") from None
        for name, columns in labels:
            row = np.zeros(len(CLASS_NAMES), np.bool_)
            row[columns] = True
            names.append(f"{part}/{name}")
            hot.append(row)
    return Listed(names, lists_of_classes(np.stack(hot)), len(CLASS_NAMES))


def _annotated(file: str) -> list[tuple[str, list[int]]]:
    """Name and columns of every labelled image of an annotation file, by the image's number."""
    with location.open_file(file) as source:
        found = json.loads(bytes(source.read()))
    column = {kind["id"]: CLASS_NAMES.index(kind["name"]) for kind in found["categories"]}
    labels: dict[int, set[int]] = {}
    for annotation in found["annotations"]:
        labels.setdefault(annotation["image_id"], set()).add(column[annotation["category_id"]])
    if not labels:
        raise ValueError("no image has an object")
    file_names = {image["id"]: image["file_name"] for image in found["images"]}
    return [(file_names[number], sorted(labels[number])) for number in sorted(labels)]


def _but(listed: Listed, others: Listed) -> Listed:
    """What is not among the others."""
    known = set(others.names)
    return listed.take(
        np.array([row for row, name in enumerate(listed.names) if name not in known], np.int64)
    )


def _and(listed: Listed, others: Listed) -> Listed:
    """Both, each image once."""
    more = _but(others, listed)
    return Listed(listed.names + more.names, pa.concat_arrays([listed.label, more.label]), listed.classes)
