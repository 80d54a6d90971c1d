"""Images to measure on: JPEG photographs of plain noise and shapes, made on the spot, the same every time."""

import io

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.table import ImageTable


def photographs(count: int, *, side: int = 256, classes: int = 10, distinct: int = 64) -> ImageTable:
    """A table of `count` JPEGs of side × side pixels, `distinct` different ones in turn.

    Smoothed noise compresses like a photograph: about 20 kB at 256 pixels.
    """
    generator = np.random.default_rng(0)
    files = []
    for _ in range(min(count, distinct)):
        noise = Image.fromarray(generator.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        picture = noise.resize((side, side), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
        stream = io.BytesIO()
        picture.save(stream, format="JPEG", quality=90)
        files.append(stream.getvalue())
    rows = [
        {
            "id": f"image-{row:06d}",
            "image": {"bytes": files[row % len(files)], "path": None},
            "label": row % classes,
        }
        for row in range(count)
    ]
    image_type = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.string()), ("image", image_type), ("label", pa.int64())])
    return ImageTable(pa.Table.from_pylist(rows, schema=schema), name="photographs", classes=classes)


def photographs_benchmark(train: int, *, classes: int = 10) -> Benchmark:
    """The same table in every role; a few rows of it for validation."""
    table = photographs(train, classes=classes)
    few = table.take(np.arange(20))
    return Benchmark(
        name="photographs",
        train=table,
        validation_queries=few,
        validation_database=few,
        queries=few,
        database=table,
        k=None,
        queries_in_database=True,
        notes=[],
    )
