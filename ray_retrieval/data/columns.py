"""The columns of a table of images: `image` and `label` as every reader and table has them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.data import location
from ray_retrieval.errors import DataError

IMAGE_TYPE = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
"""Type of the column `image`: the file's bytes, or where it lies."""

LABEL_COLUMNS = ("label", "labels", "fine_label")
"""What a file may call its labels."""
NAMED_FROM = 1_000_000
"""From here on a label is a name, such as the number of an article. Class numbers count from 0, and heads and
multi-hot labels have a place for each up to the highest."""


def first_of(there: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of the names that is a column there; None if none is."""
    return next((name for name in names if name in there), None)


def images_at(paths: pa.Array | Sequence[str]) -> pa.StructArray:
    """A column of images that are read where they lie, as `IMAGE_TYPE`.

    Args:
        paths: string [n], paths or URIs.
    """
    places = (paths if isinstance(paths, pa.Array) else pa.array(paths, pa.string())).cast(pa.string())
    return pa.StructArray.from_arrays(
        [pa.nulls(len(places), pa.large_binary()), places], fields=list(IMAGE_TYPE)
    )


def without_views(table: pa.Table) -> pa.Table:
    """The table with text and bytes in the place of views of them, of which Arrow picks no rows."""
    kinds = [field.with_type(_plain(field.type)) for field in table.schema]
    return table if kinds == list(table.schema) else table.cast(pa.schema(kinds, table.schema.metadata))


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    return {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(kind, kind)


def canonical_images(column: pa.ChunkedArray, root: str, *, where: str) -> pa.ChunkedArray:
    """An image column as `IMAGE_TYPE`; the bytes are not copied. Paths without bytes become absolute.

    Args:
        column: [n], structs of bytes and path, or binary, or paths.
        root: the folder that relative paths start from.
        where: what to name in an error.

    Raises:
        DataError: if the column's type, or that of its bytes or paths, holds no image.
    """
    chunks = [_canonical_image_chunk(chunk, root, where) for chunk in column.chunks]
    return pa.chunked_array(chunks, IMAGE_TYPE)


def _canonical_image_chunk(chunk: pa.Array, root: str, where: str) -> pa.Array:
    data: Any = pa.nulls(len(chunk), pa.large_binary())
    path: Any = pa.nulls(len(chunk), pa.string())
    kind = chunk.type
    if pa.types.is_struct(kind) and {field.name for field in kind} & {"bytes", "path"}:
        # flatten() also carries the struct's own nulls into its children.
        children = dict(zip([field.name for field in kind], chunk.flatten(), strict=True))
        data = _as_bytes(children["bytes"], where) if "bytes" in children else data
        path = as_text(children["path"], "path", where=where) if "path" in children else path
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        data = chunk.cast(pa.large_binary())
    elif is_text(kind):
        path = chunk.cast(pa.string())
    else:
        raise DataError(
            f"the image column is of type {kind}",
            where=where,
            mend="make it a struct of bytes and path, or binary, or a path",
        )
    if data.null_count:
        lone = pc.and_(data.is_null(), path.is_valid())
        if pc.any(lone).as_py():
            absolute = [location.join(root, name) for name in path.filter(lone).to_pylist()]
            path = pc.replace_with_mask(path, lone, pa.array(absolute, pa.string()))
    return pa.StructArray.from_arrays([data, path], fields=list(IMAGE_TYPE))


def _as_bytes(column: pa.Array, where: str) -> pa.Array:
    """The bytes of images, of any type of bytes, as large_binary [n].

    Raises:
        DataError: if the column's type is none of bytes.
    """
    try:
        return column.cast(pa.large_binary())
    except pa.ArrowNotImplementedError:
        raise DataError(
            f"the bytes of the images are of type {column.type}", where=where, mend="make them binary"
        ) from None


def canonical_labels(
    column: pa.ChunkedArray, names: list[str] | None, *, where: str, separators: str = ""
) -> tuple[pa.Array, list[str] | None]:
    """A label column as int64 or list<int64>, with its class names.

    Numbers stay; names become their rank in sorted order. Where a number is `NAMED_FROM` or more, all of the
    column are names, as they are written. A negative number means unknown, as in the test splits of Hugging
    Face, and so does empty text; both become null.

    Args:
        column: [n], integers, strings, or lists of either; or all null.
        names: the class names that the numbers stand for, if known.
        where: what to name in an error.
        separators: characters that separate several labels in one string.

    Raises:
        DataError: if the type is no label, a number has no name, or lists have a 0 or 1 for each class.
    """
    label = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(label, pa.ChunkedArray):
        label = pa.concat_arrays(label.chunks)
    if pa.types.is_dictionary(label.type):
        label = label.cast(label.type.value_type)
    if pa.types.is_null(label.type):
        return label, names
    if separators and is_text(label.type):
        label = pc.utf8_trim(label, f" {separators}")
        blank = pc.equal(label, "")
        label = pc.if_else(pc.fill_null(blank, True), pa.scalar(None, label.type), label)
        if pc.any(pc.match_substring_regex(label, f"[{separators}]")).as_py():
            # Nothing between two separators, as spreadsheets join empty cells, is no label.
            label = pc.split_pattern_regex(label, f"[{separators}][{separators}\\s]*")
    if pa.types.is_list(label.type) or pa.types.is_large_list(label.type):
        return _list_labels(label, names, where)
    numbers, names = _numbers(label, names, where)
    return pc.if_else(pc.less(numbers, 0), pa.scalar(None, pa.int64()), numbers), names


def _list_labels(label: pa.Array, names: list[str] | None, where: str) -> tuple[pa.Array, list[str] | None]:
    numbers, names = _numbers(label.flatten(), names, where)
    if len(numbers) and (numbers.null_count or pc.min(numbers).as_py() < 0):
        raise DataError("a list of labels holds an unknown one", where=where, mend="leave it out of the list")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(label), 0), dtype=np.int64)
    if names is None and _is_multi_hot(np.asarray(numbers), lengths[np.asarray(label.is_valid())]):
        raise DataError(
            f"the lists of labels have a 0 or 1 for each of {lengths.max()} classes",
            where=where,
            mend="list the numbers of an image's classes, such as [3, 17], or call the column otherwise",
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = label.is_null() if label.null_count else None
    return pa.ListArray.from_arrays(pa.array(offsets), numbers, mask=mask), names


def _is_multi_hot(numbers: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> bool:
    """Whether lists of one length hold nothing but 0 and 1, and one of them both or either several times."""
    if len(np.unique(lengths)) != 1 or lengths[0] < 2 or numbers.max() > 1:
        return False
    rows = numbers.reshape(len(lengths), -1)
    return bool((rows[:, 1:] == rows[:, :-1]).any() or rows.shape[1] > 2)


def _numbers(label: pa.Array, names: list[str] | None, where: str) -> tuple[pa.Array, list[str] | None]:
    numbers = label
    if is_text(label.type):
        # One name however its letters are composed: macOS keeps é as two signs.
        label = pc.utf8_normalize(pc.utf8_trim_whitespace(label), form="NFC")
        label = pc.if_else(pc.equal(label, ""), pa.scalar(None, label.type), label)
        numeric = names is None and pc.all(pc.match_substring_regex(label, r"^-?\d{1,18}$")).as_py()
        numbers = label.cast(pa.int64()) if numeric else None
    elif not pa.types.is_integer(label.type):
        raise DataError(f"the labels are of type {label.type}", where=where, mend="use integers or names")
    if numbers is not None:
        highest = pc.max(numbers).as_py() if len(numbers) else None
        _check_named(highest, names, where)
        if names is not None or highest is None or highest < NAMED_FROM:
            return numbers.cast(pa.int64()), names
        label = pc.if_else(
            pc.less(numbers, pa.scalar(0, numbers.type)),
            pa.scalar(None, pa.string()),
            label.cast(pa.string()),
        )
    names = names or sorted(pc.unique(label.drop_null()).to_pylist())
    index = pc.index_in(label, value_set=pa.array(names, label.type))
    unknown = label.filter(pc.and_(index.is_null(), label.is_valid()))
    if len(unknown):
        raise DataError(f"label '{unknown[0]}' is not among the class names", where=where)
    return index.cast(pa.int64()), names


def _check_named(highest: int | None, names: list[str] | None, where: str) -> None:
    if names is not None and highest is not None and highest >= len(names):
        raise DataError(
            f"label {highest} has no name: there are {len(names)} class names",
            where=where,
            mend="mend either",
        )


def lists_of_classes(multi_hot: npt.NDArray[np.bool_]) -> pa.Array:
    """list<int64> [n]: the classes that each row of a multi-hot array [n, classes] has, ascending."""
    rows, columns = np.nonzero(multi_hot)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(multi_hot)))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(columns, pa.int64()))


def as_text(column: Any, name: str, *, where: str) -> Any:
    """A column of text, of text in bytes or of numbers as string [n].

    Args:
        column: [n], an array of any kind.
        name: what to call it in an error.
        where: what to name in an error.

    Raises:
        DataError: if its type is no text, or naming a value in bytes that is not UTF-8.
    """
    try:
        return column.cast(pa.string())
    except pa.ArrowNotImplementedError:
        found = f"it is of type {column.type}"
    except pa.ArrowInvalid as error:
        wrong = [value for value in column.to_pylist() if isinstance(value, bytes) and not is_utf8(value)]
        found = f"the first that is not UTF-8 is {wrong[0][:100]!r}" if wrong else str(error)
    raise DataError(f"the column '{name}' is no text: {found}", where=where, mend="make it text")


def is_utf8(value: bytes) -> bool:
    """Whether bytes are text in UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def refuse_repeated(names: Sequence[str], *, where: str) -> None:
    """Fail where two columns of a table have the same name.

    Raises:
        DataError: naming them.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"columns stand more than once: {', '.join(repr(name) for name in twice)}",
            where=where,
            mend="give every column a name of its own",
        )


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's type is text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
