"""Descriptors in tables: a column of a Parquet or Arrow file, read some rows at a time."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_retrieval.errors import DataError
from ray_retrieval.search.column_values import holds_descriptors, shape_of, values_of
from ray_retrieval.search.columns import own_metadata
from ray_retrieval.search.vector_files import (
    BLOCK_ROWS,
    Block,
    absolute,
    bare,
    block_rows,
    chosen,
    readable,
    split,
    suffix_of,
)
from ray_retrieval.storage import fingerprint

_OWN_NAMES = ("code", "vector")
"""Of the columns of descriptors in tables that this package writes."""


class TableFile:
    """A column of descriptors in a Parquet or Arrow file, beside others.

    Args:
        place: a path or URI.
        column: name of the column; None: `code`, `vector`, or the only one that holds lists of numbers or
            bytes of a fixed length.

    Raises:
        ArtefactError: if the file is missing.
        DataError: if it is no such file, or it is not clear which column is meant.
    """

    def __init__(self, place: str, column: str | None) -> None:
        self.where, self._table = place, open_table(place)
        whole, self.rows = self._table.schema, self._table.rows
        if {"descriptors", "locations"} <= set(whole.names) and column is None:
            raise DataError("sets of local features are not read from files of others", where=place)
        self._name = chosen(column, whole.names, columns_of_descriptors(whole), place)
        field = whole.field(self._name)
        self.shape = shape_of(field, self._first, place)
        self.schema = pa.schema([other.remove_metadata() for other in whole if other.name != self._name])
        self.model, self.class_names = own_metadata(whole, place)

    def __reduce__(self) -> Any:
        """In another process the file is opened anew."""
        return TableFile, (absolute(self.where), self._name)

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        names, first = [self._name, *self.schema.names], start
        for batch in self._table.batches(names, start, stop, block_rows(self.shape.bytes)):
            values = values_of(batch[self._name], self.shape, f"{self.where}, column '{self._name}'", first)
            first += len(batch)
            known = batch.select(self.schema.names) if self.schema.names else None
            yield values, bare(len(batch)) if known is None else pa.Table.from_batches([known])

    def column(self, name: str) -> Iterator[pa.Array]:
        return (batch[name] for batch in self._table.batches([name], 0, self.rows, BLOCK_ROWS))

    def checksum(self) -> str:
        folder, name = split(self.where)
        return fingerprint([folder.checksum(name), self._name])

    def _first(self) -> pa.Array:
        """The column's value of the first row."""
        if self.rows == 0:
            raise DataError("there are no rows", where=self.where, mend="give a file of some")
        return next(self._table.batches([self._name], 0, 1, 1))[self._name]


class AnyTable(Protocol):
    """A file of columns.

    Attributes:
        rows: how many.
        schema: of all columns.
    """

    rows: int
    schema: pa.Schema

    def batches(self, names: list[str], start: int, stop: int, step: int) -> Iterator[pa.RecordBatch]:
        """Some columns of the rows from one place to another, at most `step` rows at a time."""
        ...


def open_table(place: str) -> AnyTable:
    """A Parquet or Arrow file.

    Raises:
        ArtefactError: if it is missing.
        DataError: if it is no such file, or two of its columns have the same name.
    """
    with readable(place, pa.ArrowException):
        table: AnyTable = _Parquet(place) if suffix_of(place) == ".parquet" else _Arrow(place)
    twice = [name for name, count in Counter(table.schema.names).items() if count > 1]
    if twice:
        raise DataError(
            f"columns stand more than once: {', '.join(repr(name) for name in twice)}",
            where=place,
            mend="give every column a name of its own",
        )
    return table


class _Parquet:
    """Row groups are read one after another, each as a stream."""

    def __init__(self, place: str) -> None:
        self._folder, self._name = split(place)
        self._where = place
        with self._folder.reading(self._name) as source:
            file = pq.ParquetFile(source)
            self.schema = file.schema_arrow
            groups = range(file.metadata.num_row_groups)
            sizes = [file.metadata.row_group(number).num_rows for number in groups]
        self._before = np.cumsum([0, *sizes])
        self.rows = int(self._before[-1])

    def batches(self, names: list[str], start: int, stop: int, step: int) -> Iterator[pa.RecordBatch]:
        first = int(np.searchsorted(self._before, start, side="right")) - 1
        groups = [number for number in range(first, len(self._before) - 1) if self._before[number] < stop]
        at = int(self._before[first])
        with self._folder.reading(self._name) as source:
            file = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
            with readable(self._where, pa.ArrowException):
                for batch in file.iter_batches(step, row_groups=groups, columns=names, use_threads=False):
                    low, high = max(start - at, 0), min(stop - at, len(batch))
                    at += len(batch)
                    if low < high:
                        yield batch.slice(low, high - low)


class _Arrow:
    """Batches are mapped into memory, or unpacked one at a time."""

    def __init__(self, place: str) -> None:
        folder, name = split(place)
        self._file = pa.ipc.open_file(pa.memory_map(str(folder.local_path(name))))
        self._where, self.schema = place, self._file.schema
        sizes = [len(self._file.get_batch(number)) for number in range(self._file.num_record_batches)]
        self._before = np.cumsum([0, *sizes])
        self.rows = int(self._before[-1])

    def batches(self, names: list[str], start: int, stop: int, step: int) -> Iterator[pa.RecordBatch]:
        for number, first in enumerate(self._before[:-1].tolist()):
            low, high = max(start, first), min(stop, int(self._before[number + 1]))
            if low >= high:
                continue
            with readable(self._where, pa.ArrowException):
                batch = self._file.get_batch(number).select(names)
            for cut in range(low, high, step):
                yield batch.slice(cut - first, min(step, high - cut))


def columns_of_descriptors(schema: pa.Schema) -> list[str]:
    """Those that may hold descriptors: of our own names, where these are of a fitting type; else all such."""
    own = [
        name
        for name in _OWN_NAMES
        if name in schema.names and holds_descriptors(schema.field(name).type, of_any_length=True)
    ]
    return own or [field.name for field in schema if holds_descriptors(field.type)]
