"""What the tests of embeddings and indices share: images without pixels, their embeddings, and kills."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from ray_retrieval.descriptors import Codes, Form, Local, Vectors
from ray_retrieval.search import embeddings
from ray_retrieval.storage import Folder

IMAGE = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])


def draw_codes(count, bits, *, seed=0, distinct=None):
    generator = np.random.default_rng(seed)
    drawn = np.packbits(generator.integers(0, 2, (distinct or count, bits), np.uint8), axis=1)
    return Codes(drawn[generator.integers(0, len(drawn), count)] if distinct else drawn, bits)


def draw_vectors(count, dimension, *, seed=0, distinct=None):
    generator = np.random.default_rng(seed)
    drawn = generator.normal(size=(distinct or count, dimension)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return Vectors(drawn[generator.integers(0, len(drawn), count)] if distinct else drawn)


def unit(vectors):
    """The vectors at length 1, in float32; those of no length stay."""
    lengths = np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    return (vectors / lengths).astype(np.float32)


def draw_local(count, dimension, *, vectors=0, seed=0, most=12):
    """Sets of 0 to `most` features; each image has features near those of a few others."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, most + 1, count)
    total = int(counts.sum())
    centres = np.random.default_rng(99).normal(size=(3 * most, dimension))
    data = centres[generator.integers(0, len(centres), total)] + 0.3 * generator.normal(
        size=(total, dimension)
    )
    data /= np.linalg.norm(data, axis=1, keepdims=True)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    scores = generator.uniform(0, 9, total)
    image = np.repeat(np.arange(count), counts)
    return Local(
        offsets,
        data.astype(np.float16),
        generator.uniform(0, 640, (total, 2)).astype(np.float32),
        (2.0 ** generator.integers(-2, 2, total)).astype(np.float32),
        scores[np.lexsort((-scores, image))].astype(np.float32),
        generator.integers(100, 700, (count, 2)).astype(np.int32),
        draw_vectors(count, vectors, seed=seed).data if vectors else np.zeros((count, 0), np.float32),
    )


def draw_images(count, *, label="int", inline=True, **columns):
    """Rows of id, image and label; `inline` images are bytes, the others paths."""
    labels = {
        "int": pa.array([row % 7 for row in range(count)], pa.int64()),
        "list": pa.array([sorted({row % 3, row % 5}) for row in range(count)], pa.list_(pa.int64())),
        "none": pa.nulls(count),
    }
    images = [
        {"bytes": b"bytes of %d" % row, "path": None}
        if inline
        else {"bytes": None, "path": f"/images/{row}.jpg"}
        for row in range(count)
    ]
    ids = [f"image-{row:04d}" for row in range(count)]
    known = {"id": pa.array(ids, pa.string()), "image": pa.array(images, IMAGE), "label": labels[label]}
    return pa.table({**known, **columns})


def images_of(count, start=0, **columns):
    table = draw_images(start + count).slice(start)
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def write(
    folder,
    codes,
    images,
    *,
    part_rows=40,
    model="model-a",
    skip=frozenset(),
    class_names=None,
    keep_images=True,
    engine="torch",
):
    """Write embeddings as an encoder does: finished parts are kept, a fresh start goes on."""
    folder = Folder(folder)
    folder.sweep()
    parts = []
    for number, first in enumerate(range(0, len(images), part_rows)):
        rows = slice(first, min(first + part_rows, len(images)))
        key = f"{model} {first}"
        entry = embeddings.finished_part(folder, number, key)
        if entry is None:
            failed = {row - first: "not an image" for row in range(rows.start, rows.stop) if row in skip}
            table = embeddings.part_table(
                images.slice(first, rows.stop - first),
                codes.take(np.arange(rows.start, rows.stop)),
                first_row=first,
                skip=failed,
                keep_images=keep_images,
            )
            errors = [(images["id"][first + place].as_py(), reason) for place, reason in failed.items()]
            entry = embeddings.write_part(folder, number, table, key=key, errors=errors)
        parts.append(entry)
    embeddings.finish(
        folder,
        model=model,
        form=Form.of(codes),
        classes=7,
        class_names=class_names,
        parts=parts,
        source="table-a",
        engine=engine,
        export=None if engine == "torch" else "0" * 64,
    )
    return folder


def files_in(folder):
    """Every file of a directory tree with its bytes."""
    root = Path(str(folder))
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


class KilledError(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed_at_write(monkeypatch, number, *, before_rename):
    """Within the block, the process dies at its write `number`: with a temporary file left, or just after."""
    real, writes = Folder.writing, 0

    @contextmanager
    def writing(self, name):
        nonlocal writes
        writes += 1
        own = writes  # Several files may be open at a time.
        if own == number and before_rename:
            path = Path(self.path) / f"{name}.tmp-dead00000000"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half")
            raise KilledError
        with real(self, name) as stream:
            yield stream
        if own == number:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "writing", writing)
        yield


def assert_same(found, expected):
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.distances, expected.distances)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {"truncated": truncate, "changed": flip, "deleted": Path.unlink}
