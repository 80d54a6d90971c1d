"""A table of images: one row an image, whatever form they came in.

table = open_images("photos/")            # folder, list, CSV, Parquet: see `readers`
table.ids, table.labels                   # list of str, int64 [n]
table.image_bytes(0)                      # the file's bytes; nothing is decoded here
table.take(np.array([5, 7, 9]))           # a few rows; the images are shared, not copied
"""

import bisect
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.data import location, positives, readers
from ray_retrieval.data.columns import (
    IMAGE_TYPE,
    as_text,
    canonical_images,
    canonical_labels,
    refuse_repeated,
)
from ray_retrieval.data.decode import MAX_BYTES
from ray_retrieval.errors import DataError

_MEANT = frozenset({"label", "labels", "class", "classes", "category", "target"})
"""What a column of labels is called elsewhere."""
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class ImageTable:
    """Images with ids and labels, lazily read.

    Args:
        table: columns `id` string, unique · `image` struct of bytes (large_binary) and path, either filled ·
            `label` int64, or list<int64>, or null or absent · any further columns, which are kept. Of these,
            two are known. `box`: a list of 4 numbers, left, top, right, bottom in pixels of the upright
            image, or null: what lies outside is no part of the image. `positives`: a list of the rows of this
            same table that match the row, or null. `take` and `concatenate` number them anew, and leave out
            those that are not taken.
        name: what the table is called in messages.
        class_names: names of the classes, in the order of the labels.
        classes: number of classes; default the names', or else the highest label + 1.

    Raises:
        DataError: if a column is missing or stands twice, an id is missing, stands twice or is no text,
            `box` holds no lists of numbers, or a positive is no row.
    """

    def __init__(
        self, table: pa.Table, *, name: str, class_names: list[str] | None = None, classes: int | None = None
    ) -> None:
        refuse_repeated(table.column_names, where=name)
        for column in ("id", "image"):
            if column not in table.column_names:
                raise DataError(f"a table of images has a column '{column}'", where=name)
        ids = as_text(table["id"], "id", where=name)
        _check_ids(ids, name)
        label = table["label"] if "label" in table.column_names else pa.nulls(len(table))
        label, class_names = canonical_labels(label, class_names, where=name)
        rest = table.drop_columns([c for c in ("image", "label") if c in table.column_names])
        rest = rest.set_column(rest.column_names.index("id"), "id", ids).add_column(1, "label", label)
        if "box" in rest.column_names:
            _refuse_no_boxes(rest["box"].type, name)
        if "positives" in rest.column_names:
            rest = _with_positives(rest, positives.canonical(rest["positives"], where=name))
        images = _chunked(table["image"])
        if images.type != IMAGE_TYPE:
            images = canonical_images(images, "", where=name)
        self._assign(
            rest=rest, images=_Images(images), rows=None, name=name, class_names=class_names, classes=classes
        )

    def _assign(
        self,
        *,
        rest: pa.Table,
        images: "_Images",
        rows: IntArray | None,
        name: str,
        class_names: list[str] | None,
        classes: int | None,
    ) -> None:
        self.name = name
        self.class_names = class_names
        self._rest = rest
        self._images = images
        # Rows of `images` that this table shows; None for all of them.
        self._rows = rows
        self._classes = classes

    def __len__(self) -> int:
        return int(self._rest.num_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process gets the images of this table alone, not those of the one that it was taken from.
        return _restore, (self.table, self.name, self.class_names, self.classes)

    def __repr__(self) -> str:
        return f"ImageTable({self.name!r}, {len(self)} images, {self.classes} classes)"

    @property
    def table(self) -> pa.Table:
        """The Arrow table: id · image · label · further columns. Copies the images after a `take`."""
        images = self._images.column if self._rows is None else self._images.column.take(pa.array(self._rows))
        return self._rest.add_column(1, "image", images)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns of `table`, without copying it."""
        id_, *rest = self._rest.column_names
        return [id_, "image", *rest]

    @functools.cached_property
    def ids(self) -> list[str]:
        """The ids, in row order."""
        return list(self._rest["id"].to_pylist())

    @property
    def id_column(self) -> pa.ChunkedArray:
        """`ids` as an Arrow column: string [n], without a Python object for each row."""
        return self._rest["id"]

    @property
    def paths(self) -> list[str | None]:
        """Where each image lies, or what its file was called; None where nothing is known."""
        return list(self.path_column.to_pylist())

    @property
    def path_column(self) -> pa.ChunkedArray:
        """`paths` as an Arrow column: string [n], without a Python object for each row."""
        column = self._images.paths
        return column if self._rows is None else column.take(pa.array(self._rows))

    @property
    def is_multilabel(self) -> bool:
        """Whether an image can have several labels."""
        return bool(pa.types.is_list(self._label.type))

    @property
    def has_labels(self) -> bool:
        """Whether there are labels at all; single rows may still lack theirs."""
        return not pa.types.is_null(self._label.type) and (
            self._label.null_count < len(self) or not len(self)
        )

    @functools.cached_property
    def unlabelled(self) -> IntArray:
        """int64 [m], ascending: the rows without a label, or with an empty list of labels."""
        none = self._label.is_null()
        if self.is_multilabel:
            none = pc.or_kleene(none, pc.equal(pc.list_value_length(self._label), 0))
        return np.flatnonzero(np.asarray(none))

    @functools.cached_property
    def classes(self) -> int:
        """Number of classes; 0 without labels."""
        if self._classes is not None:
            return self._classes
        if self.class_names is not None:
            return len(self.class_names)
        labels = self._label.flatten() if self.is_multilabel else self._label
        highest = pc.max(labels).as_py() if self.has_labels and len(labels) else None
        return 0 if highest is None else int(highest) + 1

    @property
    def stated_classes(self) -> int | None:
        """`classes`, where neither names nor labels tell it: lists of 0 and 1 do, by their width."""
        return self._classes

    @functools.cached_property
    def labels(self) -> IntArray | BoolArray:
        """int64 [n] class indices, or bool [n, classes] multi-hot where images have several. Read-only.

        Raises:
            DataError: naming the first row without a label. An empty list of labels is one: no class applies.
        """
        label = self._label
        if label.null_count or pa.types.is_null(label.type):
            if not len(self):
                return np.zeros(0, dtype=np.int64)
            row = int(np.flatnonzero(np.asarray(label.is_null()))[0])
            mend = "give class folders, a list with labels, or a label column"
            meant = [name for name in self.column_names if name != "label" and name.lower() in _MEANT]
            if meant and not self.has_labels:
                mend = f"call the column '{meant[0]}' label"
            raise DataError(
                f"{'no image has a label' if not self.has_labels else f'row {row} has no label'}: "
                f"the first without is '{self._rest['id'][row]}'",
                where=self.name,
                mend=mend,
            )
        values: IntArray | BoolArray
        if self.is_multilabel:
            values = np.zeros((len(self), self.classes), dtype=np.bool_)
            lengths = np.asarray(pc.list_value_length(label))
            values[np.repeat(np.arange(len(self)), lengths), np.asarray(label.flatten())] = True
        else:
            values = np.array(label, dtype=np.int64)
        values.flags.writeable = False
        return values

    def column(self, name: str) -> pa.Array | None:
        """A further column [n] in row order; None where the table has none of that name."""
        return _one_array(self._rest[name]) if name in self._rest.column_names else None

    @functools.cached_property
    def _boxes(self) -> list[list[float] | None] | None:
        boxes = self.column("box")
        if boxes is None or boxes.null_count == len(boxes):
            return None
        found: list[list[float] | None] = boxes.cast(pa.list_(pa.float64()), safe=False).to_pylist()
        for row, box in enumerate(found):
            if box is not None and not _is_box(box):
                raise DataError(
                    "a box is left, top, right, bottom, four finite numbers with left < right and "
                    f"top < bottom, got {box}",
                    where=f"{self.name}, image '{self._rest['id'][row]}'",
                )
        return found

    def box(self, row: int) -> list[float] | None:
        """Left, top, right, bottom in pixels of the upright image: all that counts of it. None: all of it.

        Raises:
            DataError: if any of the table's boxes is none.
        """
        return None if self._boxes is None else self._boxes[row]

    def class_name(self, index: int) -> str:
        """The name of a class, or its number where classes have no names."""
        return str(index) if self.class_names is None else self.class_names[index]

    def take(self, rows: npt.NDArray[np.integer[Any]], *, name: str | None = None) -> "ImageTable":
        """The table of some rows, in the order given and without repeats; the images are not copied.

        The column `positives` names the rows of the new table; pairs of which only one row is taken are gone.

        Args:
            rows: integers [m].
            name: what the new table is called; default the same.
        """
        index = np.asarray(rows, dtype=np.int64)
        inner = index if self._rows is None else self._rows[index]
        rest = self._rest.take(pa.array(index)) if len(index) else self._rest.slice(0, 0)
        listed = self.column("positives")
        if listed is not None:
            rest = _with_positives(rest, positives.taken(listed, index))
        part = ImageTable.__new__(ImageTable)
        part._assign(
            rest=rest,
            images=self._images,
            rows=inner,
            name=name or self.name,
            class_names=self.class_names,
            classes=self.classes,
        )
        return part

    def with_classes(self, class_names: list[str]) -> "ImageTable":
        """The same images with labels that count in another list of class names.

        Raises:
            DataError: if the table's classes have no names, or one is not in the list.
        """
        if self.class_names is None:
            raise DataError("the classes have no names", where=self.name)
        if self.class_names == class_names:
            return self
        number = {name: index for index, name in enumerate(class_names)}
        missing = [name for name in self.class_names if name not in number]
        if missing:
            raise DataError(f"class '{missing[0]}' is not among the class names", where=self.name)
        moved = pa.array([number[name] for name in self.class_names], pa.int64())
        return self._relabelled(_with_values(self._label, moved.take), class_names)

    def with_lists(self) -> "ImageTable":
        """The same images with a list of labels each, of one where they have one."""
        label = self._label
        if self.is_multilabel or pa.types.is_null(label.type):
            return self
        offsets = np.concatenate([[0], np.cumsum(np.asarray(label.is_valid()))]).astype(np.int32)
        mask = label.is_null() if label.null_count else None
        lists = pa.ListArray.from_arrays(pa.array(offsets), label.drop_null(), mask=mask)
        return self._relabelled(lists, self.class_names, self._classes)

    def among(self, classes: int) -> "ImageTable":
        """The same images, whose labels are of so many classes, at least `self.classes`."""
        return self._relabelled(self._label, self.class_names, classes)

    @functools.cached_property
    def classes_present(self) -> IntArray:
        """int64 [c], ascending: the classes that images have."""
        labels = self._label.flatten() if self.is_multilabel else self._label
        return np.sort(np.asarray(pc.unique(labels.drop_null()).cast(pa.int64())))

    def named_by_number(self) -> "ImageTable":
        """The same images with the classes that they have as 0…C−1, named by their numbers, in that order.

        Raises:
            DataError: if the classes have names.
        """
        if self.class_names is not None:
            raise DataError("the classes have names", where=self.name)
        present = pa.array(self.classes_present)
        label = _with_values(self._label, lambda old: pc.index_in(old, value_set=present).cast(pa.int64()))
        return self._relabelled(label, [str(number) for number in present.to_pylist()])

    def renumbered(self) -> "ImageTable":
        """The same images with the classes that they have as 0…C−1, in the order of the old numbers.

        Classes without a name get their old number for one.

        Raises:
            DataError: if a label is missing, or images have several.
        """
        if self.is_multilabel:
            raise DataError("the images have several labels each, one is needed", where=self.name)
        present, numbers = np.unique(self.labels, return_inverse=True)
        return self._relabelled(pa.array(numbers, pa.int64()), [self.class_name(old) for old in present])

    def _relabelled(
        self, label: pa.Array, class_names: list[str] | None, classes: int | None = None
    ) -> "ImageTable":
        rest = self._rest.set_column(self._rest.column_names.index("label"), "label", label)
        part = ImageTable.__new__(ImageTable)
        part._assign(
            rest=rest,
            images=self._images,
            rows=self._rows,
            name=self.name,
            class_names=class_names,
            classes=classes,
        )
        return part

    def image_bytes(self, row: int, limit: int = MAX_BYTES) -> bytes:
        """The bytes of an image file, from the table, or the first `limit` + 1 from where it lies.

        Raises:
            DataError: naming id and path, if the file is missing or cannot be read.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        inner = row if self._rows is None else int(self._rows[row])
        data, path = self._images.read(inner)
        if data is not None:
            return data
        if path is None:
            raise DataError("there are neither bytes nor a path", where=f"image '{self._rest['id'][row]}'")
        try:
            return location.read_bytes(path, limit)
        except DataError as error:
            where = f"image '{self._rest['id'][row]}' at {path}"
            raise type(error)(error.problem, where=where, mend=error.mend) from None

    def inline_lengths(self) -> IntArray:
        """int64 [n]: bytes of each image that lies in the table itself, -1 for those that lie elsewhere."""
        lengths = self._images.lengths
        return lengths if self._rows is None else lengths[self._rows]

    def inline_bytes(self, rows: IntArray) -> pa.ChunkedArray:
        """large_binary [m]: the bytes of rows int64 [m] that lie in the table itself, null for the others."""
        return self._images.bytes.take(pa.array(rows if self._rows is None else self._rows[rows]))

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: ids, labels, paths, boxes, positives and the lengths of inline bytes.

        The pixels are not read: another image of the same path, or of the same length, goes unnoticed.
        """
        state = hashlib.sha256()
        self._digest_rows(state)
        _digest_text(state, self.path_column)
        state.update(self.inline_lengths().astype("<i8").tobytes())
        if self._boxes is not None:
            state.update(json.dumps(self._boxes).encode())
        listed = self.column("positives")
        if listed is not None:
            positives.digest(listed, state)
        return state.hexdigest()[:16]

    @functools.cached_property
    def row_fingerprint(self) -> str:
        """16 hexadecimal digits that stand for ids and labels, in order; not for where images lie."""
        state = hashlib.sha256()
        self._digest_rows(state)
        return state.hexdigest()[:16]

    def _digest_rows(self, state: Any) -> None:
        _digest_text(state, self._rest["id"])
        label = self._label
        state.update(str(label.type).encode())
        state.update(np.packbits(np.asarray(label.is_null())).tobytes())
        values = label
        if self.is_multilabel:
            state.update(np.asarray(pc.fill_null(pc.list_value_length(label), 0)).astype("<i8").tobytes())
            values = label.flatten()
        if not pa.types.is_null(label.type):
            state.update(np.asarray(pc.fill_null(values, -1)).astype("<i8").tobytes())

    @property
    def _label(self) -> pa.Array:
        return _one_array(self._rest["label"])


class _Images:
    """The image column, with fast access to single rows."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column
        # flatten() leaves the chunks as they are, so both children have the same starts.
        self.bytes, self.paths = (
            column.flatten() if column.num_chunks else (_none(pa.large_binary()), _none(pa.string()))
        )
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self.bytes.chunks)]).tolist()
        self._byte_chunks, self._path_chunks = self.bytes.chunks, self.paths.chunks

    def read(self, row: int) -> tuple[bytes | None, str | None]:
        chunk = bisect.bisect_right(self._starts, row) - 1
        inner = row - self._starts[chunk]
        data = self._byte_chunks[chunk][inner]
        if data.is_valid:
            return data.as_py(), None
        return None, self._path_chunks[chunk][inner].as_py()

    @functools.cached_property
    def lengths(self) -> IntArray:
        return np.asarray(pc.fill_null(pc.binary_length(self.bytes), -1)).astype(np.int64)


def open_images(uri: str | Path, *, root: str | Path | None = None, name: str | None = None) -> ImageTable:
    """A table of the images at `uri`.

    Args:
        uri: a local path or URI of a folder of images (class = sub-folder), a `.txt` list, a `.csv`, Parquet
            in the Hugging Face image layout (a file, a folder or a pattern), Arrow IPC files of the same
            columns, an image, or a pattern of images. `readers` describes each.
        root: where the relative paths of a list start; default the list's own folder.
        name: what the table is called in messages; default `uri`.

    Raises:
        DataError: if nothing is there or it is none of these, if no image is in it, if ids stand twice, if a
            list is ragged, or if local files that it names are missing.
    """
    if not isinstance(uri, str | Path):
        raise DataError(
            f"images are opened by one path or URI, got {type(uri).__name__}",
            mend="name a folder, a pattern such as 'photos/*.jpg', or a file that lists them",
        )
    if not str(uri):  # as a shell makes of a variable that is not set
        raise DataError("a path of no letters names no images", mend="give one; '.' is this folder")
    rows = readers.read(str(uri), None if root is None else str(root))
    return ImageTable(
        rows.table, name=name or location.expand(str(uri)), class_names=rows.class_names, classes=rows.classes
    )


def concatenate(tables: list[ImageTable], *, name: str) -> ImageTable:
    """The rows of several tables, one after another, with their positives. At least one is needed.

    Raises:
        DataError: if an id stands twice, or if the class names differ.
    """
    first = tables[0]
    for table in tables[1:]:
        if table.class_names != first.class_names:
            raise DataError(f"other class names than {first.name}", where=table.name)
    starts = np.cumsum([0, *(len(table) for table in tables)]).tolist()
    parts = [_moved(table, start) for table, start in zip(tables, starts, strict=False)]
    joined = pa.concat_tables(parts, promote_options="default")
    classes = max(table.classes for table in tables)
    return ImageTable(joined, name=name, class_names=first.class_names, classes=classes)


def _moved(table: ImageTable, start: int) -> pa.Table:
    """The columns of a table that comes to stand behind `start` rows."""
    listed = table.column("positives")
    if listed is None:
        return table.table
    return _with_positives(table.table, positives.shifted(listed, start))


def _with_positives(table: pa.Table, listed: pa.ListArray) -> pa.Table:
    return table.set_column(table.column_names.index("positives"), "positives", listed)


def _with_values(label: pa.Array, change: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Labels, or lists of such, with other numbers; what is null stays so."""
    if pa.types.is_null(label.type):
        return label
    if not pa.types.is_list(label.type):
        return change(label)
    lengths = np.asarray(pc.fill_null(pc.list_value_length(label), 0))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    mask = label.is_null() if label.null_count else None
    return pa.ListArray.from_arrays(offsets, change(label.flatten()), mask=mask)


def _restore(table: pa.Table, name: str, class_names: list[str] | None, classes: int) -> ImageTable:
    return ImageTable(table, name=name, class_names=class_names, classes=classes)


def _refuse_no_boxes(kind: pa.DataType, name: str) -> None:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    value = kind.value_type if listed else kind
    number = pa.types.is_integer(value) or pa.types.is_floating(value) or pa.types.is_decimal(value)
    if not (pa.types.is_null(value) or (listed and number)):
        raise DataError(
            f"'box' holds lists of left, top, right and bottom in pixels, found {kind}",
            where=name,
            mend="give four numbers, or the column another name",
        )


def _is_box(box: Sequence[float | None]) -> bool:
    numbers = [place for place in box if place is not None and math.isfinite(place)]
    return len(box) == len(numbers) == 4 and numbers[0] < numbers[2] and numbers[1] < numbers[3]


def _check_ids(ids: pa.ChunkedArray, name: str) -> None:
    if ids.null_count:
        row = int(np.flatnonzero(np.asarray(ids.is_null()))[0])
        raise DataError(f"row {row} has no id", where=name)
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    raise DataError(
        f"{len(twice)} ids stand more than once, the first is '{twice[0]['values']}'",
        where=name,
        mend="give every image an id of its own",
    )


def _chunked(column: Any) -> pa.ChunkedArray:
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)


def _none(kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([], kind)


def _digest_text(state: Any, column: pa.ChunkedArray) -> None:
    """Feed a text column to a hash: its nulls, its lengths and its bytes, however it is chunked."""
    text = pc.fill_null(column.cast(pa.large_string()), "")
    state.update(np.packbits(np.asarray(column.is_null())).tobytes())
    state.update(np.asarray(pc.binary_length(text)).astype("<i8").tobytes())
    for chunk in text.chunks:
        if not len(chunk):
            continue
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, dtype=np.int64)[[chunk.offset, chunk.offset + len(chunk)]]
        if data is not None:
            state.update(memoryview(data)[ends[0] : ends[1]])
