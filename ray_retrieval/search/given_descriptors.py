"""What files of others hold as that of an index: descriptors and columns, and whether they are sound."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_retrieval.descriptors import Codes, DescriptorKind, Form, Vectors
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.search.column_values import check_columns, fit, plain
from ray_retrieval.search.vector_files import VectorFile

Array = npt.NDArray[Any]
Value = TypeVar("Value")

_UNIT = 2e-3
"""By how much a squared length may differ from 1: rounding to float16 makes it differ by half of that."""


def form_of(files: Sequence[VectorFile], bits: int | None) -> Form:
    """What all files hold.

    Raises:
        DataError: if they hold different things.
        RecipeError: if the number of bits does not fit.
    """
    first = files[0].shape
    for file in files:
        same = file.shape.width == first.width and (file.shape.dtype == np.uint8) == (first.dtype == np.uint8)
        if not same:
            raise DataError(
                f"{file.shape.width} values of {file.shape.dtype} a row, in {files[0].where} "
                f"{first.width} of {first.dtype}",
                where=file.where,
                mend="give files of one kind",
            )
    if first.dtype != np.uint8:
        if bits is not None:
            raise RecipeError(f"{first.dtype} values are no codes", where="`bits`", mend="leave it out")
        return Form(DescriptorKind.VECTORS, first.width)
    count = bits or stated([file.shape.bits for file in files], "bits", files[0].where) or 8 * first.width
    if (count + 7) // 8 != first.width:
        raise RecipeError(
            f"codes of {count} bits are {(count + 7) // 8} bytes a row, got {first.width}",
            where=files[0].where,
            mend="give the bits of a code as `bits`",
        )
    return Form(DescriptorKind.CODES, count)


def stated(values: Sequence[Value | None], what: str, where: object) -> Value | None:
    """What all files say of something; None where they say nothing.

    Args:
        values: of each file.
        what: they are, for errors.
        where: the files, for errors.

    Raises:
        DataError: if they differ.
    """
    if any(value != values[0] for value in values):
        raise DataError(f"the files are of different {what}", where=where, mend="build them one by one")
    return values[0]


def schema_of(files: Sequence[VectorFile], converted: set[str | None]) -> pa.Schema:
    """The columns of all files beside the descriptors, in the types by which an index knows them.

    Args:
        files: of the rows.
        converted: columns whose values get a type of their own, ids and labels, and may be of several.

    Raises:
        DataError: if the values of another column do not fit into one type, or it is none of an index.
    """
    for file in files:
        check_columns(file.schema, file.where)
    known = [pa.schema([(field.name, plain(field.type)) for field in file.schema]) for file in files]
    before: dict[str, pa.DataType] = {}
    for schema, file in zip(known, files, strict=True):
        for field in schema:
            other = before.setdefault(field.name, field.type)
            if pa.types.is_null(other):
                before[field.name] = field.type
            if field.name not in converted and not fit(other, field.type):
                raise DataError(
                    f"column '{field.name}' holds {field.type}, in other files {other}",
                    where=file.where,
                    mend="give each column one type",
                )
    try:
        return pa.unify_schemas(known, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"columns do not fit together: {str(error).splitlines()[0]}",
            where=f"{files[0].where} and others",
            mend="give each column one type",
        ) from None


def descriptors_from(
    data: Array, form: Form, *, normalise: bool, where: object, first_row: int
) -> Codes | Vectors:
    """Values of a file as descriptors of a form.

    Args:
        data: [n, width], bytes of codes or numbers of vectors.
        form: of codes or vectors.
        normalise: divide each vector by its length.
        where: the file, for errors.
        first_row: number of the first row.

    Raises:
        DataError: naming the first row that is no code of so many bits, or no vector of length 1.
    """
    if form.kind is DescriptorKind.CODES:
        return _codes(data, form.size, where, first_row)
    return _vectors(data, normalise, where, first_row)


def _codes(data: Array, bits: int, where: object, first: int) -> Codes:
    spare = 8 * data.shape[1] - bits
    wrong = data[:, -1] & ((1 << spare) - 1) != 0 if spare else np.zeros(0, np.bool_)
    if wrong.any():
        raise DataError(
            f"row {first + int(np.argmax(wrong)):,} has more than {bits} bits: the last {spare} of its bytes "
            "are not zero",
            where=where,
            mend="give the right number as `bits`, and pack with numpy.packbits",
        )
    return Codes(np.ascontiguousarray(data), bits)


def _vectors(data: Array, normalise: bool, where: object, first: int) -> Vectors:
    vectors = np.ascontiguousarray(data, np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    wrong = ~np.isfinite(lengths)
    if wrong.any():
        raise DataError(
            f"row {first + int(np.argmax(wrong)):,} holds what is no finite number",
            where=where,
            mend="leave the row out",
        )
    wrong = lengths == 0 if normalise else np.abs(lengths**2 - 1) > _UNIT
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"the vector in row {first + row:,} is of length {lengths[row]:.6g}, not 1",
            where=where,
            mend="leave the row out" if normalise else "divide each by its length with `normalise`",
        )
    return Vectors((vectors / lengths[:, None]).astype(np.float32) if normalise else vectors)
