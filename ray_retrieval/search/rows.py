"""What is known of the rows of a shard, beside their descriptors.

`rows.arrow` holds record batches of id · label · path · further columns; where nothing is known there is no
such file. A row's number is not stored, as it follows from its place. Nor are ids that are numbers and count
on from row to row, as they do where rows came without any: then the shard's entry names the first. Ids that
are numbers and have gaps, because rows between them were removed, are a column of int64.
"""

import bisect
import functools
import itertools
import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.search.column_values import plain

Places = npt.NDArray[np.int64]

_BATCH_ROWS = 1 << 18
"""Rows that are in memory at a time, when they are written and when a filter looks at them."""
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


class RowsWriter:
    """Takes what is known of rows, some at a time, and writes record batches of equal length.

    Args:
        stream: of the file.
        schema: of what is known of all rows of the source; a column may be null in what is taken.
        stored_ids: whether the ids are stored, if there are any.
    """

    def __init__(self, stream: IO[bytes], schema: pa.Schema, *, stored_ids: bool) -> None:
        self._schema = stored_schema(schema, stored_ids=stored_ids)
        self._writer = pa.ipc.new_file(stream, self._schema)
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        columns = [table[field.name].cast(field.type) for field in self._schema]
        self._waiting.append(pa.table(columns, schema=self._schema))
        self._rows += len(table)
        if self._rows >= _BATCH_ROWS:
            self._write(self._rows - self._rows % _BATCH_ROWS)

    def finish(self) -> None:
        """Write what is left."""
        self._write(self._rows)
        self._writer.close()

    def _write(self, rows: int) -> None:
        """Write the first of the waiting rows."""
        table = pa.concat_tables([self._schema.empty_table(), *self._waiting])
        for start in range(0, rows, _BATCH_ROWS):
            some = table.slice(start, min(_BATCH_ROWS, rows - start))
            # Copied, so that the bytes depend on the values alone, not on where these came from.
            columns = [column.combine_chunks() for column in some.columns]
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._waiting, self._rows = [table.slice(rows)], self._rows - rows


def stored_schema(schema: pa.Schema, *, stored_ids: bool) -> pa.Schema:
    """Types of the columns in the file; text and bytes have 64-bit offsets, which no number exceeds."""
    left_out = {"row"} if stored_ids else {"row", "id"}
    return pa.schema([(field.name, _wide(field.type)) for field in schema if field.name not in left_out])


def _wide(kind: pa.DataType) -> pa.DataType:
    kind = plain(kind)
    return {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}.get(kind, kind)


class KnownRows:
    """What is known of the rows of an opened shard, in record batches that are mapped into memory.

    Args:
        batches: of the file; none where it has none.
        rows: in the shard.
        first_row: number of the first.
        first_id: its id, where the ids count on from there; None where they are stored.

    Attributes:
        schema: row · id · label · path · further columns.
        numbered: whether the ids are numbers, which then ascend.

    Raises:
        ValueError: if the batches do not hold so many rows.
    """

    def __init__(
        self, batches: list[pa.RecordBatch], rows: int, first_row: int, first_id: int | None
    ) -> None:
        self._batches, self._rows, self._first_row, self._first_id = batches, rows, first_row, first_id
        self._starts = list(itertools.accumulate(map(len, batches), initial=0))
        if batches and self._starts[-1] != rows:
            raise ValueError(f"it should hold {rows} rows")
        stored = list(batches[0].schema) if batches else []
        if first_id is None and "id" not in [field.name for field in stored]:
            raise ValueError("it should hold ids")
        made = [pa.field("row", pa.int64()), *([pa.field("id", pa.int64())] if first_id is not None else [])]
        # Earlier releases stored the number of each row as well.
        self.schema = pa.schema([*made, *(field for field in stored if field.name != "row")])
        self.numbered: bool = pa.types.is_int64(self.schema.field("id").type)

    def __len__(self) -> int:
        return self._rows

    def take(self, places: Places) -> pa.Table:
        """The rows at some places, in the order asked; repeats are allowed."""
        if len(self._batches) < 2:
            known = self._batches[0].take(pa.array(places)) if self._batches else None
            return pa.table(self._columns(known, places), schema=self.schema)
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        parts = [
            pa.Table.from_batches([self._batches[n].take(pa.array(places[numbers == n] - self._starts[n]))])
            for n in np.unique(numbers)
        ]
        known = pa.concat_tables(parts or [pa.Table.from_batches([self._batches[0].slice(0, 0)])])
        if len(parts) > 1:
            # The rows now stand batch by batch; the inverse of that reordering brings them back.
            known = known.take(pa.array(np.argsort(np.argsort(numbers, kind="stable"))))
        return pa.table(self._columns(known, places), schema=self.schema)

    def blocks(self) -> Iterator[pa.RecordBatch]:
        """All rows, some at a time, in order."""
        if not self._batches:
            for start in range(0, self._rows, _BATCH_ROWS):
                places = np.arange(start, min(start + _BATCH_ROWS, self._rows))
                yield pa.record_batch(self._columns(None, places), schema=self.schema)
        for batch, start in zip(self._batches, self._starts, strict=False):
            places = np.arange(start, start + len(batch))
            yield pa.record_batch(self._columns(batch, places), schema=self.schema)

    def column(self, name: str) -> pa.ChunkedArray:
        """A stored column, which is not read before it is looked at."""
        kind = self.schema.field(name).type
        return pa.chunked_array([batch[name] for batch in self._batches], kind)

    def place_of(self, identifier: str) -> int | None:
        """Place of the row with that id, or None; where ids are text, the first call sorts them."""
        if self.numbered:
            found = self.places_of_numbers(np.array(numbers_in([identifier]), np.int64))
            return int(found[0]) if len(found) else None
        ids, order = self.column("id"), self._order
        place = bisect.bisect_left(order, identifier, key=lambda place: ids[place].as_py())
        if place == len(order) or ids[int(order[place])].as_py() != identifier:
            return None
        return int(order[place])

    def ids(self) -> Iterator[tuple[int, pa.Array]]:
        """The stored ids as text, some at a time, each with the place of the first of them."""
        for batch, start in zip(self._batches, self._starts, strict=False):
            for cut in range(0, len(batch), _BATCH_ROWS):
                yield start + cut, batch["id"].slice(cut, _BATCH_ROWS).cast(pa.large_string())

    def ids_at(self, places: Places) -> Places:
        """int64 [n]: numbers by which the rows at some places are known, where they are numbers."""
        if self._first_id is not None:
            return places + self._first_id
        return np.asarray(self.take(places)["id"], np.int64)

    def places_of_numbers(self, numbers: Places) -> Places:
        """int64, ascending: places of the rows with some ids, ascending, where ids are numbers."""
        if self._first_id is not None:
            places = numbers - self._first_id
            return places[(places >= 0) & (places < self._rows)]
        found = [np.zeros(0, np.int64)]
        for batch, start in zip(self._batches, self._starts, strict=False):
            ids = np.asarray(batch["id"])
            places = np.minimum(np.searchsorted(ids, numbers), len(ids) - 1)
            found.append(places[ids[places] == numbers] + start)
        return np.concatenate(found)

    @functools.cached_property
    def _order(self) -> npt.NDArray[np.uint64]:
        """Places in ascending order of ids: 8 bytes a row, made at the first look-up."""
        order: npt.NDArray[np.uint64] = pc.sort_indices(self.column("id")).to_numpy()
        return order

    def _columns(self, stored: "pa.Table | pa.RecordBatch | None", places: Places) -> list[Any]:
        """The columns of the rows at some places, of which some are not stored."""
        made = [pa.array(places + self._first_row)]
        if self._first_id is not None:
            made.append(pa.array(places + self._first_id))
        return made + ([] if stored is None else [stored[name] for name in self.schema.names[len(made) :]])


def numbers_in(ids: list[str]) -> list[int]:
    """The ids that are numbers as rows have them: without sign, or zeros in front."""
    return [int(text) for text in ids if _NUMBER.fullmatch(text)]


def ids_as_text(table: pa.Table) -> pa.Table:
    """Rows with their ids as text, also where these are numbers."""
    place = table.schema.get_field_index("id")
    if not pa.types.is_int64(table.schema.field(place).type):
        return table
    return table.set_column(place, "id", table["id"].cast(pa.large_string()))
