"""Columns of others: descriptors as lists of numbers or bytes, of fixed or equal length; types that fit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.errors import DataError


@dataclass(frozen=True)
class Shape:
    """What each descriptor is in a file.

    Attributes:
        dtype: uint8 of packed codes, else a floating-point type.
        width: how many values.
        bits: of a code, where the file says so.
    """

    dtype: np.dtype[Any]
    width: int
    bits: int | None

    @property
    def bytes(self) -> int:
        return self.width * self.dtype.itemsize


def shape_of(field: pa.Field, first: Callable[[], pa.Array], where: str) -> Shape:
    """The shape of the descriptors in a column.

    Args:
        field: of the column.
        first: gives the value of the first row, which tells the length where the type does not.
        where: the file, for errors.

    Raises:
        DataError: if the column holds something else.
    """
    kind, kinds = field.type, pa.types
    bits = int(field.metadata[b"bits"]) if field.metadata and b"bits" in field.metadata else None
    if kinds.is_fixed_size_binary(kind):
        return Shape(np.dtype(np.uint8), kind.byte_width, bits)
    numbers = _is_numbers(kind)
    if not numbers and not _is_bytes(kind):
        raise DataError(
            f"column '{field.name}' holds {kind}, no descriptors",
            where=where,
            mend="give a column of lists of floating-point numbers, or of packed bytes",
        )
    dtype = np.dtype(kind.value_type.to_pandas_dtype() if numbers else np.uint8)
    if kinds.is_fixed_size_list(kind):
        return Shape(dtype, kind.list_size, bits)
    width = len(first()[0].as_py() or ())
    if width == 0:
        raise DataError(f"column '{field.name}' holds nothing in row 0", where=where)
    return Shape(dtype, width, bits)


def holds_descriptors(kind: pa.DataType, *, of_any_length: bool = False) -> bool:
    """Whether values of a type may be descriptors: lists of numbers, or bytes of one length.

    Args:
        kind: of a column.
        of_any_length: also bytes whose length the type does not say, such as those of an image.
    """
    return pa.types.is_fixed_size_binary(kind) or _is_numbers(kind) or (of_any_length and _is_bytes(kind))


def values_of(column: pa.Array, shape: Shape, where: str, first_row: int) -> npt.NDArray[Any]:
    """The descriptors of some rows, [n, width].

    Args:
        column: of the type that `shape_of` has seen.
        shape: of each.
        where: file and column, for errors.
        first_row: number of the first of the rows.

    Raises:
        DataError: naming the first row that holds nothing, or something of another length.
    """
    if column.null_count:
        _refuse(np.asarray(column.is_null()), "nothing", where, first_row)
    kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        return _bytes_of(column, kind.byte_width)
    if _is_bytes(kind):
        _same_length(pc.binary_length(column), shape, where, first_row)
        return _bytes_of(column.cast(pa.binary(shape.width)), shape.width)
    if not pa.types.is_fixed_size_list(kind):
        _same_length(pc.list_value_length(column), shape, where, first_row)
    values = column.flatten()
    if values.null_count:
        missing: npt.NDArray[np.bool_] = np.asarray(values.is_null()).reshape(-1, shape.width)
        _refuse(np.logical_or.reduce(missing, axis=1), "a list with nothing at a place", where, first_row)
    return np.asarray(values).reshape(-1, shape.width)


def fit(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether the values of two types fit into the wider of them, none of them changed."""
    if one == other or pa.types.is_null(one) or pa.types.is_null(other):
        return True
    if _is_list(one) or _is_list(other):
        return type(one) is type(other) and fit(one.value_type, other.value_type)
    return any(
        all(is_one(kind) for kind in (one, other))
        for is_one in (
            pa.types.is_signed_integer,
            pa.types.is_unsigned_integer,
            pa.types.is_floating,
            lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
            lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind),
        )
    )


def rounds(own: pa.DataType, other: pa.DataType) -> bool:
    """Whether a type, of numbers or lists of them, rounds numbers to fewer digits than another that fits it.

    A number as people write it, such as 0.1, is then another one in the wider type.
    """
    if pa.types.is_floating(own) and pa.types.is_floating(other):
        return bool(own.bit_width < other.bit_width)
    return _is_list(own) and _is_list(other) and rounds(own.value_type, other.value_type)


def plain(kind: pa.DataType) -> pa.DataType:
    """The type by which an index knows values of a type: no dictionary, and no view, also not in lists.

    Views are quick to make, but Arrow picks no rows of them.
    """
    kinds = pa.types
    if kinds.is_dictionary(kind):
        return plain(kind.value_type)
    if kinds.is_list(kind):
        return pa.list_(kind.value_field.with_type(plain(kind.value_type)))
    if kinds.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(plain(kind.value_type)))
    if kinds.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(plain(kind.value_type)), kind.list_size)
    return {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(kind, kind)


def check_columns(schema: pa.Schema, where: object) -> None:
    """Refuse columns of which Arrow cannot give some rows, as an index does for its hits.

    Raises:
        DataError: naming the first such column.
    """
    for field in schema:
        try:
            pa.schema([field]).empty_table()
            pa.nulls(1, field.type).cast(plain(field.type)).take(pa.array([0]))
        except pa.ArrowNotImplementedError:
            raise DataError(
                f"column '{field.name}' holds {field.type}, of which no rows can be picked out",
                where=where,
                mend="give it as text, numbers, bytes or lists of these, or leave it out",
            ) from None


def _is_numbers(kind: pa.DataType) -> bool:
    """Whether values are lists of floating-point numbers, or of bytes."""
    lists = _is_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and (pa.types.is_floating(kind.value_type) or pa.types.is_uint8(kind.value_type)))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _bytes_of(column: pa.Array, width: int) -> npt.NDArray[np.uint8]:
    start = column.offset * width
    data = np.frombuffer(column.buffers()[1], np.uint8)
    return data[start : start + len(column) * width].reshape(-1, width)


def _same_length(lengths: pa.Array, shape: Shape, where: str, first_row: int) -> None:
    others = np.asarray(np.asarray(lengths) != shape.width, np.bool_)
    if others.any():
        found = lengths[int(np.argmax(others))].as_py()
        _refuse(others, f"{found} values, the first row {shape.width}", where, first_row)


def _refuse(wrong: npt.NDArray[np.bool_], what: str, where: str, first_row: int) -> None:
    row = first_row + int(np.argmax(wrong))
    raise DataError(f"row {row:,} holds {what}", where=where, mend="leave the row out, or mend it")
