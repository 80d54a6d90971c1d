"""Where the rows of new shards come from: embeddings, files of others, or shards that are written anew.

A source gives its rows some at a time: what is known of them, with their descriptors, and once more their
images. What is known has the columns id · label · path · further ones, each of which may be missing. Where
there are no ids, rows are known by numbers that count up, which are not stored. Files of others are in
`importing`.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.descriptors import DescriptorKind, Descriptors, Form
from ray_retrieval.search.columns import descriptors_in
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.selection import Selection
from ray_retrieval.search.shard import Shard, aligned
from ray_retrieval.storage import digest, fingerprint

Rows = npt.NDArray[np.int64]

_ROWS_AT_ONCE, _SETS_AT_ONCE = 1 << 16, 1 << 10
_IMAGES_AT_ONCE = 512


class RowSource(Protocol):
    """Rows to write.

    Several processes may write some of the rows each, so a source can be pickled, and what it gives depends
    on nothing but the rows that are asked for.

    Attributes:
        form: of their descriptors.
        schema: types of what is known of them, of all rows. Without a column `id` the rows have no ids of
            their own, and the index numbers them; without any columns there is nothing but the descriptors.
        fingerprint: stands for all that they are.
    """

    form: Form
    schema: pa.Schema
    fingerprint: str

    def __len__(self) -> int:
        """How many."""
        ...

    def tables(self, start: int, stop: int) -> Iterator[tuple[pa.Table, Descriptors]]:
        """What is known of the rows from one place to another, with their descriptors, in order."""
        ...

    def holds_images(self, start: int, stop: int) -> bool:
        """Whether any of these rows may have its image as bytes."""
        ...

    def images(self, start: int, stop: int) -> Iterator[pa.ChunkedArray]:
        """The images of these rows as bytes, null where there are none."""
        ...


class NewRows(RowSource, Protocol):
    """Rows from outside an index, which it is built from or which are added to it.

    Attributes:
        model: fingerprint of what made the descriptors.
        engines: what computed them in the model's place, where something did.
        class_names: of the classes that labels count in, where they have names.
        where: where the rows lie, for errors.
        next_id: where the rows come from an index that numbered them, the number after all that it has given;
            else None. Where they are no longer 0, 1, 2 and so on, the column `id` is int64 and ascends.
    """

    model: str
    engines: tuple[str, ...]
    class_names: list[str] | None
    where: object
    next_id: int | None

    def id_blocks(self) -> "Iterator[pa.Array] | None":
        """The ids of all rows, large_string, in their order, some at a time; None where they are numbers."""
        ...

    def classes(self) -> Rows:
        """The numbers of the classes that rows have, int64, ascending."""
        ...

    def some(self, kept: "Rows | None", labels: "Rows | None") -> "NewRows":
        """Some of the rows, with other numbers of classes.

        Args:
            kept: int64, ascending: places of the rows; None: all.
            labels: int64: the number to write in place of each class number; None: the same.
        """
        ...


class EmbeddedRows:
    """Rows of embeddings: all of them, or some.

    Args:
        embeddings: their directory.
        kept: int64, ascending: the rows to write; None: all.
        labels: int64: the class number to write for each one of the embeddings; None: the same.

    Attributes:
        embeddings: their directory.
    """

    def __init__(
        self, embeddings: Embeddings, *, kept: Rows | None = None, labels: Rows | None = None
    ) -> None:
        self.form, self.embeddings, self._labels = embeddings.form, embeddings, labels
        self.model, self.class_names = embeddings.model, embeddings.class_names
        self.engines: tuple[str, ...] = () if embeddings.engine == "torch" else (embeddings.engine,)
        self.where: object = embeddings.folder
        self.next_id: int | None = None
        self._kept = kept
        self._columns = [name for name in embeddings.schema.names if name not in ("row", "image")]
        self._before = np.cumsum([0, *(part["rows"] for part in embeddings.parts)])
        self.schema = _known(embeddings)
        self.fingerprint = embeddings.fingerprint
        if kept is not None or labels is not None:
            changes = [None if array is None else digest(array.tobytes()) for array in (kept, labels)]
            self.fingerprint = fingerprint([embeddings.fingerprint, *changes])

    def __len__(self) -> int:
        return self.embeddings.rows if self._kept is None else len(self._kept)

    def id_blocks(self) -> Iterator[pa.Array]:
        for number, places in self._parts(0, len(self)):
            part = _taken(self.embeddings.read_part(number, ["id"]), places)
            yield from part["id"].cast(pa.large_string()).chunks

    def classes(self) -> Rows:
        return classes_of(
            self.embeddings.read_part(number, ["label"])["label"] for number, _ in self._parts(0, len(self))
        )

    def some(self, kept: Rows | None, labels: Rows | None) -> "EmbeddedRows":
        return EmbeddedRows(self.embeddings, kept=kept, labels=labels)

    def tables(self, start: int, stop: int) -> Iterator[tuple[pa.Table, Descriptors]]:
        for number, places in self._parts(start, stop):
            table = self.embeddings.read_part(number, [*self._columns, "image.path"])
            table = _taken(table, places)
            yield self._what_is_known(table), descriptors_in(table, self.form)

    def holds_images(self, start: int, stop: int) -> bool:
        return any(self.embeddings.parts[number]["images"] for number, _ in self._parts(start, stop))

    def images(self, start: int, stop: int) -> Iterator[pa.ChunkedArray]:
        for number, places in self._parts(start, stop):
            table = _taken(self.embeddings.read_part(number, ["image.bytes"]), places)
            yield pc.struct_field(table["image"], "bytes")

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, Rows]]:
        """The parts that hold the rows, and the rows' places there."""
        for number, (first, last) in enumerate(itertools.pairwise(self._before.tolist())):
            if self._kept is None:
                some = np.arange(max(first, start), min(last, stop))
            else:
                wanted = self._kept[start:stop]
                some = wanted[slice(*np.searchsorted(wanted, [first, last]))]
            if len(some):
                yield number, some - first

    def _what_is_known(self, table: pa.Table) -> pa.Table:
        label = table["label"].cast(self.schema.field("label").type)
        columns = {
            "id": table["id"],
            "label": label if self._labels is None else renumbered(label, self._labels),
            "path": pc.struct_field(table["image"], "path"),
        }
        for name in self.schema.names[len(columns) :]:
            columns[name] = table[name].cast(self.embeddings.schema.field(name).type)
        return pa.table(columns)


@dataclass
class ShardRows:
    """Rows of shards, to be written anew.

    Attributes:
        shards: opened, in ascending order of rows.
        kept: which of their rows to write.
        form: of their descriptors.
        schema: of the whole index, without the row's number.
        fingerprint: stands for all that they are.
        skipped: so many of the kept rows, the first ones, are none of these.
    """

    shards: Sequence[Shard]
    kept: Selection
    form: Form
    schema: pa.Schema
    fingerprint: str
    skipped: int = 0

    def __post_init__(self) -> None:
        # An index has these columns also where no shard stores them.
        fields = (field for field in self.schema if field.name in ("label", "path"))
        for field in [field for field in fields if pa.types.is_null(field.type)]:
            self.schema = self.schema.remove(self.schema.get_field_index(field.name))

    def __len__(self) -> int:
        return len(self.kept) - self.skipped

    def tables(self, start: int, stop: int) -> Iterator[tuple[pa.Table, Descriptors]]:
        step = _SETS_AT_ONCE if self.form.kind is DescriptorKind.LOCAL else _ROWS_AT_ONCE
        for shard, places in self._places(start, stop, step):
            yield aligned(shard.rows.take(places), self.schema), shard.descriptors(places)

    def holds_images(self, start: int, stop: int) -> bool:
        first, last = self.kept.at(np.array([start, stop - 1]) + self.skipped)
        return any(
            shard.holds_images
            for shard in self.shards
            if shard.entry.first_row <= last and first < shard.entry.first_row + shard.entry.rows
        )

    def images(self, start: int, stop: int) -> Iterator[pa.ChunkedArray]:
        for shard, places in self._places(start, stop, _IMAGES_AT_ONCE):
            images = [shard.image(place) for place in places.tolist()]
            yield pa.chunked_array([pa.array(images, pa.large_binary())])

    def first_id(self, start: int, stop: int) -> int | None:
        """The first of the rows' ids, if these are numbers that count on from there; else None."""
        if not pa.types.is_int64(self.schema.field("id").type):
            return None
        first, last = (self._id_at(place) for place in (start, stop - 1))
        return first if last - first == stop - 1 - start else None

    def _id_at(self, place: int) -> int:
        ((shard, places),) = self._places(place, place + 1, 1)
        return int(shard.rows.ids_at(places)[0])

    def _places(self, start: int, stop: int, step: int) -> Iterator[tuple[Shard, Rows]]:
        for cut in range(start, stop, step):
            rows = self.kept.at(np.arange(cut, min(cut + step, stop)) + self.skipped)
            numbers, places, _ = self.kept.spans.place(rows)
            for number in np.unique(numbers).tolist():
                yield self.shards[number], places[numbers == number]


def _known(embeddings: Embeddings) -> pa.Schema:
    """Types of what is known of the rows of embeddings."""
    left_out = {"row", "image", "id", "label", *embeddings.descriptor_columns}
    further = [field for field in embeddings.schema if field.name not in left_out]
    label = embeddings.schema.field("label")
    return pa.schema([pa.field("id", pa.string()), label, pa.field("path", pa.string()), *further])


def _taken(table: pa.Table, places: Rows) -> pa.Table:
    """Rows of a table at some places; without a copy where they follow each other."""
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places):
        return table.slice(first, len(places))
    return table.take(pa.array(places))


def classes_of(labels: Iterable[Any]) -> Rows:
    """The numbers, int64, ascending, in columns of labels: one each, several, or none."""
    found = np.zeros(0, np.int64)
    for column in labels:
        values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        found = np.union1d(found, np.asarray(pc.unique(values.drop_null()).cast(pa.int64())))
    return found


def renumbered(label: pa.ChunkedArray, numbers: Rows) -> Any:
    """Labels with other numbers of classes: one each, several, or none."""
    moved, column = pa.array(numbers), label.combine_chunks()
    if pa.types.is_null(column.type):
        return label
    if not pa.types.is_list(column.type):
        return pa.chunked_array([moved.take(column)])
    offsets, mask = column.offsets, pc.is_null(column) if column.null_count else None
    items = moved.take(column.values)
    return pa.chunked_array([pa.ListArray.from_arrays(offsets, items, mask=mask)])
