"""Small data that tests make for themselves."""

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.table import ImageTable


def png(pixels):
    """PNG bytes of uint8 [h, w, 3]."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def coloured_table(count, *, classes=3, size=16, seed=0, prefix="image", several_labels=False):
    """Noisy images whose mean colour tells their class."""
    generator = np.random.default_rng(seed)
    colours = np.random.default_rng(99).integers(40, 216, (classes, 3))
    labels = np.arange(count) % classes
    rows = []
    for row, label in enumerate(labels):
        pixels = np.clip(colours[label] + generator.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
        value = sorted({int(label), int(generator.integers(classes))}) if several_labels else int(label)
        image = {"bytes": png(pixels), "path": None}
        rows.append({"id": f"{prefix}-{row:04d}", "image": image, "label": value})
    image_type = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    label_type = pa.list_(pa.int64()) if several_labels else pa.int64()
    schema = pa.schema([("id", pa.string()), ("image", image_type), ("label", label_type)])
    return ImageTable(pa.Table.from_pylist(rows, schema=schema), name=prefix, classes=classes)


def coloured_benchmark(train=60, *, several_labels=False, classes=3):
    """A benchmark of such images with disjoint parts."""

    def part(count, seed, prefix):
        return coloured_table(count, seed=seed, prefix=prefix, several_labels=several_labels, classes=classes)

    database = part(train, 1, "database")
    return Benchmark(
        name="coloured",
        train=database,
        validation_queries=part(9, 2, "validation"),
        validation_database=database,
        queries=part(9, 3, "query"),
        database=database,
        k=None,
        queries_in_database=False,
        notes=[],
    )
