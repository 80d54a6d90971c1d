"""Parquet files of many images, each of which is read alone: by its place in the file.

A JPEG does not get smaller by compression, so the column of bytes is stored plain: the bytes of each image
then stand in the file as they are, and `path/of/shard.parquet#bytes=FIRST-LAST` is an address of it, like a
path. Any reader of Parquet reads the files (columns id, label, image {bytes, path}: the Hugging Face image
layout); a table of addresses reads single images in any order, without a row group around each.

Reference: github.com/apache/parquet-format, Encodings.md, PLAIN: 4 bytes of length, little-endian, and the
value.
"""

import mmap
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_retrieval.data.columns import IMAGE_TYPE
from ray_retrieval.data.table import IntArray
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder

SCHEMA = pa.schema([("id", pa.string()), ("label", pa.int64()), ("image", IMAGE_TYPE)])
"""Columns of a shard."""
ROW_GROUP = 256
"""Images a row group: some 30 MB of photographs, which is what a sequential reader holds."""
_BYTES = "image.bytes"


def write(folder: Folder, name: str, groups: Iterable[pa.Table]) -> None:
    """Write a shard, a row group for each table of `SCHEMA`; the file is there when all of it is."""
    with (
        folder.writing(name) as stream,
        pq.ParquetWriter(
            stream,
            SCHEMA,
            compression={"id": "zstd", "label": "zstd", _BYTES: "none", "image.path": "zstd"},
            use_dictionary=["label"],
            column_encoding={_BYTES: "PLAIN"},
            write_statistics=["id", "label"],
        ) as writer,
    ):
        for group in groups:
            if len(group):
                writer.write_table(group, row_group_size=len(group))


def byte_ranges(folder: Folder, name: str) -> tuple[IntArray, IntArray]:
    """Where the bytes of each image of a shard stand: int64 [n] the first byte, int64 [n] how many.

    Args:
        folder: on a local disk.
        name: a file that `write` wrote. No image may be null.

    Raises:
        DataError: if the bytes are compressed or encoded.
        ArtefactError: if the file is missing.
    """
    path = folder.local_path(name)
    starts, lengths = [], []
    with open(path, "rb") as stream, pq.ParquetFile(path) as reader:
        if not reader.metadata.num_rows:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for group in range(reader.num_row_groups):
                column = _bytes_column(reader.metadata.row_group(group), str(path))
                values = reader.read_row_group(group, columns=[_BYTES])["image"]
                data = pc.struct_field(values.combine_chunks(), "bytes")
                place, end = column.data_page_offset, column.data_page_offset + column.total_compressed_size
                for value in data:
                    view = value.as_buffer()
                    place = _find(mapped, view, place, end, str(path))
                    starts.append(place)
                    lengths.append(len(view))
                    place += len(view)
    return np.array(starts, np.int64), np.array(lengths, np.int64)


def addresses(name: str, starts: IntArray, lengths: IntArray) -> pa.Array:
    """Where images stand in one file, as locations: string [n], `name#bytes=FIRST-LAST`."""
    first = pa.array(starts, pa.int64()).cast(pa.string())
    last = pa.array(starts + lengths - 1, pa.int64()).cast(pa.string())
    return pc.binary_join_element_wise(f"{name}#bytes=", pc.binary_join_element_wise(first, last, "-"), "")


def in_groups(rows: IntArray) -> Iterator[IntArray]:
    """Pieces of `ROW_GROUP` rows, int64 [m], the last perhaps shorter; none of no rows."""
    for start in range(0, len(rows), ROW_GROUP):
        yield rows[start : start + ROW_GROUP]


def _bytes_column(group: Any, where: str) -> Any:
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == _BYTES)
    if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
        raise DataError("the images are compressed or encoded: they have no address", where=where)
    return column


def _find(mapped: mmap.mmap, value: pa.Buffer, place: int, end: int, where: str) -> int:
    """The first byte of a value that stands at or shortly behind a place: page headers come between."""
    head = struct.pack("<I", len(value)) + value[:64].to_pybytes()
    found = mapped.find(head, place, end)
    with memoryview(mapped) as view:
        if found < 0 or view[found + 4 : found + 4 + len(value)] != memoryview(value).cast("B"):
            raise DataError("an image does not stand in the file as it is", where=where)
    return found + 4
