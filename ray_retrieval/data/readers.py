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
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from ray_retrieval.data import location
from ray_retrieval.data.columns import (
    LABEL_COLUMNS,
    as_text,
    canonical_images,
    canonical_labels,
    first_of,
    images_at,
    is_text,
    is_utf8,
    refuse_repeated,
    without_views,
)
from ray_retrieval.data.csv_files import labels_of_csv, parse_csv, refuse_shortened
from ray_retrieval.data.list_files import parse_list
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.storage import is_uri, split_query

_DECODED = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
IMAGE_SUFFIXES = _DECODED | {".heic", ".heif", ".avif", ".jxl"}
"""Of images. The latter four cannot be decoded, and are told like damaged ones rather than passed over."""
_SPLIT_NAMES = frozenset({"train", "test", "val", "valid", "validation", "query", "queries", "gallery"})
_IMAGE_COLUMNS = ("image", "img")
_TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".txt", ".csv"})
_BATCH_BYTES = 1 << 30
_MISSING = "put them there, or give the folder that the paths start from as 'root'"
_LABELS = "labels of a list are whole numbers from 0 behind a space; for others give a .csv with a header"


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
        DataError: if nothing is there, or nothing that is known, or if a name is not UTF-8.
    """
    base = None if root is None else location.expand(root)
    place = location.expand(uri)
    _refuse_other_encodings([place])
    # What is there wins over a pattern: names may hold brackets.
    kind = location.find(place).type
    if kind == fs.FileType.Directory:
        inside = [name for name in location.files_in(place) if _suffix(name) in _TABLE_SUFFIXES]
        tables = [name for name in inside if _suffix(name) in (".parquet", ".arrow")]
        if tables:
            _refuse_other_encodings(tables, place)
            _refuse_several_splits(place, tables)
            return _read_files(place, tables, base, where=place)
        return read_folder(place, lists=inside)
    if kind == fs.FileType.File:
        return _read_files(location.parent(place), [location.name_of(place)], base, where=place)
    if "*" in place or "[" in place:
        return _read_files(*_matching(place), base, where=place)
    raise DataError("nothing is there", where=place, mend="check the path")


def check_root(root: str | None, places: Iterable[str], *, where: str) -> None:
    """Refuse a folder for paths to start from where there are none.

    Args:
        root: that folder, if one is given.
        places: of images, in any form.
        where: the root is given, for the error.

    Raises:
        RecipeError: if none of the places is a list or table, or what is not known here.
        DataError: if a store cannot be reached.
    """
    if root is not None and not any(map(_names_paths, places)):
        raise RecipeError(
            "it is for the paths in lists and tables, and these are none", where=where, mend="leave it out"
        )


def _names_paths(uri: str) -> bool:
    place = location.expand(uri)
    kind = location.find(place).type
    if kind == fs.FileType.Directory:
        return any(_suffix(name) in (".parquet", ".arrow") for name in location.files_in(place))
    return _suffix(place) not in IMAGE_SUFFIXES


def read_folder(folder: str, lists: Sequence[str] = ()) -> Rows:
    """Images below a folder, sorted by their path; the first folder on the way is the class.

    A folder without sub-folders gives rows without labels, and so do images that lie beside class folders.
    The id of an image is its path below the folder.

    Args:
        folder: a local path or URI.
        lists: list files that lie in the folder too, for a better error when there is no image.

    Raises:
        DataError: if there is no image, if a name is not UTF-8, if a sub-folder cannot be read, or if the
            sub-folders are splits rather than classes.
    """
    names = sorted(name for name in location.walk(folder) if _suffix(name) in IMAGE_SUFFIXES)
    _refuse_other_encodings(names, folder)
    if not names:
        mend = f"did you mean {location.join(folder, lists[0])}?" if lists else _known_forms()
        raise DataError("no image in this folder", where=folder, mend=mend)
    parts = [name.split("/") for name in names]
    found = {part[0] for part in parts if len(part) > 1}
    if found and found <= _SPLIT_NAMES and all(len(part) != 2 for part in parts):
        raise DataError(
            f"its sub-folders are splits, not classes: {', '.join(sorted(found))}",
            where=folder,
            mend=f"give one of them, such as {location.join(folder, sorted(found)[0])}",
        )
    # One name however its letters are composed: macOS keeps é as two signs.
    composed = {name: unicodedata.normalize("NFC", name) for name in found}
    class_names = sorted(set(composed.values()))
    number = {name: index for index, name in enumerate(class_names)}
    labels = [number[composed[part[0]]] if len(part) > 1 else None for part in parts]
    label = pa.array(labels, pa.int64()) if class_names else pa.nulls(len(names))
    paths = [location.join(folder, name) for name in names]
    return Rows(_table(pa.array(names), label, paths=pa.array(paths)), class_names or None)


def read_list(file: str, root: str | None = None) -> Rows:
    """A text file with one image a line: `path`, `path class` or `path 0 0 1 … 0` (multi-hot).

    Paths are relative to `root`, or else to the list's own folder; the id of an image is its path as it
    stands in the list.

    Raises:
        DataError: as `parse_list`; or if an image is missing. Where all are, and labels seem to stand there
            that a list cannot have, the mend says what it can.
    """
    found = parse_list(file)
    base = root or location.parent(file)
    paths = [location.join(base, name) for name in found.names]
    _refuse_missing(paths, file, none_there=_LABELS if _has_stray_label(found.names[-1]) else _MISSING)
    return Rows(_table(pa.array(found.names), found.label, paths=pa.array(paths)), classes=found.classes)


def read_csv(file: str, root: str | None = None) -> Rows:
    """A CSV file with a header: a path, optionally `id` and `label`, and any further columns.

    Labels are class numbers or names; several of one image are separated by `|` or `;`. Numbers are names
    where one has more than six digits. An empty field is unknown. Among numbers `NA`, `NaN`, `null` and the
    like are unknown too; among words they are words. Columns without a name and a value, and rows without a
    value, as spreadsheets add them, are left out; so are spaces around the columns' names.

    Raises:
        DataError: if the file is no CSV, has no column of paths, an empty path, or two columns of one name.
    """
    table, column = parse_csv(file)
    given = table[column].combine_chunks()
    paths = [location.join(root or location.parent(file), name) for name in given.to_pylist()]
    _refuse_missing(paths, file)
    label_column = first_of(table.column_names, LABEL_COLUMNS)
    for name in {"id", label_column or "id"} & set(table.column_names):
        refuse_shortened(table[name], name, where=file)
    label, class_names = pa.nulls(len(table)), None
    if label_column is not None:
        label, class_names = labels_of_csv(table[label_column], where=file)
    ids = table["id"] if "id" in table.column_names else given
    rest = _without(table, (column, label_column, "id"))
    return Rows(_table(ids, label, paths=pa.array(paths), rest=rest), class_names)


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

    Columns that are views of text or bytes, as Polars writes them, are read into memory.

    Raises:
        DataError: if a file is no Arrow IPC, has no image column, or does not fit the others.
    """
    return _join_tables([(file, _read_one_arrow(file)) for file in files], root)


def _read_one_parquet(file: str) -> pa.Table:
    try:
        reader = pq.ParquetFile(location.open_file(file))
        groups = [batch for group in range(reader.num_row_groups) for batch in _batches(reader, group)]
        return pa.Table.from_batches(groups, schema=reader.schema_arrow)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a valid Parquet file: {error}", where=file) from None
    except pa.ArrowNotImplementedError as error:
        raise DataError(f"the Parquet file cannot be read: {error}", where=file) from None


def _batches(reader: pq.ParquetFile, group: int) -> list[pa.RecordBatch]:
    """The rows of a row group, so many at once as Arrow reads: of a struct less than 2 GiB."""
    found = reader.metadata.row_group(group)
    rows = max(1, min(found.num_rows, found.num_rows * _BATCH_BYTES // max(1, found.total_byte_size)))
    while True:
        try:
            return list(reader.iter_batches(rows, row_groups=[group]))
        except pa.ArrowNotImplementedError:
            # The size in the file is that of dictionaries, whose values may stand in many rows each.
            if rows == 1:
                raise
            rows = max(1, rows // 8)


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
    for file, piece in pieces:
        refuse_repeated(piece.column_names, where=file)
    try:
        plain = [without_views(piece) for _, piece in pieces]
        table = pa.concat_tables(plain, promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"the files do not have the same columns: {error}", where=where) from None
    column = first_of(table.column_names, _IMAGE_COLUMNS)
    if column is None:
        raise DataError(
            f"no image column among {', '.join(table.column_names)}", where=where, mend="name it 'image'"
        )
    if len(table) == 0:
        raise DataError("the file has no row", where=where)
    images = canonical_images(table[column], root or location.parent(where), where=where)
    label_column = first_of(table.column_names, LABEL_COLUMNS)
    label, names = pa.nulls(len(table)), None
    if label_column is not None:
        declared = _declared_names(table.schema, label_column)
        label, names = canonical_labels(table[label_column], declared, where=where)
    given = table["id"] if "id" in table.column_names else _ids(table[column], pieces)
    ids = as_text(given, "id", where=where)
    rest = _without(table, (column, label_column, "id"))
    return Rows(_table(ids, label, images=images, rest=rest), names)


def _ids(column: pa.ChunkedArray, pieces: Sequence[tuple[str, pa.Table]]) -> pa.Array:
    """The images' own paths where all have a different one; else file name and row."""
    paths: Any = None
    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        paths = pc.struct_field(column, "path")
    elif is_text(column.type):
        paths = column
    if paths is not None and paths.null_count == 0 and pc.count_distinct(paths).as_py() == len(paths):
        return paths
    names = []
    for file, piece in pieces:
        stem = posixpath.splitext(location.name_of(file.replace(os.sep, "/")))[0]
        names += [f"{stem}-{row:07d}" for row in range(len(piece))]
    return pa.array(names)


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
    columns = {"id": ids, "image": images, "label": label}
    if rest is not None:
        columns |= {name: rest[name] for name in rest.column_names}
    return pa.table(columns)


def _without(table: pa.Table, names: Iterable[str | None]) -> pa.Table:
    # What would hide behind a canonical name (a second image column, say) is left out as well.
    taken = {"id", "image", "label", *names}
    return table.select([name for name in table.column_names if name not in taken])


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
    path, query = split_query(pattern)
    base = re.split(r"[*\[]", path, maxsplit=1)[0].rsplit("/", 1)[0] or "/"
    folder = f"{base}{query}"
    if location.find(folder).type != fs.FileType.Directory:
        raise DataError("the folder of this pattern is not there", where=pattern, mend="check the path")
    inner = path[len(base.rstrip("/")) + 1 :]
    # fnmatch lets `*` cross folders; a pattern here matches as many folders as it names.
    found = (name for name in location.walk(folder) if name.count("/") == inner.count("/"))
    names = sorted(name for name in found if fnmatch.fnmatchcase(name, inner))
    if not names:
        raise DataError("no file matches this pattern", where=pattern, mend="check the path")
    _refuse_other_encodings(names, folder)
    return folder, names


def _refuse_several_splits(folder: str, names: Sequence[str]) -> None:
    heads = {re.split(r"[-_.]", name, maxsplit=1)[0] for name in names}
    if len(heads) > 1 and heads <= _SPLIT_NAMES:
        raise DataError(
            f"the folder holds several splits: {', '.join(sorted(heads))}",
            where=folder,
            mend=f"give one of them, such as {location.join(folder, sorted(heads)[0])}*.parquet",
        )


def _refuse_other_encodings(names: Sequence[str], where: str | None = None) -> None:
    """Fail where a name has bytes that are not UTF-8, as archives of old systems have them."""
    wrong = [name for name in names if not is_utf8(os.fsencode(name))]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(names)} names are not UTF-8, the first is {os.fsencode(wrong[0])!r}",
            where=where,
            mend="rename them: `convmv -f latin1 -t utf8 -r --notest` does so for a whole folder",
        )


def _has_stray_label(name: str) -> bool:
    """Whether the path of a list seems to end in a label, such as -1, 1.0, a name, or one behind a comma."""
    *fields, last = re.split(r"[\s,;]+", name)
    if not fields or _suffix(name) in IMAGE_SUFFIXES:
        return False
    number = re.fullmatch(r"[-+]?\d*\.?\d*", last)
    return number is not None or any(_suffix(field) in IMAGE_SUFFIXES for field in fields)


def _refuse_missing(paths: Sequence[str], where: str, none_there: str = _MISSING) -> None:
    """Fail where a list names local files that are not there; remote ones would cost a request each.

    `none_there` is the mend where not one of them is there.
    """
    missing = [path for path in paths if not is_uri(path) and not os.path.isfile(path)]
    if missing:
        mend = none_there if len(missing) == len(paths) else _MISSING
        if os.sep == "/" and "\\" in missing[0]:
            mend = "write the paths with / between folders, not \\"
        else:
            mend = _recomposing(missing[0]) or mend
        raise DataError(
            f"{len(missing)} of {len(paths)} images are missing, the first is {missing[0]}",
            where=where,
            mend=mend,
        )


def _recomposing(path: str) -> str | None:
    """What to do where a file's name there reads the same, but has letters with accents as other signs."""
    others = {"nfc": unicodedata.normalize("NFD", path), "nfd": unicodedata.normalize("NFC", path)}
    for wanted, there in others.items():
        if os.path.isfile(there):
            convmv = f"`convmv -f utf8 -t utf8 --{wanted} -r --notest`"
            return (
                f"letters with accents are composed otherwise there: {convmv} renames the files of a folder"
            )
    return None


def _suffix(name: str) -> str:
    return posixpath.splitext(split_query(name)[0])[1].lower()
