"""Small data that tests make for themselves."""

import io
import json
import math

import numpy as np
import pyarrow as pa
from PIL import Image

from ray_retrieval import recipe
from ray_retrieval.compare import acceptance
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.table import ImageTable
from ray_retrieval.methods import METHODS
from ray_retrieval.run_folder import begin
from ray_retrieval.storage import Folder


def png(pixels):
    """PNG bytes of uint8 [h, w, 3]."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


SIZES = ((16, 24), (24, 16), (16, 16), (20, 24))


def coloured_table(
    count, *, classes=3, size=16, seed=0, prefix="image", several_labels=False, mixed_sizes=False
):
    """Noisy images whose mean colour tells their class, squares or of several sizes."""
    generator = np.random.default_rng(seed)
    colours = np.random.default_rng(99).integers(40, 216, (classes, 3))
    labels = np.arange(count) % classes
    rows = []
    for row, label in enumerate(labels):
        shape = SIZES[generator.integers(len(SIZES))] if mixed_sizes else (size, size)
        pixels = np.clip(colours[label] + generator.normal(0, 25, (*shape, 3)), 0, 255).astype(np.uint8)
        value = sorted({int(label), int(generator.integers(classes))}) if several_labels else int(label)
        image = {"bytes": png(pixels), "path": None}
        rows.append({"id": f"{prefix}-{row:04d}", "image": image, "label": value})
    image_type = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    label_type = pa.list_(pa.int64()) if several_labels else pa.int64()
    schema = pa.schema([("id", pa.string()), ("image", image_type), ("label", label_type)])
    return ImageTable(pa.Table.from_pylist(rows, schema=schema), name=prefix, classes=classes)


def write_images(folder, count):
    """Such images of three classes as files, a folder for each class; returns the folder."""
    table = coloured_table(count)
    for row in range(count):
        path = folder / ("red", "green", "blue")[row % 3] / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(table.image_bytes(row))
    return folder


def coloured_benchmark(train=60, **settings):
    """A benchmark of such images with disjoint parts."""

    def part(count, seed, prefix):
        return coloured_table(count, seed=seed, prefix=prefix, **settings)

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


PAPER = {"source": "Cao et al., 2017", "metric": "map@all", "values": {16: 0.6873, 32: 0.7184}}


def sized(name, size, **settings):
    """A method's configuration with codes of so many bits, or vectors of so many dimensions."""
    kind = METHODS[name][0]
    return kind(**{"bits" if "bits" in kind.model_fields else "dimension": size}, **settings)


def write_run(
    folder,
    value=0.7,
    *,
    bits=16,
    seed=0,
    name="study-${method.bits}bits",
    metrics=None,
    facts=None,
    train=None,
    method=None,
):
    """A finished run's run.json, recipe.yaml and metrics.json."""
    folder.mkdir(parents=True)
    made = recipe.Recipe(
        name=name.replace("${method.bits}", str(bits)),
        output=str(folder),
        seed=seed,
        data={"name": "digits"},
        method=method
        or {"name": "greedyhash", "bits": bits, "backbone": {"name": "small"}, "image": {"size": 16}},
        train=train or {},
        published=[PAPER],
    )
    begin(Folder(folder), made)
    test = [
        {"name": key, "value": number, "policy": f"mean over 9 queries by Hamming distance of {bits} bits"}
        for key, number in (metrics or {"map@all": value, "precision@radius2": value / 2}).items()
    ]
    model = {
        "epoch": 3,
        "validation": {"map": value},
        "test": test,
        "pr_curve": {"radius": [0, 1, 2], "recall": [0.1, 0.5, 1.0], "precision": [math.nan, value, 0.1]},
        "notes": [],
    }
    written = {
        "selected": "best",
        "models": {"best": model, "last": {**model, "test": []}},
        "dataset": {
            "name": "digits",
            "queries": 9,
            "database": 50,
            "errors": 0,
            "notes": [],
            **(facts or {}),
        },
        "published": acceptance(made.published, bits, test),
    }
    (folder / "metrics.json").write_text(json.dumps(written))
    return folder
