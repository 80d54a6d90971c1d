"""Descriptors as columns of a table, one row an image, and back.

    codes     code          fixed-size binary
    vectors   vector        fixed-size list of float32
    local     descriptors   a list an image, of fixed-size lists of float16
              locations     a list an image, of fixed-size lists of two float32, x and y
              scales        a list an image, of float32
              scores        a list an image, of float32
              size          fixed-size list of two int32, width and height
              vector        as that of vectors; missing where no global descriptor comes with the features

What the values mean is said in `ray_retrieval.descriptors`. None of the columns holds nulls.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.descriptors import Codes, DescriptorKind, Descriptors, Form, Local, Vectors
from ray_retrieval.errors import DataError

_MODEL, _CLASS_NAMES = "ray_retrieval.model", "ray_retrieval.class_names"
"""Keys of the metadata of tables, which other programs have no reason to use."""
_NAMES = {
    DescriptorKind.CODES: ("code",),
    DescriptorKind.VECTORS: ("vector",),
    DescriptorKind.LOCAL: ("descriptors", "locations", "scales", "scores", "size"),
}


def column_names(form: Form) -> list[str]:
    """Names of the columns that hold descriptors of a form."""
    return [*_NAMES[form.kind], *(["vector"] if form.vectors else [])]


def descriptor_columns(descriptors: Descriptors) -> list[tuple[pa.Field, pa.Array]]:
    """Descriptors as the columns that `column_names` names, in that order."""
    if isinstance(descriptors, Codes):
        data = np.ascontiguousarray(descriptors.data)
        kind = pa.binary(data.shape[1])
        code = pa.FixedSizeBinaryArray.from_buffers(kind, len(data), [None, pa.py_buffer(data)])
        return [(pa.field("code", kind, nullable=False, metadata={"bits": str(descriptors.bits)}), code)]
    if isinstance(descriptors, Vectors):
        return [_field("vector", _fixed_lists(descriptors.data))]
    found = [
        _field("descriptors", _lists(descriptors.offsets, _fixed_lists(descriptors.data))),
        _field("locations", _lists(descriptors.offsets, _fixed_lists(descriptors.locations))),
        _field("scales", _lists(descriptors.offsets, pa.array(descriptors.scales))),
        _field("scores", _lists(descriptors.offsets, pa.array(descriptors.scores))),
        _field("size", _fixed_lists(descriptors.sizes)),
    ]
    with_vectors = descriptors.vectors.shape[1] > 0
    return [*found, _field("vector", _fixed_lists(descriptors.vectors))] if with_vectors else found


def with_metadata(schema: pa.Schema, model: str, class_names: list[str] | None = None) -> pa.Schema:
    """A schema that says what made the descriptors, and the classes that labels count in."""
    about = {_MODEL: model}
    if class_names is not None:
        about[_CLASS_NAMES] = json.dumps(class_names)
    return schema.with_metadata(about)


def own_metadata(schema: pa.Schema, where: object) -> tuple[str | None, list[str] | None]:
    """Model and class names that `with_metadata` has written; None where it has not.

    Raises:
        DataError: if they are something else.
    """
    said = schema.metadata or {}
    model, listed = said.get(_MODEL.encode()), said.get(_CLASS_NAMES.encode())
    try:
        names = None if listed is None else json.loads(listed)
        sound = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
        if sound:
            return None if model is None else model.decode(), names
    except ValueError:
        pass
    raise DataError(
        f"the metadata '{_MODEL}' and '{_CLASS_NAMES}' are text, and a JSON list of text",
        where=where,
        mend="leave them out, or write the file again",
    )


def descriptors_in(table: pa.Table, form: Form) -> Descriptors:
    """The descriptors of a table that has the columns that `descriptor_columns` made.

    They are read-only where they are no copy.
    """
    if form.kind is DescriptorKind.CODES:
        return Codes(_packed_codes(table["code"], (form.size + 7) // 8), form.size)
    if form.kind is DescriptorKind.VECTORS:
        return form.with_rows(_numbers(table["vector"], np.float32).reshape(-1, form.size))
    return Local(
        np.concatenate([np.zeros(1, np.int64), np.cumsum(feature_counts(table))]),
        _numbers(table["descriptors"], np.float16).reshape(-1, form.size),
        _numbers(table["locations"], np.float32).reshape(-1, 2),
        _numbers(table["scales"], np.float32),
        _numbers(table["scores"], np.float32),
        _numbers(table["size"], np.int32).reshape(-1, 2),
        _numbers(table["vector"], np.float32).reshape(-1, form.vectors)
        if form.vectors
        else np.zeros((len(table), 0), np.float32),
    )


def feature_counts(table: pa.Table) -> npt.NDArray[np.int64]:
    """int64 [n]: the number of local features of each image, of a table that has the column `scales`."""
    return np.asarray(pc.list_value_length(table["scales"]), dtype=np.int64)


def _field(name: str, column: pa.Array) -> tuple[pa.Field, pa.Array]:
    return pa.field(name, column.type, nullable=False), column


def _fixed_lists(data: npt.NDArray[Any]) -> pa.Array:
    """The rows of an array [n, d] as lists of d values."""
    values = pa.array(np.ascontiguousarray(data).reshape(-1))
    kind = pa.list_(pa.field("item", values.type, nullable=False), data.shape[1])
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


def _lists(offsets: npt.NDArray[np.int64], values: pa.Array) -> pa.Array:
    """Values from each offset to the next as a list."""
    kind = pa.list_(pa.field("item", values.type, nullable=False))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=kind)


def _numbers(column: pa.ChunkedArray, dtype: type[Any]) -> npt.NDArray[Any]:
    """The numbers of a column of lists, of whatever depth, one after another."""
    parts = [np.asarray(_flat(chunk)) for chunk in column.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype), *parts])


def _flat(lists: pa.Array) -> pa.Array:
    if pa.types.is_list(lists.type) or pa.types.is_fixed_size_list(lists.type):
        return _flat(lists.flatten())
    return lists


def _packed_codes(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.uint8]:
    """uint8 [n, width] of a column of fixed-size binary without nulls."""
    arrays = [
        np.frombuffer(chunk.buffers()[1], np.uint8)[
            chunk.offset * width : (chunk.offset + len(chunk)) * width
        ]
        for chunk in column.chunks
    ]
    joined = np.concatenate(arrays) if arrays else np.zeros(0, np.uint8)
    return joined.reshape(-1, width)
