"""The embeddings artefact: descriptors of a table of images, as Parquet parts that describe themselves.

    embeddings.json       model, form of the descriptors, class names, every part's checksum; written last
    part-00000.parquet    columns row · id · label · image · the table's further columns · descriptors, as
                          `columns.py` has them
    part-00000.json       what the part was made of: a part without it does not count
    errors.parquet        id and reason of every image that could not be decoded

Nothing in it tells when or where it was made, so the same model and images give the same bytes.
"""

import functools
import math
import tempfile
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_retrieval.descriptors import DescriptorKind, Descriptors, Form, Local
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.search.columns import column_names, descriptor_columns, descriptors_in, feature_counts
from ray_retrieval.storage import (
    Folder,
    check_file,
    file_entry,
    fingerprint,
    read_description,
    write_description,
)

DESCRIPTION, ERRORS = "embeddings.json", "errors.parquet"
_KIND, _VERSION = "embeddings", 1
_ABOUT = ("format", "version", "fingerprint")
_IN_MEMORY = 1 << 30
"""Bytes of descriptors that are held in memory; more are mapped from a file."""
_ERRORS_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string())])


def check_columns(names: Iterable[str], form: Form, *, where: object = None) -> None:
    """Raise DataError if a column of images is called `row`, `path`, `code`, `vector`, or as what describes.

    Args:
        names: of all columns of a table of images.
        form: of the descriptors that are to stand beside them.
        where: the table.
    """
    taken = sorted({"row", "path", "code", "vector", *column_names(form)} & set(names))
    if taken:
        raise DataError(
            f"column '{taken[0]}' of the images has a name that embeddings need",
            where=where,
            mend="rename the column",
        )


def part_table(
    images: pa.Table,
    descriptors: Descriptors,
    *,
    first_row: int,
    skip: "dict[int, str]",
    keep_images: bool = True,
) -> pa.Table:
    """The rows of a part.

    Args:
        images: id · image struct of bytes and path · label · any further columns.
        descriptors: one row an image, or one set of local features, which may be empty.
        first_row: the number of the first image in the whole input.
        skip: positions of images without a descriptor; they are left out.
        keep_images: keep bytes; else only paths stay.

    Raises:
        DataError: as `check_columns`.
    """
    check_columns(images.column_names, Form.of(descriptors))
    columns = descriptor_columns(descriptors)
    rows = pa.array(np.arange(first_row, first_row + len(images)))
    if not keep_images:
        column = images["image"].combine_chunks()
        paths = column.field("path") if isinstance(column, pa.StructArray) else column.chunk(0).field("path")
        stripped = pa.StructArray.from_arrays(
            [pa.nulls(len(paths), pa.large_binary()), paths], names=["bytes", "path"]
        )
        images = images.set_column(images.column_names.index("image"), "image", stripped)
    table = images.add_column(0, "row", rows)
    for field, column in columns:
        table = table.append_column(field, column)
    if not skip:
        return table
    kept = np.ones(len(table), np.bool_)
    kept[list(skip)] = False
    return table.filter(pa.array(kept))


def write_part(
    folder: Folder, number: int, table: pa.Table, *, key: str, errors: list[tuple[str, str]]
) -> dict[str, Any]:
    """Write a part and, after it, the file that makes it count.

    Args:
        folder: of the embeddings.
        number: of the part, from 0.
        table: as `part_table` makes it.
        key: stands for all that the part was made of.
        errors: (id, reason) of the images of the part's range that are left out.

    Returns:
        The part's entry in `embeddings.json`.
    """
    name = f"part-{number:05d}"
    with folder.writing(f"{name}.parquet") as stream:
        # Hardly a value of a local feature comes twice: looking for such as do costs more than it saves.
        pq.write_table(
            table, stream, compression="zstd", use_dictionary="descriptors" not in table.schema.names
        )
        stream.flush()  # an earlier artefact stays as it was where there is no space for this part
        # From here on the folder is not what its description says, until `finish` writes a new one.
        folder.remove(DESCRIPTION)
    images = pc.struct_field(table["image"], "bytes")
    entry = {
        **file_entry(folder, f"{name}.parquet"),
        "rows": len(table),
        "images": len(images) - images.null_count,
        "errors": [list(error) for error in errors],
    }
    folder.write_json(f"{name}.json", {"key": key, **entry})
    return entry


def finished_part(folder: Folder, number: int, key: str) -> dict[str, Any] | None:
    """The entry of a part that is complete and was made of what `key` stands for, else None."""
    name = f"part-{number:05d}"
    if not folder.exists(f"{name}.json"):
        return None
    try:
        entry: dict[str, Any] = folder.read_json(f"{name}.json")
        if not isinstance(entry, dict) or entry.pop("key", None) != key:
            return None
        check_file(folder, entry, content=True)
    except ArtefactError:
        return None
    return entry


def finish(
    folder: Folder,
    *,
    model: str,
    form: Form,
    classes: int,
    class_names: list[str] | None,
    parts: list[dict[str, Any]],
    source: str,
    engine: str = "torch",
    export: str | None = None,
) -> None:
    """Make the folder a complete artefact and remove parts of an earlier, longer one.

    Args:
        folder: of the embeddings.
        model: fingerprint of the model.
        form: of the descriptors.
        classes: number of classes that labels count in; 0 without labels.
        class_names: their names, where they have any.
        parts: entries of all parts, in order.
        source: fingerprint of the table of images.
        engine: what computed the descriptors; noted where it was not the model itself.
        export: sha256 of the file that the engine ran; None for the model itself.
    """
    errors = [error for part in parts for error in part["errors"]]
    rows = [{"id": name, "reason": reason} for name, reason in errors]
    with folder.writing(ERRORS) as stream:
        pq.write_table(pa.Table.from_pylist(rows, schema=_ERRORS_SCHEMA), stream)
    body = {
        "model": model,
        **({} if engine == "torch" else {"engine": engine, "export": export}),
        **form.as_json(),
        "classes": classes,
        "class_names": class_names,
        "source": source,
        "rows": sum(part["rows"] for part in parts),
        "errors": {**file_entry(folder, ERRORS), "rows": len(errors)},
        "parts": [{key: value for key, value in part.items() if key != "errors"} for part in parts],
    }
    body["fingerprint"] = fingerprint(body)
    write_description(folder, DESCRIPTION, kind=_KIND, version=_VERSION, body=body)
    known = {part["file"].removesuffix(".parquet") for part in parts}
    for name in folder.names():
        stem = name.partition(".")[0]
        if stem.startswith("part-") and stem not in known:
            folder.remove(name)


class Embeddings:
    """A complete embeddings directory. Make one with `Embeddings.open`.

    Attributes:
        folder: where it lies.
        model: fingerprint of the model that made it.
        engine: what computed the descriptors: the model itself (`torch`), or an export of it.
        export: sha256 of the file of that export; None for the model itself.
        form: of the descriptors.
        classes: number of classes that labels count in; 0 without labels.
        class_names: their names, or None.
        rows: images with a descriptor.
        parts: what is recorded of each part: file, bytes, sha256, rows, images (those held as bytes).
        error_count: images without a descriptor.
        fingerprint: 16 hexadecimal digits that stand for the content.
    """

    def __init__(self, folder: Folder, description: dict[str, Any]) -> None:
        self.folder = folder
        self.model: str = description["model"]
        self.engine: str = description.get("engine", "torch")
        self.export: str | None = description.get("export")
        self.form = Form.from_json(description)
        self.classes: int = description["classes"]
        self.class_names: list[str] | None = description["class_names"]
        self.rows: int = description["rows"]
        self.error_count: int = description["errors"]["rows"]
        self.parts: list[dict[str, Any]] = description["parts"]
        self.fingerprint: str = description["fingerprint"]

    @classmethod
    def open(cls, uri: str | Folder, *, check: Literal["size", "content"] = "size") -> "Embeddings":
        """The embeddings at a path or URI.

        Args:
            uri: the directory.
            check: compare the sizes of all parts, or their checksums as well.

        Raises:
            ArtefactError: if there are none, they are incomplete, or a part is missing or damaged.
        """
        folder = Folder(uri)
        description = read_description(folder, DESCRIPTION, kind=_KIND, version=_VERSION)
        body = {key: value for key, value in description.items() if key not in _ABOUT}
        if fingerprint(body) != description.get("fingerprint"):
            raise ArtefactError(
                "damaged: its fingerprint does not fit its content",
                where=folder.uri_of(DESCRIPTION),
                mend="delete the file and encode again: the parts are kept",
            )
        for entry in (*description["parts"], description["errors"]):
            check_file(folder, entry, content=check == "content")
        return cls(folder, description)

    def read_part(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """A part's rows; all columns unless named, and of a struct all fields unless named as `image.path`.

        Raises:
            ArtefactError: naming the file, if it cannot be read.
        """
        name = self.parts[number]["file"]
        try:
            with self.folder.reading(name) as source:
                return pq.ParquetFile(source).read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise ArtefactError(
                f"damaged: {str(error).splitlines()[0]}",
                where=self.folder.uri_of(name),
                mend="delete the file and encode again: the other parts are kept",
            ) from None

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Columns of all parts; one that is null throughout a part has the type that it has in the others."""
        schemas = []
        for part in self.parts:
            with self.folder.reading(part["file"]) as source:
                schemas.append(pq.read_schema(source).remove_metadata())
        return pa.unify_schemas(schemas)

    @functools.cached_property
    def errors(self) -> list[tuple[str, str]]:
        """Id and reason of every image without a descriptor."""
        with self.folder.reading(ERRORS) as source:
            table = pq.read_table(source)
        return list(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))

    @property
    def features(self) -> int:
        """Local features of all images; 0 of other kinds."""
        if self.form.kind is not DescriptorKind.LOCAL:
            return 0
        parts = range(len(self.parts))
        return sum(int(feature_counts(self.read_part(number, ["scales"])).sum()) for number in parts)

    @property
    def descriptor_columns(self) -> list[str]:
        """Names of the columns that hold the descriptors."""
        return column_names(self.form)

    @functools.cached_property
    def descriptors(self) -> Descriptors:
        """All descriptors, in row order; above 1 GiB in a file of their own that is mapped into memory."""
        found, row = self._room(), 0
        for number in range(len(self.parts)):
            part = descriptors_in(self.read_part(number, self.descriptor_columns), self.form)
            _fill(found, row, part)
            row += len(part)
        return found

    def _room(self) -> Descriptors:
        """Descriptors of all rows whose values are still to be filled in."""
        if self.form.kind is not DescriptorKind.LOCAL:
            none = self.form.zeros(0).data
            return self.form.with_rows(_empty((self.rows, none.shape[1]), none.dtype))
        counts = [feature_counts(self.read_part(number, ["scales"])) for number in range(len(self.parts))]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(counts))])
        features = int(offsets[-1])
        return Local(
            offsets,
            _empty((features, self.form.size), np.float16),
            _empty((features, 2), np.float32),
            _empty((features,), np.float32),
            _empty((features,), np.float32),
            _empty((self.rows, 2), np.int32),
            _empty((self.rows, self.form.vectors), np.float32),
        )

    @functools.cached_property
    def ids(self) -> list[str]:
        """All ids, in row order."""
        return [
            name
            for number in range(len(self.parts))
            for name in self.read_part(number, ["id"])["id"].to_pylist()
        ]

    @functools.cached_property
    def labels(self) -> "npt.NDArray[np.int64] | npt.NDArray[np.bool_] | None":
        """int64 [n] class numbers, or bool [n, classes] for images of several; None if any has no label."""
        columns = [self.read_part(number, ["label"])["label"] for number in range(len(self.parts))]
        kind = self.schema.field("label").type if columns else pa.null()
        label = pa.chunked_array([chunk for column in columns for chunk in column.cast(kind).chunks], kind)
        if pa.types.is_null(label.type) or label.null_count:
            return None
        if not pa.types.is_list(label.type):
            return np.asarray(label, dtype=np.int64)
        numbers = np.asarray(pc.list_flatten(label), dtype=np.int64)
        several = np.zeros((len(label), self.classes), np.bool_)
        several[np.repeat(np.arange(len(label)), np.asarray(pc.list_value_length(label))), numbers] = True
        return several


def _empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array to fill: in memory, or in a temporary file that is gone with it."""
    if math.prod(shape) * np.dtype(dtype).itemsize <= _IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="descriptors-") as file:
        return np.asarray(np.memmap(file, dtype, "w+", shape=shape))


def _fill(found: Descriptors, row: int, part: Descriptors) -> None:
    """Put descriptors in their places from a row on; sets of local features have as many there."""
    rows = slice(row, row + len(part))
    if not (isinstance(found, Local) and isinstance(part, Local)):
        found.data[rows] = part.data
        return
    features = slice(found.offsets[row], found.offsets[row + len(part)])
    for name in ("data", "locations", "scales", "scores"):
        getattr(found, name)[features] = getattr(part, name)
    for name in ("sizes", "vectors"):
        getattr(found, name)[rows] = getattr(part, name)
