"""Databases to search: codes and vectors made on the spot, the same every time, and embeddings of them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import Codes, Descriptors, Form, Vectors
from ray_retrieval.search import embeddings
from ray_retrieval.storage import Folder

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

PART = 65_536
"""Rows of a part of embeddings."""

_AT_ONCE = 1 << 20
_HIDDEN = 20  # dimensions near which the points of clustered data lie


def unit_vectors(count: int, dimension: int, seed: int, hidden: int = _HIDDEN) -> Floats:
    """Points of a subspace that is the same for every seed, with noise: float32 [count, dimension]."""
    random = np.random.default_rng(seed)
    directions = np.random.default_rng(0).standard_normal((hidden, dimension), np.float32)
    points = random.standard_normal((count, hidden), np.float32) @ directions
    points += 0.5 * random.standard_normal((count, dimension), np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points


def clustered_vectors(count: int, dimension: int, seed: int, clusters: int = 10_000) -> Floats:
    """Points around `unit_vectors`, which are the same for every seed: float32 [count, dimension].

    Each is the middle of a cluster, drawn at random, moved within the subspace by half of what tells two
    clusters apart, with noise in all dimensions, so that a row's nearest ones are mostly of its own cluster.
    """
    random = np.random.default_rng(seed)
    of_clusters = np.random.default_rng(0)
    directions = of_clusters.standard_normal((_HIDDEN, dimension), np.float32)
    middles = of_clusters.standard_normal((clusters, _HIDDEN), np.float32)
    found = np.empty((count, dimension), np.float32)
    for start in range(0, count, _AT_ONCE):
        some = found[start : start + _AT_ONCE]
        hidden = middles[random.integers(0, clusters, len(some))]
        hidden += 0.5 * random.standard_normal(hidden.shape, np.float32)
        np.matmul(hidden, directions, out=some)
        some += 0.5 * random.standard_normal(some.shape, np.float32)
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    return found


def clustered_codes(count: int, bits: int, seed: int) -> Bytes:
    """The signs of `clustered_vectors`, as learned codes are made: uint8 [count, ceil(bits / 8)]."""
    starts = range(0, count, _AT_ONCE)
    parts = [
        np.packbits(clustered_vectors(min(_AT_ONCE, count - start), bits, seed + 1_000 * number) >= 0, axis=1)
        for number, start in enumerate(starts)
    ]
    return np.concatenate(parts)


@contextmanager
def mapped_codes(folder: Path, rows: int, width: int) -> Iterator[Bytes]:
    """Uniform codes, uint8 [rows, width], in a file that is mapped into memory and deleted at the end."""
    path, random = folder / f"codes-{rows}.bin", np.random.default_rng(rows)
    with path.open("wb") as stream:
        for start in range(0, rows, _AT_ONCE):
            stream.write(random.bytes(width * min(_AT_ONCE, rows - start)))
    try:
        yield np.memmap(path, np.uint8, "r").view(np.ndarray).reshape(rows, width)
    finally:
        path.unlink()


def paths_of(count: int) -> ImageTable:
    """Images in a bucket: paths of 47 characters, ids of 13."""
    numbers = pa.array(np.arange(count))
    digits = _padded(numbers, 12)
    folders = _padded(pc.divide(numbers, 1000), 6)
    head, slash, tail = (pa.scalar(text) for text in ("s3://bucket/photographs/", "/", ".jpg"))
    paths = pc.binary_join_element_wise(head, folders, slash, digits, tail, "")
    images = pa.StructArray.from_arrays([pa.nulls(count, pa.large_binary()), paths], names=["bytes", "path"])
    ids = pc.binary_join_element_wise(pa.scalar("i"), digits, "")
    table = pa.table({"id": ids, "image": images, "label": pa.array(np.arange(count) % 1000)})
    return ImageTable(table, name="paths")


def write_embeddings(
    out: Folder, table: ImageTable, form: Form, described: Callable[[slice], Descriptors]
) -> None:
    """Embeddings of images, as an encoder writes them."""
    parts: list[dict[str, Any]] = []
    for number, first in enumerate(range(0, len(table), PART)):
        some = slice(first, first + PART)
        rows = embeddings.part_table(table.table[some], described(some), first_row=first, skip={})
        parts.append(embeddings.write_part(out, number, rows, key="", errors=[]))
    embeddings.finish(
        out, model="0" * 16, form=form, classes=1000, class_names=None, parts=parts, source=table.fingerprint
    )


def embedded(out: Folder, descriptors: Codes | Vectors) -> None:
    """Embeddings of images in a bucket that have these descriptors."""

    def some(rows: slice) -> Descriptors:
        if isinstance(descriptors, Codes):
            return Codes(descriptors.data[rows], descriptors.bits)
        return Vectors(descriptors.data[rows])

    write_embeddings(out, paths_of(len(descriptors.data)), Form.of(descriptors), some)


def usual_factory(rows: int, dimension: int) -> str:
    """What `auto` takes for a million vectors, for any number: about √rows cells, 4 bits for 2 dimensions."""
    return f"IVF{2 ** round(math.log2(math.sqrt(rows)))},PQ{dimension // 2}x4fs"


def _padded(numbers: pa.Array, width: int) -> pa.Array:
    return pc.utf8_lpad(numbers.cast(pa.string()), width=width, padding="0")
