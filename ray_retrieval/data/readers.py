"""The forms in which people keep images, each read into the same columns.

    folder      class = sub-folder                        read_folder
    list        `path`, `path class`, `path 0 1 0 … 1`    read_list
    CSV         path, optional id and label, any columns  read_csv
    Parquet     the Hugging Face image layout             read_parquet
    Arrow IPC   the same, memory-mapped                   read_arrow

Every reader returns `Rows`; `table.open_images` chooses one. Rows are in manifest order: sorted paths for a
folder, the file's own order for all others. Nothing here decodes an image.
"""

import fnmatch
import json
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow import fs

from ray_retrieval.data import location
from ray_retrieval.errors import DataError

IMAGE_TYPE = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
"""Type of the column `image`: the file's bytes, or where it lies."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_SPLIT_NAMES = frozenset({"train", "test", "val", "valid", "validation", "query", "queries", "gallery"})
_IMAGE_COLUMNS = ("image", "img")
_PATH_COLUMNS = ("path", "image", "filename", "file_name", "file")
_TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".txt", ".csv"})
_LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Rows:
    """What a reader found.

    Attributes:
        table: columns id string · image `IMAGE_TYPE` · label int64 | list<int64> | null · the file's others.
        class_names: names of the classes, where the form has them.
        classes: number of classes, where the form says it (a multi-hot list does by its width).
    """

    table: pa.Table
    class_names: list[str] | None = None
    classes: int | None = None


def read(uri: str, root: str | None) -> Rows:
    """The rows of whatever lies at `uri`: see the table at the head of this module.

    Raises:
        DataError: if nothing is there, or nothing that is known.
    """
    base = None if root is None else location.expand(root)
    place = location.expand(uri)
    # What is there wins over a pattern: names may hold brackets.
    kind = location.find(place).type
    if kind == fs.FileType.Directory:
        inside = [name for name in location.files_in(place) if _suffix(name) in _TABLE_SUFFIXES]
        tables = [name for name in inside if _suffix(name) in (".parquet", ".arrow")]
        if tables:
            _refuse_several_splits(place, tables)
            return _read_files(place, tables, base, where=place)
        return read_folder(place, lists=inside)
    if kind == fs.FileType.File:
        return _read_files(location.parent(place), [location.name_of(place)], base, where=place)
    if "*" in place or "[" in place:
        return _read_files(*_matching(place), base, where=place)
    raise DataError("nothing is there", where=place, mend="check the path")


def read_folder(folder: str, lists: Sequence[str] = ()) -> Rows:
    """Images below a folder, sorted by their path; the first folder on the way is the class.

    A folder without sub-folders gives rows without labels, and so do images that lie beside class folders.
    The id of an image is its path below the folder.

    Args:
        folder: a local path or URI.
        lists: list files that lie in the folder too, for a better error when there is no image.

    Raises:
        DataError: if there is no image, or if the sub-folders are splits rather than classes.
    """
    names = sorted(name for name in location.walk(folder) if _suffix(name) in IMAGE_SUFFIXES)
    if not names:
        mend = f"did you mean {location.join(folder, lists[0])}?" if lists else _known_forms()
        raise DataError("no image in this folder", where=folder, mend=mend)
    parts = [name.split("/") for name in names]
    found = {part[0] for part in parts if len(part) > 1}
    if found and found <= _SPLIT_NAMES and all(len(part) > 2 for part in parts):
        raise DataError(
            f"its sub-folders are splits, not classes: {', '.join(sorted(found))}",
            where=folder,
            mend=f"give one of them, such as {location.join(folder, sorted(found)[0])}",
        )
    class_names = sorted(found)
    number = {name: index for index, name in enumerate(class_names)}
    labels = [number[part[0]] if len(part) > 1 else None for part in parts]
    label = pa.array(labels, pa.int64()) if class_names else pa.nulls(len(names))
    paths = [location.join(folder, name) for name in names]
    return Rows(_table(pa.array(names), label, paths=pa.array(paths)), class_names or None)


def read_list(file: str, root: str | None = None) -> Rows:
    """A text file with one image a line: `path`, `path class` or `path 0 0 1 … 0` (multi-hot).

    Paths are relative to `root`, or else to the list's own folder; the id of an image is its path as it
    stands in the list. A path may hold spaces as long as its last word is no number. Blank lines are skipped.

    Raises:
        DataError: naming the line, if it has more or fewer labels than the first one, or others than 0 and 1;
            or if an image is missing.
    """
    found = parse_list(file)
    base = root or location.parent(file)
    _refuse_missing(paths := [location.join(base, name) for name in found.names], file)
    return Rows(_table(pa.array(found.names), found.label, paths=pa.array(paths)), classes=found.classes)


@dataclass(frozen=True)
class ListFile:
    """The lines of a list.

    Attributes:
        names: the paths as they stand there.
        label: int64, list<int64> or null, one a line.
        classes: the width of multi-hot labels; None for others.
    """

    names: list[str]
    label: pa.Array
    classes: int | None = None


def parse_list(file: str) -> ListFile:
    """A list's paths and labels in any form of `read_list`, whether its images are there or not.

    Raises:
        DataError: as `read_list`, but for missing images.
    """
    numbered = [
        (number, line.strip())
        for number, line in enumerate(_text(file).splitlines(), 1)
        if line and not line.isspace()
    ]
    if not numbered:
        raise DataError("the list is empty", where=file)
    lines = [line for _, line in numbered]
    first = lines[0].split()
    count = 0
    while count < len(first) - 1 and _is_number(first[-1 - count]):
        count += 1
    names, values = _digits(lines, count) or _words(numbered, count, file)
    if count == 0:
        return ListFile(names, pa.nulls(len(names)))
    if count == 1:
        return ListFile(names, pa.array(values[:, 0]))
    wrong = np.flatnonzero((values > 1).any(axis=1))
    if len(wrong):
        raise DataError(
            f"line {numbered[wrong[0]][0]} has a label other than 0 and 1",
            where=file,
            mend="multi-hot labels are 0 or 1; a single class index stands alone behind the path",
        )
    return ListFile(names, lists_of_classes(values.astype(bool)), count)


def _digits(lines: list[str], count: int) -> tuple[list[str], npt.NDArray[np.int64]] | None:
    """Names and multi-hot labels of lines that end in ` 0 1 … 0`, at once; None if one does not."""
    width = 2 * count
    if count < 2 or min(map(len, lines)) <= width:
        return None
    tails = "".join([line[-width:] for line in lines])
    if not tails.isascii():
        return None
    tail = np.frombuffer(tails.encode(), np.uint8).reshape(-1, width)
    values = tail[:, 1::2].astype(np.int64) - ord("0")
    if (tail[:, ::2] != ord(" ")).any() or (values < 0).any() or (values > 1).any():
        return None
    names = [line[:-width] for line in lines]
    # A number before the labels is a label too many, or the end of a name: the slow way tells.
    return None if any(name[-1].isspace() or name[-1].isdigit() for name in names) else (names, values)


def _words(numbered: list[tuple[int, str]], count: int, file: str) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Names and labels word by word, int64 [n, count]."""
    names, tails = [], []
    for number, line in numbered:
        head, *tail = line.rsplit(None, count) if count else [line]
        complete = len(tail) == count and (count == 0 or _is_number("".join(tail)))
        words = head.split()
        if not complete or (len(words) > 1 and _is_number(words[-1])):
            raise DataError(
                f"line {number} has not the {count} labels that line {numbered[0][0]} has",
                where=file,
                mend="give every line a path, or a path and as many labels as the others",
            )
        names.append(head)
        tails.append(tail)
    return names, np.array(tails, dtype=np.int64).reshape(len(names), count)


def read_csv(file: str, root: str | None = None) -> Rows:
    """A CSV file with a header: a path, optionally `id` and `label`, and any further columns.

    Labels are numbers or names; several of one image are separated by `|` or `;`. An empty one is unknown.

    Raises:
        DataError: if the file is no CSV, has no column of paths, or an empty path.
    """
    text_columns = {name: pa.string() for name in ("id", *_PATH_COLUMNS, *_LABEL_COLUMNS)}
    options = pyarrow.csv.ConvertOptions(column_types=text_columns, strings_can_be_null=True)
    try:
        with location.open_file(file) as source:
            table = pyarrow.csv.read_csv(source, convert_options=options)
    except pa.ArrowInvalid as error:
        raise DataError(f"not a valid CSV file: {error}", where=file) from None
    column = _first_of(table, _PATH_COLUMNS)
    if column is None:
        raise DataError(
            f"no column of paths among {', '.join(table.column_names)}",
            where=file,
            mend="name it 'path', 'image' or 'filename'",
        )
    if len(table) == 0:
        raise DataError("the file has no row", where=file)
    given = table[column].combine_chunks()
    if given.null_count:
        row = int(np.flatnonzero(given.is_null())[0])
        raise DataError(f"row {row + 1} has no path", where=file)
    paths = [location.join(root or location.parent(file), name) for name in given.to_pylist()]
    _refuse_missing(paths, file)
    label_column = _first_of(table, _LABEL_COLUMNS)
    label, names = pa.nulls(len(table)), None
    if label_column is not None:
        label, names = canonical_labels(table[label_column], None, where=file, separators="|;")
    ids = table["id"] if "id" in table.column_names else given
    rest = _without(table, (column, label_column, "id"))
    return Rows(_table(ids, label, paths=pa.array(paths), rest=rest), names)


def read_parquet(files: Sequence[str], root: str | None = None) -> Rows:
    """Parquet files in the Hugging Face image layout, one after another.

    The column `image` (or `img`) is a struct of bytes and path, or binary, or a string that is a path; the
    label column is `label`, `labels` or `fine_label`, with the class names of the Hugging Face metadata. Ids
    are the column `id`, or the paths where all images have a different one, or file and row.
    The image bytes are read into memory; use Arrow IPC files for more than fits.

    Raises:
        DataError: if a file is no Parquet, has no image column, or does not fit the others.
    """
    return _join_tables([(file, _read_one_parquet(file)) for file in files], root)


def read_arrow(files: Sequence[str], root: str | None = None) -> Rows:
    """Arrow IPC files (file or stream format) with the columns of `read_parquet`, memory-mapped.

    Raises:
        DataError: if a file is no Arrow IPC, has no image column, or does not fit the others.
    """
    return _join_tables([(file, _read_one_arrow(file)) for file in files], root)


def _read_one_parquet(file: str) -> pa.Table:
    try:
        reader = pq.ParquetFile(location.open_file(file))
        # One row group at a time: a struct column of more than 2 GiB cannot be read in one piece.
        groups = [reader.read_row_group(group) for group in range(reader.num_row_groups)]
        return pa.concat_tables(groups) if groups else reader.schema_arrow.empty_table()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a valid Parquet file: {error}", where=file) from None


def _read_one_arrow(file: str) -> pa.Table:
    source = location.open_file(file)
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
    try:
        return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a valid Arrow IPC file: {error}", where=file) from None


def _join_tables(pieces: Sequence[tuple[str, pa.Table]], root: str | None) -> Rows:
    where = pieces[0][0]
    try:
        table = pa.concat_tables([piece for _, piece in pieces], promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"the files do not have the same columns: {error}", where=where) from None
    column = _first_of(table, _IMAGE_COLUMNS)
    if column is None:
        raise DataError(
            f"no image column among {', '.join(table.column_names)}", where=where, mend="name it 'image'"
        )
    if len(table) == 0:
        raise DataError("the file has no row", where=where)
    images = canonical_images(table[column], root or location.parent(where), where=where)
    label_column = _first_of(table, _LABEL_COLUMNS)
    label, names = pa.nulls(len(table)), None
    if label_column is not None:
        declared = _declared_names(table.schema, label_column)
        label, names = canonical_labels(table[label_column], declared, where=where)
    ids = table["id"] if "id" in table.column_names else _ids(table[column], pieces)
    rest = _without(table, (column, label_column, "id"))
    return Rows(_table(ids, label, images=images, rest=rest), names)


def _ids(column: pa.ChunkedArray, pieces: Sequence[tuple[str, pa.Table]]) -> pa.Array:
    """The images' own paths where all have a different one; else file name and row."""
    paths: Any = None
    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        paths = pc.struct_field(column, "path")
    elif _is_text(column.type):
        paths = column
    if paths is not None and paths.null_count == 0 and pc.count_distinct(paths).as_py() == len(paths):
        return paths
    names = []
    for file, piece in pieces:
        stem = posixpath.splitext(location.name_of(file.replace(os.sep, "/")))[0]
        names += [f"{stem}-{row:07d}" for row in range(len(piece))]
    return pa.array(names)


def images_at(paths: pa.Array | Sequence[str]) -> pa.StructArray:
    """A column of images that are read where they lie, as `IMAGE_TYPE`: paths or URIs."""
    places = (paths if isinstance(paths, pa.Array) else pa.array(paths, pa.string())).cast(pa.string())
    return pa.StructArray.from_arrays(
        [pa.nulls(len(places), pa.large_binary()), places], fields=list(IMAGE_TYPE)
    )


def canonical_images(column: pa.ChunkedArray, root: str, *, where: str) -> pa.ChunkedArray:
    """An image column as `IMAGE_TYPE`; the bytes are not copied. Paths without bytes become absolute.

    Raises:
        DataError: if the column's type holds no image.
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
        data = children["bytes"].cast(pa.large_binary()) if "bytes" in children else data
        path = children["path"].cast(pa.string()) if "path" in children else path
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        data = chunk.cast(pa.large_binary())
    elif _is_text(kind):
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


def canonical_labels(
    column: pa.ChunkedArray, names: list[str] | None, *, where: str, separators: str = ""
) -> tuple[pa.Array, list[str] | None]:
    """A label column as int64 or list<int64>, with its class names.

    Numbers stay; names become their rank in sorted order. A negative number means unknown, as in the test
    splits of Hugging Face, and becomes null.

    Args:
        column: integers, strings, or lists of either; or all null.
        names: the class names that the numbers stand for, if known.
        where: what to name in an error.
        separators: characters that separate several labels in one string.

    Raises:
        DataError: if the type is no label, or a number has no name.
    """
    label = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(label, pa.ChunkedArray):
        label = pa.concat_arrays(label.chunks)
    if pa.types.is_dictionary(label.type):
        label = label.cast(label.type.value_type)
    if pa.types.is_null(label.type):
        return label, names
    if separators and _is_text(label.type):
        label = pc.utf8_trim(label, f" {separators}")
        blank = pc.equal(label, "")
        label = pc.if_else(pc.fill_null(blank, True), pa.scalar(None, label.type), label)
        if pc.any(pc.match_substring_regex(label, f"[{separators}]")).as_py():
            label = pc.split_pattern_regex(label, f"[{separators}]")
    if pa.types.is_list(label.type) or pa.types.is_large_list(label.type):
        return _list_labels(label, names, where)
    numbers, names = _numbers(label, names, where)
    return pc.if_else(pc.less(numbers, 0), pa.scalar(None, pa.int64()), numbers), names


def _list_labels(label: pa.Array, names: list[str] | None, where: str) -> tuple[pa.Array, list[str] | None]:
    numbers, names = _numbers(label.flatten(), names, where)
    if len(numbers) and (numbers.null_count or pc.min(numbers).as_py() < 0):
        raise DataError("a list of labels holds an unknown one", where=where, mend="leave it out of the list")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(label), 0), dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = label.is_null() if label.null_count else None
    return pa.ListArray.from_arrays(pa.array(offsets), numbers, mask=mask), names


def _numbers(label: pa.Array, names: list[str] | None, where: str) -> tuple[pa.Array, list[str] | None]:
    if pa.types.is_integer(label.type):
        return label.cast(pa.int64()), _checked_names(label, names, where)
    if not _is_text(label.type):
        raise DataError(f"the labels are of type {label.type}", where=where, mend="use integers or names")
    label = pc.utf8_trim_whitespace(label)
    if names is None and pc.all(pc.match_substring_regex(label, r"^-?\d{1,18}$")).as_py():
        return label.cast(pa.int64()), None
    names = names or sorted(pc.unique(label.drop_null()).to_pylist())
    index = pc.index_in(label, value_set=pa.array(names, label.type))
    unknown = label.filter(pc.and_(index.is_null(), label.is_valid()))
    if len(unknown):
        raise DataError(f"label '{unknown[0]}' is not among the class names", where=where)
    return index.cast(pa.int64()), names


def _checked_names(label: pa.Array, names: list[str] | None, where: str) -> list[str] | None:
    highest = pc.max(label).as_py() if len(label) else None
    if names is not None and highest is not None and highest >= len(names):
        raise DataError(
            f"label {highest} has no name: there are {len(names)} class names",
            where=where,
            mend="mend either",
        )
    return names


def lists_of_classes(multi_hot: npt.NDArray[np.bool_]) -> pa.Array:
    """list<int64> [n]: the classes that each row of a multi-hot array [n, classes] has, ascending."""
    rows, columns = np.nonzero(multi_hot)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(multi_hot)))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(columns, pa.int64()))


def _declared_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Class names from the metadata that Hugging Face writes into a schema."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
    except (KeyError, TypeError, ValueError):
        return None
    # Multi-label columns wrap the ClassLabel: {"feature": {…}, "_type": "Sequence"}, or a list of one.
    while isinstance(feature, (dict, list)) and feature:
        if isinstance(feature, list):
            feature = feature[0]
        elif "names" in feature:
            return [str(name) for name in feature["names"]]
        else:
            feature = feature.get("feature")
    return None


def _table(
    ids: Any, label: Any, *, images: Any = None, paths: pa.Array | None = None, rest: pa.Table | None = None
) -> pa.Table:
    if paths is not None:
        images = images_at(paths)
    columns = {"id": ids.cast(pa.string()), "image": images, "label": label}
    if rest is not None:
        columns |= {name: rest[name] for name in rest.column_names}
    return pa.table(columns)


def _without(table: pa.Table, names: Iterable[str | None]) -> pa.Table:
    # What would hide behind a canonical name (a second image column, say) is left out as well.
    taken = {"id", "image", "label", *names}
    return table.select([name for name in table.column_names if name not in taken])


def _first_of(table: pa.Table, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in table.column_names), None)


def _read_files(folder: str, names: Sequence[str], root: str | None, *, where: str) -> Rows:
    suffixes = {_suffix(name) for name in names}
    files = [location.join(folder, name) for name in names]
    if suffixes <= IMAGE_SUFFIXES:
        return Rows(_table(pa.array(names), pa.nulls(len(names)), paths=pa.array(files)))
    if suffixes == {".parquet"}:
        return read_parquet(files, root)
    if suffixes == {".arrow"}:
        return read_arrow(files, root)
    if len(files) == 1 and suffixes == {".txt"}:
        return read_list(files[0], root)
    if len(files) == 1 and suffixes == {".csv"}:
        return read_csv(files[0], root)
    raise DataError("not a form of images that is known", where=where, mend=_known_forms())


def _known_forms() -> str:
    return (
        "give an image, a folder or a pattern (photos/*.jpg) of images, a .txt list, a .csv, or .parquet "
        "or .arrow files"
    )


def _matching(pattern: str) -> tuple[str, list[str]]:
    """The folder before the first wildcard, and the names below it that match, sorted."""
    path, question, query = pattern.partition("?") if location.is_uri(pattern) else (pattern, "", "")
    base = re.split(r"[*\[]", path, maxsplit=1)[0].rsplit("/", 1)[0] or "/"
    folder = f"{base}{question}{query}"
    if location.find(folder).type != fs.FileType.Directory:
        raise DataError("the folder of this pattern is not there", where=pattern, mend="check the path")
    inner = path[len(base.rstrip("/")) + 1 :]
    # fnmatch lets `*` cross folders; a pattern here matches as many folders as it names.
    found = (name for name in location.walk(folder) if name.count("/") == inner.count("/"))
    names = sorted(name for name in found if fnmatch.fnmatchcase(name, inner))
    if not names:
        raise DataError("no file matches this pattern", where=pattern, mend="check the path")
    return folder, names


def _refuse_several_splits(folder: str, names: Sequence[str]) -> None:
    heads = {re.split(r"[-_.]", name, maxsplit=1)[0] for name in names}
    if len(heads) > 1 and heads <= _SPLIT_NAMES:
        raise DataError(
            f"the folder holds several splits: {', '.join(sorted(heads))}",
            where=folder,
            mend=f"give one of them, such as {location.join(folder, sorted(heads)[0])}*.parquet",
        )


def _refuse_missing(paths: Sequence[str], where: str) -> None:
    """Fail where a list names local files that are not there; remote ones would cost a request each."""
    missing = [path for path in paths if not location.is_uri(path) and not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} images are missing, the first is {missing[0]}",
            where=where,
            mend="put them there, or give the folder that the paths start from as 'root'",
        )


def _text(file: str) -> str:
    with location.open_file(file) as source:
        data = bytes(source.read())
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not a text file in UTF-8: {error}", where=file) from None


def _suffix(name: str) -> str:
    return posixpath.splitext(name.partition("?")[0] if location.is_uri(name) else name)[1].lower()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
