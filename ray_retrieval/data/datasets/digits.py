"""Scikit-learn's 1,797 handwritten digits of 8 × 8 pixels: a benchmark that is always there, within seconds.

The choice of roles is ours, as there is no published retrieval protocol. Of each digit, drawn by seed: 20
test queries, 10 validation queries, and all others (1,497 images) are the database. The database, of the test
as of the validation, is the training set as well; no query of either kind is in it.
"""

import functools
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.columns import IMAGE_TYPE
from ray_retrieval.data.decode import png
from ray_retrieval.data.splits import REST, Split, SplitPlan, load_or_draw
from ray_retrieval.data.table import ImageTable, IntArray
from ray_retrieval.storage import Folder

IMAGES = 1797


class DigitsConfig(Config):
    """Handwritten digits, 8 × 8 pixels, 10 classes; comes with scikit-learn, nothing to download."""

    name: Literal["digits"] = "digits"
    """The benchmark."""
    queries_per_class: int = Field(default=20, ge=1, le=80)
    """Test queries of each digit."""
    validation_queries_per_class: int = Field(default=10, ge=1, le=80)
    """Validation queries of each digit."""


@functools.lru_cache(maxsize=1)
def digits_table() -> ImageTable:
    """All digits as PNG files of 8 × 8 grey pixels; ids `digit-0000` to `digit-1796`."""
    from sklearn.datasets import load_digits

    found = load_digits()
    # The scans count 0…16 ink dots a cell.
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    data = [png(image) for image in pixels]
    images = pa.StructArray.from_arrays(
        [pa.array(data, pa.large_binary()), pa.nulls(len(data), pa.string())], fields=list(IMAGE_TYPE)
    )
    ids = [f"digit-{row:04d}" for row in range(len(data))]
    table = pa.table({"id": ids, "image": images, "label": np.asarray(found.target, dtype=np.int64)})
    return ImageTable(table, name="digits", class_names=[str(digit) for digit in range(10)])


def load(config: DigitsConfig, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark, by the split in `splits`; without one it is drawn by `seed` and saved there.

    Raises:
        DataError: if the saved split was drawn otherwise.
        ArtefactError: if it is damaged.
    """
    table = digits_table()
    parts = {"queries": config.queries_per_class, "validation_queries": config.validation_queries_per_class}

    def draw(seed: int) -> dict[str, IntArray]:
        roles = Split.draw(np.asarray(table.labels), SplitPlan(parts, seed)).roles
        return {
            "queries": roles["queries"],
            "validation_queries": roles["validation_queries"],
            "database": roles[REST],
        }

    origin = {"benchmark": config.name, "per_class": parts}
    split, notes = load_or_draw(splits, table, draw, seed=seed, origin=origin)
    database = table.take(split.roles["database"], name="digits: database")
    benchmark = Benchmark(
        name="digits",
        train=database,
        validation_queries=table.take(split.roles["validation_queries"], name="digits: validation queries"),
        validation_database=database,
        queries=table.take(split.roles["queries"], name="digits: queries"),
        database=database,
        notes=["the database is the training set", *notes],
    )
    queries, validation = (10 * count for count in parts.values())
    rest = IMAGES - queries - validation
    benchmark.check({"queries": queries, "validation_queries": validation, "database": rest, "train": rest})
    return benchmark
