"""Descriptors that were made elsewhere as the rows of an index: no model is needed.

    build(imported("vectors.npy", ids="ids.txt"), "index")
    build(imported(["part-0.parquet", "part-1.parquet"], labels="species", normalise=True), "index")

The files are read some rows at a time, while the shards are written: see `vector_files`. Vectors must be of
length 1, or are made so on request, and the bits that fill a code's last byte must be zero. In place of a
model's fingerprint stands one that says so and stands for the name that the user gives what made them, so
that descriptors of different origin do not mix.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ray_retrieval.config import Config, validate
from ray_retrieval.descriptors import Codes, DescriptorKind, Descriptors, Form, Local, Vectors, concatenate
from ray_retrieval.errors import DataError, QueryError, RecipeError
from ray_retrieval.search.export_files import ExportedFile, is_export
from ray_retrieval.search.faiss_files import FaissFile
from ray_retrieval.search.given_descriptors import descriptors_from, form_of, schema_of, stated
from ray_retrieval.search.side_values import Beside, as_ids, classes_in, label_type, numbered, values_beside
from ray_retrieval.search.sources import Rows, classes_of, renumbered
from ray_retrieval.search.table_files import TableFile
from ray_retrieval.search.vector_files import (
    FAISS,
    SUFFIXES,
    ArrayFile,
    NpzFile,
    VectorFile,
    bare,
    is_folder,
    suffix_of,
)
from ray_retrieval.storage import digest, fingerprint

Place = str | Path
Array = npt.NDArray[Any]

_ELSEWHERE = "elsewhere:"
_LONGEST_NAME = 80


class ImportConfig(Config):
    """What descriptors that were made elsewhere are."""

    bits: int | None = Field(default=None, ge=1)
    """Of a code; default 8 for each byte, or what the file says."""
    normalise: bool = False
    """Divide each vector by its length."""
    column: str | None = None
    """Of a table the column, and of a `.npz` file the array, that holds the descriptors; default the only one
    that can. An export says so itself."""
    ids: str | None = None
    """A column; or a file of as many ids: text, one a line, a JSON list, or `.npy`. Default the column `id`;
    where there is none, the rows have no ids but their numbers."""
    labels: str | None = None
    """A column of class numbers or names, or of lists of them; or a file as for `ids`. Default the column
    `label`, where there is one. Text of which each is a number, without zeros in front, is numbers."""
    model_name: str = ""
    """What made the descriptors, in your own words: rows can be added only to an index of the same."""


def made_elsewhere(model: str) -> bool:
    """Whether what stands for a model is that of descriptors that were made elsewhere."""
    return model.startswith(_ELSEWHERE)


def maker(model: str) -> str:
    """What stands for a model, for errors."""
    if not made_elsewhere(model):
        return f"model {model}"
    name = model.removeprefix(_ELSEWHERE).rpartition(":")[0]
    return f"something else ('{name}')" if name else "something else (without a name)"


def elsewhere(name: str, form: Form) -> str:
    """What stands for the model of descriptors of a form that were made elsewhere.

    Args:
        name: what made them, in the user's words.
        form: of the descriptors.

    Raises:
        RecipeError: if the name is long, or more than one line.
    """
    if len(name) > _LONGEST_NAME or not all(letter.isprintable() for letter in name):
        raise RecipeError(
            f"a name is one line of up to {_LONGEST_NAME} letters", where="`model_name`", mend="shorten it"
        )
    return f"{_ELSEWHERE}{name}:{fingerprint([name, form.as_json()])}"


def imported(
    files: "Place | Array | Sequence[Place | Array]",
    *,
    ids: "Place | Sequence[str] | None" = None,
    labels: "Place | Sequence[Any] | None" = None,
    model: str | None = None,
    **settings: Any,
) -> "ImportedRows":
    """Rows of files, or arrays, for `build` and `add`.

    Args:
        files: one or several, whose rows follow each other: paths, URIs, or arrays uint8 [n, width] of packed
            codes, or of floating-point numbers [n, dimension].
        ids: themselves; or a column; or a file of as many: text, one a line, a JSON list, or `.npy`. Default
            the column `id`; where there is none, the rows have no ids but their numbers.
        labels: class numbers or names, or lists of them; or a column, or a file, as of ids. Default the
            column `label`, where there is one. Text of which each is a number, without zeros in front, is
            numbers.
        model: fingerprint of the model that made them, where it is one of this package; else what the files
            say, or that they were made elsewhere.
        settings: `bits` of a code, 8 for each byte unless told; `normalise=True` divides each vector by its
            length; `column` of a table, or array of a `.npz` file, that holds the descriptors; `model_name`,
            what made them, in your words.

    Raises:
        ArtefactError: if a file is missing.
        DataError: if a file cannot be read, or holds something else, or the files do not fit together.
        RecipeError: if a setting does not fit.
    """
    alone = isinstance(files, str | np.ndarray) or not isinstance(files, Iterable)
    several: list[Any] = [files] if alone else list(files)  # type: ignore[arg-type]
    for file in several:
        if isinstance(file, Codes | Vectors | Local):
            raise DataError(f"{type(file).__name__} are no file", mend="give their array: descriptors.data")
        if not isinstance(file, str | Path | np.ndarray):
            mend = "give an array: numpy.asarray(rows, 'float32')"
            raise DataError("a list of numbers is no file", mend=mend)
    told, given = {}, {}
    for name, values in (("ids", ids), ("labels", labels)):
        if isinstance(values, str | Path):
            told[name] = str(values)
        elif values is not None:
            given[name] = _column(name, values)
    config = validate(ImportConfig, {**told, **settings})
    return ImportedRows([_opened(file, config.column) for file in several], config, model, given)


def _column(name: str, values: Sequence[Any]) -> pa.Array:
    """Ids or labels, one a row, as Arrow has them.

    Raises:
        DataError: if they are of several kinds, or an array of more than one axis.
    """
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(
            f"the {name} are no column: {str(error).splitlines()[0]}",
            mend="give one value a row, all of one kind; a list of its classes for an image of several",
        ) from None


def queries_in(
    file: "Place | Array", form: Form, model: str | None = None, **settings: Any
) -> tuple[list[str], Codes | Vectors]:
    """Queries for an index of a form, and their ids, or their numbers where they have none.

    Args:
        file: as for `imported`.
        form: of the index.
        model: what stands for the model of the index. Compared if the file, or `model_name`, says what made
            the queries.
        settings: of `ImportConfig`.

    Raises:
        QueryError: if it holds something else than the index, or what another model made.
        RetrievalError: as `imported`.
    """
    if form.kind is DescriptorKind.LOCAL:
        raise QueryError(f"the index holds {form}: it is searched with images")
    rows = imported(file, **settings)
    if form.kind is rows.form.kind is DescriptorKind.CODES and settings.get("bits") is None:
        rows = imported(file, **{**settings, "bits": form.size})
    if rows.form != form or len(rows) == 0:
        held = rows.form if len(rows) else "nothing"
        raise QueryError(f"the index holds {form}, the file {held}", where=rows.where)
    if model is not None and rows.says_model and rows.model != model:
        raise QueryError(
            f"what the index holds was made by {maker(model)}, the queries by {maker(rows.model)}",
            where=rows.where,
            mend="search with descriptors of the model that made the index",
        )
    queries = concatenate([descriptors for _, descriptors in rows.tables(0, len(rows))])
    assert not isinstance(queries, Local)
    ids = rows.ids()
    return ([str(row) for row in range(len(rows))] if ids is None else ids.to_pylist()), queries


def _opened(file: "Place | Array", column: str | None) -> VectorFile:
    if isinstance(file, np.ndarray):
        return ArrayFile(file, "the array")
    place = str(file)
    if is_export(place):
        return ExportedFile(place)
    if is_folder(place):
        raise DataError("a folder, and no export of an index", where=place, mend="give the files in it")
    suffix = suffix_of(place)
    if suffix not in SUFFIXES:
        raise DataError(
            f"no file of descriptors: its name ends in '{suffix}'",
            where=place,
            mend=f"known are {', '.join(SUFFIXES)}",
        )
    if suffix == ".npy":
        return ArrayFile.open(place)
    if suffix == ".npz":
        return NpzFile(place, column)
    return FaissFile(place) if suffix in FAISS else TableFile(place, column)


class ImportedRows:
    """Rows of files of others, all of them or some; see `imported`.

    Attributes:
        form: of the descriptors.
        schema: id and label, where the rows have such, and further columns.
        fingerprint: stands for all that they are.
        model: what stands for what made them.
        class_names: of the classes that labels count in, where they have names.
        where: the files.
        says_model: whether the files, or the user, say what made the descriptors.
        next_id: of rows that an index has numbered, the number that the next one gets; else None.
    """

    engines: tuple[str, ...] = ()

    def __init__(
        self,
        files: Sequence[VectorFile],
        config: ImportConfig,
        model: str | None = None,
        given: "dict[str, pa.Array] | None" = None,
    ) -> None:
        if not files:
            raise RecipeError("no file is given", mend="name one of descriptors")
        if config.column is not None and not any(isinstance(file, NpzFile | TableFile) for file in files):
            raise RecipeError(
                "it is for tables and .npz files, and none is given", where="`column`", mend="leave it out"
            )
        self._files, self._normalise = list(files), config.normalise
        self._before = np.cumsum([0, *(file.rows for file in files)])
        self.where: object = files[0].where if len(files) == 1 else f"{files[0].where} and others"
        self.form = form_of(files, config.bits)
        if config.normalise and self.form.kind is DescriptorKind.CODES:
            raise RecipeError("codes have no length to divide by", where="`normalise`", mend="leave it out")
        said = None if config.model_name else stated([file.model for file in files], "model", self.where)
        self.model = model or said or elsewhere(config.model_name, self.form)
        self.says_model = bool(model or said or config.model_name)
        given = given or {}
        whole, rows = schema_of(files, {"id", "label", config.ids, config.labels}), int(self._before[-1])
        self.next_id = _next_id(files, told="ids" in given or config.ids is not None)
        self._ids = values_beside("id", given.get("ids", config.ids), whole, rows)
        self._labels = values_beside("label", given.get("labels", config.labels), whole, rows)
        names = self._classes()
        self._named = names is not None
        said_names = stated([file.class_names for file in files], "class names", self.where)
        self.class_names = names or said_names if self._labels.given else None
        self._check_ids()
        self.schema = self._schema(whole)
        self.fingerprint = fingerprint(
            [
                [file.checksum() for file in files],
                config.model_dump(mode="json"),
                [self.model, self.form.as_json(), self.class_names],
                [_digest(values.array) for values in (self._ids, self._labels)],
                self.next_id,
            ]
        )
        self._kept: Rows | None = None
        self._renumbered: Rows | None = None

    def __len__(self) -> int:
        return int(self._before[-1]) if self._kept is None else len(self._kept)

    def some(self, kept: Rows | None, labels: Rows | None) -> "ImportedRows":
        assert self._kept is None
        assert self._renumbered is None
        rows = copy.copy(self)
        rows._kept, rows._renumbered = kept, labels
        changes = [None if array is None else digest(array.tobytes()) for array in (kept, labels)]
        rows.fingerprint = fingerprint([self.fingerprint, *changes])
        return rows

    def ids(self) -> "pa.Array | None":
        blocks = self.id_blocks()
        return None if blocks is None else pa.chunked_array(list(blocks), pa.large_string()).combine_chunks()

    def id_blocks(self) -> "Iterator[pa.Array] | None":
        return self._blocks_of_ids() if self._ids.given and self.next_id is None else None

    def _blocks_of_ids(self) -> Iterator[pa.Array]:
        before = 0
        for ids in self._blocks_of_all_ids():
            if self._kept is None:
                yield ids
            else:
                first, last = np.searchsorted(self._kept, [before, before + len(ids)])
                yield ids.take(pa.array(self._kept[first:last] - before))
            before += len(ids)

    def _blocks_of_all_ids(self) -> Iterator[pa.Array]:
        """The ids of all rows of the files, also those that are left out."""
        given = self._ids.array
        if given is not None:
            ids = as_ids(given, self.where)
            yield from ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
            return
        for file in self._files:
            first = 0
            for column in file.column(str(self._ids.column)):
                yield as_ids(column, file.where, first)
                first += len(column)

    def classes(self) -> Rows:
        return classes_of(
            numbered(column, self.class_names, self.where, named=self._named) for column in self._all_labels()
        )

    def tables(self, start: int, stop: int) -> Iterator[tuple[pa.Table, Descriptors]]:
        kept = None if self._kept is None else self._kept[start:stop]
        if kept is not None:
            start, stop = int(kept[0]), int(kept[-1]) + 1
        for first, data, known in self._blocks(start, stop):
            if kept is None:
                yield self._known(known, first, len(data)), self._descriptors(data, first)
                continue
            low, high = np.searchsorted(kept, [first, first + len(data)])
            places = kept[low:high] - first
            if len(places):
                table = self._known(known, first, len(data)).take(pa.array(places))
                yield table, self._descriptors(data, first).take(places)

    def holds_images(self, start: int, stop: int) -> bool:  # noqa: ARG002
        return False

    def images(self, start: int, stop: int) -> Iterator[pa.ChunkedArray]:  # noqa: ARG002
        return iter(())

    def _blocks(self, start: int, stop: int) -> Iterator[tuple[int, Array, pa.Table]]:
        """The rows of all files from one place to another, with the place of each block's first row."""
        for number, file in enumerate(self._files):
            before, after = self._before[number : number + 2].tolist()
            low, high = max(start, before), min(stop, after)
            if low < high:
                at = low
                for data, known in file.blocks(low - before, high - before):
                    yield at, data, known
                    at += len(data)

    def _descriptors(self, data: Array, first: int) -> Codes | Vectors:
        """Descriptors of some rows; refuses what an index does not hold."""
        return descriptors_from(data, self.form, normalise=self._normalise, where=self.where, first_row=first)

    def _known(self, table: pa.Table, first: int, rows: int) -> pa.Table:
        """What is known of some rows, in the columns of the schema."""
        columns: dict[str, Any] = {}
        if self._ids.given:
            values = _values(self._ids, table, first, rows)
            columns["id"] = values if self.next_id is not None else as_ids(values, self.where, first)
        if self._labels.given:
            values = _values(self._labels, table, first, rows)
            column = self._labels.column
            where = self.where if column is None else f"{self.where}, column '{column}'"
            label = numbered(values, self.class_names, where, named=self._named)
            label = pa.chunked_array([label])
            columns["label"] = label if self._renumbered is None else renumbered(label, self._renumbered)
        for field in self.schema:
            if field.name not in columns:
                there = field.name in table.schema.names
                columns[field.name] = table[field.name] if there else pa.nulls(rows, field.type)
        return pa.table(columns).cast(self.schema) if columns else bare(rows)

    def _classes(self) -> list[str] | None:
        """Names of the classes where the labels are text."""
        return classes_in(self._all_labels()) if self._labels.given else None

    def _all_labels(self) -> Iterator[Any]:
        """The labels of all rows as they are given, also of those that are left out, some at a time."""
        if self._labels.array is not None:
            yield self._labels.array
            return
        name = str(self._labels.column)
        for file in self._files:
            if name in file.schema.names:
                yield from file.column(name)

    def _check_ids(self) -> None:
        """Refuse files of which some have ids and others none, and numbers that do not count up."""
        name = self._ids.column
        if name is None:
            return
        for file in self._files:
            if name not in file.schema.names:
                raise DataError(
                    f"there is no column '{name}' of ids, which other files have",
                    where=file.where,
                    mend="give ids to all rows, or to none",
                )
        if self.next_id is not None:
            last = -1
            for column in self._files[0].column(name):
                ids = np.asarray(column)
                if (np.diff(ids, prepend=last) < 1).any() or (ids >= self.next_id).any():
                    raise DataError("the numbers of its rows do not ascend", where=self.where)
                last = ids[-1] if len(ids) else last

    def _schema(self, whole: pa.Schema) -> pa.Schema:
        """Types of what is known of the rows.

        Raises:
            DataError: if a column has a name that is needed for something else.
        """
        fields = []
        if self._ids.given:
            fields.append(pa.field("id", pa.large_string() if self.next_id is None else pa.int64()))
        if self._labels.array is not None:
            fields.append(pa.field("label", label_type(self._labels.array.type)))
        elif self._labels.column is not None:
            fields.append(pa.field("label", label_type(whole.field(self._labels.column).type)))
        # What is asked for stands in place of a column of that name.
        used = {self._ids.column, self._labels.column, *(field.name for field in fields)}
        fields += [field for field in whole if field.name not in used]
        names = [field.name for field in fields]
        if "row" in names:
            raise DataError("column 'row' has a name that an index needs", where=self.where, mend="rename it")
        path = fields[names.index("path")].type if "path" in names else pa.null()
        if not any(fits(path) for fits in (pa.types.is_null, pa.types.is_string, pa.types.is_large_string)):
            raise DataError(
                f"'path' says where an image lies, got {path}", where=self.where, mend="rename the column"
            )
        return pa.schema(fields)


def _values(values: Beside, table: pa.Table, first: int, rows: int) -> Any:
    """Those of some rows: from their own table, where it has any, or cut out of the values of all."""
    if values.array is not None:
        return values.array.slice(first, rows)
    return table[values.column] if values.column in table.schema.names else pa.nulls(rows)


def _next_id(files: Sequence[VectorFile], *, told: bool) -> int | None:
    """The number after those of an exported index that numbers its rows, unless they get other ids."""
    if told or len(files) != 1 or not isinstance(files[0], ExportedFile):
        return None
    return files[0].next_id


def _digest(array: "pa.Array | None") -> str | None:
    """Stands for values."""
    if array is None:
        return None
    sink = pa.BufferOutputStream()
    batch = pa.RecordBatch.from_arrays([array], names=["values"])
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return digest(sink.getvalue().to_pybytes())
