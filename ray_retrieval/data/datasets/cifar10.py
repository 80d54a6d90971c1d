"""CIFAR-10 under the three protocols of the hashing literature.

| protocol   | train         | queries         | database                         |
|------------|---------------|-----------------|----------------------------------|
| `I`        | 5,000         | 1,000           | 59,000: all but the queries      |
| `disjoint` | 5,000         | 1,000           | 54,000: without the training set |
| `II`       | 50,000 (less) | official 10,000 | official 50,000                  |

`I` and `disjoint` pool all 60,000 images and draw 100 queries and 500 training images a class. The mean
average precision is over the whole database.

The protocols have no validation queries. For `I` and `disjoint` they are drawn from the database without the
training set, and the validation database from what then remains; at test time both stay in the database, as
the protocol fixes it. For `II` every database image is a training image, so the validation queries are held
out of the training set: with the default 1,000 it trains on 49,000, with 0 on the published 50,000.

Reference: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; for the protocols Su et
al. 2018, "Greedy Hash" (I and II).
"""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import Field, field_validator

from ray_retrieval.config import Config
from ray_retrieval.data import location, readers
from ray_retrieval.data.benchmark import Benchmark, from_tables
from ray_retrieval.data.decode import png
from ray_retrieval.data.download import alone
from ray_retrieval.data.splits import REST, Split, SplitPlan, load_or_draw
from ray_retrieval.data.table import ImageTable, IntArray, concatenate
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder, is_uri

CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CLASSES = len(CLASS_NAMES)
_PARTS = {"train": 50_000, "test": 10_000}
_FOLDERS = ("", "data", "plain_text")
"""Where under the root the Parquet files may lie; the latter two as on the Hugging Face hub."""


class Cifar10Config(Config):
    """CIFAR-10: 60,000 photographs of 32 × 32 pixels, 10 classes."""

    name: Literal["cifar10"] = "cifar10"
    """The benchmark."""
    root: str = "data/cifar10"
    """Folder with `train-*.parquet` and `test-*.parquet`, or with torchvision's `cifar-10-batches-py`."""
    protocol: Literal["I", "II", "disjoint"] = "I"
    """`I`: 1,000 images query the 59,000 others, of which 5,000 train; `disjoint`: the same without the 5,000
    in what is searched; `II`: the official 10,000 test images query the 50,000 others, which train."""
    download: bool = False
    """Fetch the images (170 MB) where they are missing."""
    validation_queries: int = Field(default=1000, ge=0, le=10_000)
    """Validation queries in all, as many of each class; 0 for none."""
    validation_database: int = Field(default=5000, ge=10, le=30_000)
    """Images that these search in, as many of each class."""

    @field_validator("validation_queries", "validation_database")
    @classmethod
    def _divides(cls, value: int) -> int:
        if value % CLASSES:
            raise ValueError(
                f"as many of each of the {CLASSES} classes: a multiple of {CLASSES}, got {value}"
            )
        return value


def load(config: Cifar10Config, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark, by the split in `splits`; without one it is drawn by `seed` and saved there.

    Raises:
        DataError: if images are missing or not the published number, or the saved split was drawn otherwise.
        ArtefactError: if the saved split is damaged.
    """
    table = cifar10_table(config.root, download=config.download)
    queries, database = config.validation_queries // CLASSES, config.validation_database // CLASSES
    origin = {
        "benchmark": config.name,
        "protocol": config.protocol,
        "validation_queries": config.validation_queries,
        "validation_database": config.validation_database,
    }

    def draw(seed: int) -> dict[str, IntArray]:
        labels = np.asarray(table.labels)
        if config.protocol == "II":
            return _official(labels, queries, database, seed)
        return _pooled(labels, queries, database, seed, train_in_database=config.protocol == "I")

    split, notes = load_or_draw(splits, table, draw, seed=seed, origin=origin)
    name = f"CIFAR-10 ({config.protocol})"
    tables = {
        role: table.take(rows, name=f"{name}: {role.replace('_', ' ')}") for role, rows in split.roles.items()
    }
    benchmark = from_tables(name, tables, notes=notes)
    if config.protocol == "II" and config.validation_queries:
        benchmark.notes.append(
            f"{config.validation_queries} validation queries are held out of the 50,000 of train"
        )
    benchmark.check(published(config))
    for role in ("train", "queries", "database"):
        _check_balance(tables[role])
    return benchmark


def cifar10_table(root: str, *, download: bool = False) -> ImageTable:
    """All 60,000 images: the official training set, then the test set.

    Ids are `train-00000` … `train-49999` and `test-00000` … `test-09999`, by the row in the official part.

    Args:
        root: a folder with Parquet files `train-*.parquet` and `test-*.parquet` in the Hugging Face layout,
            or with torchvision's `cifar-10-batches-py`, converted to such files once (PNG, without loss).
        download: fetch what is missing through torchvision, which checks it against the published MD5 sums.

    Raises:
        DataError: if the images are missing, cannot be fetched, or are not the published number.
    """
    place = location.expand(root)
    files = _parquet_files(place)
    if files is None:
        _make(place, download=download)
        files = _parquet_files(place)
        assert files is not None
    parts = []
    for part, count in _PARTS.items():
        rows = readers.read_parquet(files[part])
        table = rows.table
        if len(table) != count:
            raise DataError(f"{part}: {count} images are expected, there are {len(table)}", where=place)
        if rows.class_names not in (None, CLASS_NAMES):
            raise DataError(f"{part}: the class names are not those of CIFAR-10", where=place)
        ids = pa.array([f"{part}-{row:05d}" for row in range(count)])
        table = table.select(["image", "label"]).add_column(0, "id", ids)
        parts.append(ImageTable(table, name=f"{place}: {part}", class_names=CLASS_NAMES))
        _check_balance(parts[-1])
    return concatenate(parts, name="CIFAR-10")


def _pooled(
    labels: npt.NDArray[Any],
    validation_queries: int,
    validation_database: int,
    seed: int,
    *,
    train_in_database: bool,
) -> dict[str, IntArray]:
    """Protocols I and disjoint: rows by role, from all 60,000."""
    parts = {"queries": 100, "train": 500, "validation_queries": validation_queries}
    drawn = Split.draw(labels, SplitPlan({**parts, "validation_database": validation_database}, seed)).roles
    kept = [drawn["validation_queries"], drawn["validation_database"], drawn[REST]]
    database = np.sort(np.concatenate([*kept, drawn["train"]] if train_in_database else kept))
    return {
        "train": drawn["train"],
        "validation_queries": drawn["validation_queries"],
        "validation_database": drawn["validation_database"],
        "queries": drawn["queries"],
        "database": database,
    }


def _official(
    labels: npt.NDArray[Any], validation_queries: int, validation_database: int, seed: int
) -> dict[str, IntArray]:
    """Protocol II: rows by role, from the official parts."""
    count = _PARTS["train"]
    plan = SplitPlan(
        {"validation_queries": validation_queries, "validation_database": validation_database}, seed
    )
    drawn = Split.draw(labels[:count], plan).roles
    return {
        "train": np.sort(np.concatenate([drawn["validation_database"], drawn[REST]])),
        "validation_queries": drawn["validation_queries"],
        "validation_database": drawn["validation_database"],
        "queries": np.arange(count, len(labels)),
        "database": np.arange(count),
    }


def is_there(root: str) -> bool:
    """Whether the images are under the root, in either form."""
    place = location.expand(root)
    return _parquet_files(place) is not None or location.exists(location.join(place, "cifar-10-batches-py"))


def published(config: Cifar10Config) -> dict[str, int]:
    """Images by part, as the protocol has them less what validation takes."""
    counts = {
        "I": {"train": 5_000, "queries": 1_000, "database": 59_000},
        "disjoint": {"train": 5_000, "queries": 1_000, "database": 54_000},
        "II": {"train": 50_000 - config.validation_queries, "queries": 10_000, "database": 50_000},
    }[config.protocol]
    validation = {
        "validation_queries": config.validation_queries,
        "validation_database": config.validation_database,
    }
    return {**counts, **validation}


def _check_balance(table: ImageTable) -> None:
    counts = np.bincount(np.asarray(table.labels), minlength=CLASSES)
    expected = len(table) // CLASSES
    wrong = np.flatnonzero(counts != expected)
    if len(wrong):
        name = CLASS_NAMES[wrong[0]] if wrong[0] < CLASSES else f"number {wrong[0]}"
        raise DataError(
            f"{expected} images of each class are expected, class {name} has {counts[wrong[0]]}",
            where=table.name,
            mend="the files are not those of CIFAR-10: get them anew",
        )


def _parquet_files(root: str) -> dict[str, list[str]] | None:
    """The files of both parts, or None."""
    for inner in _FOLDERS:
        folder = location.join(root, inner) if inner else root
        if location.find(folder).type == fs.FileType.Directory:
            names = [name for name in location.files_in(folder) if name.endswith(".parquet")]
            found = {part: [location.join(folder, n) for n in names if n.startswith(part)] for part in _PARTS}
            if all(found.values()):
                return found
    return None


def _make(root: str, *, download: bool) -> None:
    """Write torchvision's copy of CIFAR-10 under `root` as Parquet files beside it, unless another does."""
    mend = (
        f"put train-*.parquet and test-*.parquet or cifar-10-batches-py into {root}, or set 'download: true'"
    )
    if is_uri(root):
        raise DataError("no CIFAR-10 here", where=root, mend="put train-*.parquet and test-*.parquet there")
    if not download and not os.path.isdir(os.path.join(root, "cifar-10-batches-py")):
        raise DataError("no CIFAR-10 here", where=root, mend=mend)
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with alone(Path(root) / "cifar-10-batches-py"):
            if _parquet_files(root) is None:
                _convert(root, download=download, mend=mend)
    except OSError as error:
        raise DataError(
            f"CIFAR-10 cannot be put there: {error.strerror}",
            where=root,
            mend="give another folder as data.root",
        ) from None


def _convert(root: str, *, download: bool, mend: str) -> None:
    from torchvision.datasets import CIFAR10

    for part, official_train in (("train", True), ("test", False)):
        try:
            # torchvision unpickles these files only after their MD5 sums are right.
            found = CIFAR10(root, train=official_train, download=download)
        except (RuntimeError, OSError) as error:
            cause = (
                "CIFAR-10 cannot be fetched" if download else "cifar-10-batches-py is damaged or not complete"
            )
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{cause}: {reason}", where=root, mend=mend) from None
        _write_part(Folder(root), part, found.data, found.targets)


def _write_part(folder: Folder, part: str, pixels: npt.NDArray[np.uint8], labels: list[int]) -> None:
    """One Parquet file in the Hugging Face layout.

    Args:
        folder: where to.
        part: `train` or `test`.
        pixels: uint8 [n, 32, 32, 3].
        labels: n class indices.
    """
    data = [png(image) for image in pixels]
    images = pa.StructArray.from_arrays(
        [pa.array(data, pa.binary()), pa.nulls(len(data), pa.string())], names=["bytes", "path"]
    )
    table = pa.table({"img": images, "label": pa.array(labels, pa.int64())})
    with folder.writing(f"{part}-00000-of-00001.parquet") as stream:
        pq.write_table(table, stream, row_group_size=5000, use_dictionary=False, compression="none")
