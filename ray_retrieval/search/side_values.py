"""Ids and labels that come with descriptors that were made elsewhere: in a column, or in a file beside."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.errors import DataError
from ray_retrieval.search.column_values import plain
from ray_retrieval.search.vector_files import lines_of, load_npy, split, suffix_of

_NUMBER = "^(0|[1-9][0-9]{0,17})$"


@dataclass(frozen=True)
class Beside:
    """Where one value a row comes from; nowhere if neither is set.

    Attributes:
        column: of the files of descriptors.
        array: the values themselves, of all rows.
    """

    column: str | None = None
    array: "pa.Array | None" = None

    @property
    def given(self) -> bool:
        return self.column is not None or self.array is not None


def values_beside(name: str, asked: "str | pa.Array | None", schema: pa.Schema, rows: int) -> Beside:
    """Where the ids or labels of rows come from.

    Args:
        name: `id` or `label`: the column that they come from unless told.
        asked: a column, a file, or the values; None: not told.
        schema: of the files of descriptors.
        rows: how many.

    Raises:
        DataError: if it is neither a column nor a file, the file cannot be read, or holds more or fewer.
    """
    if asked is None:
        return Beside(column=name if name in schema.names else None)
    if isinstance(asked, str):
        if asked in schema.names:
            return Beside(column=asked)
        array, where = _read(asked, name, schema), asked
    else:
        array, where = asked, f"the {name}s"
    if len(array) != rows:
        raise DataError(f"{len(array):,} {name}s for {rows:,} rows", where=where, mend="give one a row")
    return Beside(array=array)


def _read(place: str, name: str, schema: pa.Schema) -> pa.Array:
    """The values in a file: `.npy`, a list in `.json`, or text, one a line; an empty line is no label."""
    folder, file = split(place)
    if not folder.exists(file):
        listed = ", ".join(schema.names) or "none"
        raise DataError(
            f"neither a file nor a column; columns are: {listed}", where=place, mend=f"see --{name}s"
        )
    try:
        if suffix_of(file) == ".npy":
            return pa.array(load_npy(folder.local_path(file), place))
        if suffix_of(file) == ".json":
            values = json.loads(folder.read_bytes(file))
            if not isinstance(values, list):
                raise ValueError(f"a list is expected, got {type(values).__name__}")
            return pa.array(values)
        lines: list[str | None] = [*lines_of(folder.read_bytes(file))]
        if name == "label":
            lines = [line or None for line in lines]
        return pa.array(lines, pa.large_string())
    except (ValueError, EOFError, OverflowError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot be read: {reason}", where=place, mend="give text, one a line, .npy, or a list in .json"
        ) from None


def as_ids(column: Any, where: object, first_row: int = 0) -> Any:
    """Values as ids: text.

    Raises:
        DataError: if they are neither text nor whole numbers, or a row has none.
    """
    kind = plain(column.type)
    if not (_is_text(kind) or pa.types.is_integer(kind)):
        raise DataError(f"ids are text or whole numbers, got {kind}", where=where, mend="give another column")
    if column.null_count:
        row = first_row + int(np.argmax(np.asarray(column.is_null())))
        raise DataError(f"row {row:,} has no id", where=where, mend="give each row one")
    return column.cast(kind).cast(pa.large_string())


def classes_in(columns: Iterable[Any]) -> list[str] | None:
    """The class names in columns of labels, sorted; None where labels are numbers, or there are none.

    Text is numbers too where each is one as it is written without sign, and zeros in front.
    """
    found: set[str] = set()
    for column in columns:
        values = _flat(column.cast(plain(column.type)))
        if _is_text(values.type):
            found.update(value for value in pc.unique(values).to_pylist() if value is not None)
    return None if all(map(is_number, found)) else sorted(found)


def is_number(name: str) -> bool:
    """Whether a class's name is a whole number as it is written, without sign, and zeros in front."""
    return re.fullmatch(_NUMBER, name) is not None


def numbered(column: Any, names: list[str] | None, where: object, *, named: bool) -> Any:
    """Labels as class numbers: int64, or lists of them.

    Args:
        column: an array or chunked array of names or numbers, or of lists of them.
        names: of the classes, where they have any.
        where: for errors.
        named: whether text is a class's name: whether `classes_in` gives names for all of the labels.

    Raises:
        DataError: if they are neither, or a number is no class.
    """
    column = column.cast(plain(column.type))
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not _is_list(column.type):
        return _numbers(column, names, where, named)
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    mask = pc.is_null(column) if column.null_count else None
    return pa.ListArray.from_arrays(offsets, _numbers(column.flatten(), names, where, named), mask=mask)


def label_type(kind: pa.DataType) -> pa.DataType:
    """What labels of a type are in an index."""
    if pa.types.is_null(kind):
        return kind
    return pa.list_(pa.int64()) if _is_list(plain(kind)) else pa.int64()


def _numbers(values: pa.Array, names: list[str] | None, where: object, named: bool) -> pa.Array:
    kind = values.type
    if _is_text(kind) and named:
        return pc.index_in(values.cast(pa.large_string()), value_set=pa.array(names, pa.large_string())).cast(
            pa.int64()
        )
    if pa.types.is_null(kind):
        return values
    if not (pa.types.is_integer(kind) or _is_text(kind)):
        raise DataError(
            f"labels are class names or numbers, got {kind}", where=where, mend="give another column"
        )
    try:
        numbers = values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(
            f"labels are whole numbers from 0 to 2^63 - 1: {str(error).splitlines()[0]}",
            where=where,
            mend="count the classes from 0",
        ) from None
    extent = pc.min_max(numbers).as_py()
    last = None if names is None else len(names) - 1
    if extent["min"] is not None and (extent["min"] < 0 or (last is not None and extent["max"] > last)):
        wrong = extent["min"] if extent["min"] < 0 else extent["max"]
        known = "0 and more" if last is None else f"0 to {last}"
        raise DataError(f"label {wrong} is no class: they are {known}", where=where, mend="null is no label")
    return numbers


def _flat(column: Any) -> Any:
    return pc.list_flatten(column) if _is_list(column.type) else column


def _is_list(kind: pa.DataType) -> bool:
    kinds = pa.types
    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
