"""An index as files for other programs: what a search can find of a version, in the order of its rows.

    npy         codes.npy or vectors.npy; of local features offsets.npy, descriptors.npy and others
    faiss       index.faiss, an IndexFlatL2 or IndexBinaryFlat; or the index's own approximate structure
    hnsw        index.faiss, an IndexHNSWFlat or IndexBinaryHNSW, which is built for it
    parquet     rows.parquet, descriptors and what else is known of the rows
    arrow       rows.arrow, the same
    lance       rows.lance, the same

Beside the first three lies rows.parquet, with what is known of the rows beside their descriptors, if
anything is. Rows are numbered from 0 in all files, those that were removed are left out. Ids that are these
numbers are not written; others that an index has given its rows are int64. `export.json`, which is written
last, says what all of it is, and `importing.imported` reads the folder again, but for sets of local features,
and what holds the vectors compressed.

Only files that an export has written are ever replaced or deleted: those that `export.json` lists, or, where
one was killed, `export.unfinished.json`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from ray_retrieval.descriptors import DescriptorKind, Descriptors
from ray_retrieval.errors import RecipeError
from ray_retrieval.search.columns import column_names, descriptor_columns, with_metadata
from ray_retrieval.search.export_arrays import OFFSETS, SETS, files_of_sets, writing_array, writing_arrays
from ray_retrieval.search.export_faiss import check_memory, writing_flat, writing_graph, writing_structure
from ray_retrieval.search.export_files import EXPORT, KIND, KNOWN, VERSION
from ray_retrieval.search.export_folder import UNFINISHED, make_room
from ray_retrieval.search.export_tables import LANCE, write_arrow, write_lance, write_parquet
from ray_retrieval.search.index import Index
from ray_retrieval.search.local import LocalSegment
from ray_retrieval.storage import Folder, file_entry, write_description

Format = Literal["npy", "faiss", "hnsw", "parquet", "arrow", "lance"]
FORMATS: tuple[str, ...] = get_args(Format)
TABLES = {
    "parquet": (KNOWN, write_parquet),
    "arrow": ("rows.arrow", write_arrow),
    "lance": (LANCE, write_lance),
}
"""The formats that hold all in one table: the file's name, and what writes it."""

Progress = Callable[[int], object]

_METRICS = {
    DescriptorKind.CODES: "hamming",
    DescriptorKind.VECTORS: "squared_euclidean",
    DescriptorKind.LOCAL: "none",
}
_BLOCK_ROWS, _BLOCK_SETS = 1 << 15, 1 << 8


def export(
    uri: str | Path | Folder,
    out: str | Path | Folder,
    form: Format = "parquet",
    *,
    approximate: bool = False,
    version: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a version of an index as files of another format.

    Args:
        uri: the index directory.
        out: a folder for the files; those of another export in it are deleted.
        form: which format.
        approximate: with `faiss`, the structure of the index's approximate search instead of the vectors.
        version: its number; default the current one.
        progress: called with the number of rows written so far.

    Returns:
        What `export.json` says.

    Raises:
        ArtefactError: if the index is missing or damaged, or the files cannot be written, or `out` is an
            index, or has files of these names that no export wrote.
        RecipeError: if the format is unknown, not one for what the index holds, its package is missing, or
            it is built in more memory than there is.
    """
    if form not in FORMATS:
        raise RecipeError(f"no format '{form}'", where="`form`", mend=f"known are {', '.join(FORMATS)}")
    index = Index.open(uri, version=version)
    _check_format(index, form, approximate)
    folder, schema = Folder(out), _schema(index, form)
    names = _names(index, form, schema)
    if form == "hnsw" or approximate:
        check_memory(index, approximate=approximate)
    make_room(folder, names)
    _write(index, folder, form, approximate, schema, progress or (lambda _: None))
    structure = index.manifest.approximate if approximate else None
    body = {
        **index.form.as_json(),
        "content": form,
        "metric": _METRICS[index.form.kind],
        "rows": index.rows,
        "version_of_index": index.version,
        "model": index.model,
        "class_names": index.class_names,
        "columns": [name for name in schema.names if name in index.schema.names],
        "next_id": index.manifest.next_id,
        "approximate": None if structure is None else structure.info(),
        "files": [file_entry(folder, name) for name in names if name != LANCE],
    }
    write_description(folder, EXPORT, kind=KIND, version=VERSION, body=body)
    folder.remove(UNFINISHED)
    return body


def _check_format(index: Index, form: str, approximate: bool) -> None:
    kind = index.form.kind
    if kind is DescriptorKind.LOCAL and form not in ("npy", "parquet", "arrow"):
        raise RecipeError(
            f"sets of local features are no {form}", where="`form`", mend="take npy, parquet or arrow"
        )
    if not approximate:
        return
    if form != "faiss":
        raise RecipeError("only FAISS's files hold an approximate structure", mend="take the format faiss")
    if kind is not DescriptorKind.VECTORS or index.manifest.approximate is None:
        raise RecipeError(
            "it has no approximate structure of FAISS",
            where=index.folder,
            mend="leave out `approximate`, or build an index of vectors with an approximate search",
        )


def _names(index: Index, form: str, schema: pa.Schema) -> list[str]:
    """Of the files that a format needs, those of the descriptors first."""
    kind = index.form.kind
    if form in TABLES:
        return [TABLES[form][0]]
    if kind is DescriptorKind.LOCAL:
        names = [OFFSETS, *(SETS[array] for array in files_of_sets(index.form))]
    elif form == "npy":
        names = ["codes.npy" if kind is DescriptorKind.CODES else "vectors.npy"]
    else:
        names = ["index.faiss"]
    return [*names, KNOWN] if schema.names else names


def _write(
    index: Index, folder: Folder, form: str, approximate: bool, schema: pa.Schema, progress: Progress
) -> None:
    """Write all files but the last."""
    if form in TABLES:
        name, write = TABLES[form]
        write(folder, name, schema, _tables(index, schema, None, progress))
        return
    with _writing(index, folder, form, approximate) as add:
        tables = _tables(index, schema, add, progress)
        if schema.names:
            write_parquet(folder, KNOWN, schema, tables)
        for _ in tables:  # What is left: all of them, where nothing is written of them.
            pass


def _writing(
    index: Index, folder: Folder, form: str, approximate: bool
) -> AbstractContextManager[Callable[[Descriptors], object]]:
    """What takes the descriptors."""
    name = _names(index, form, pa.schema([]))[0]
    if index.form.kind is DescriptorKind.LOCAL:
        return writing_arrays(folder, index.form, index.rows, _features(index))
    if form == "npy":
        return writing_array(folder, name, index.form, index.rows)
    if form == "hnsw":
        return writing_graph(folder, name, index.form)
    if approximate:
        return writing_structure(folder, name, index)
    return writing_flat(folder, name, index.form, index.rows)


def _tables(
    index: Index, schema: pa.Schema, add: Callable[[Descriptors], object] | None, progress: Progress
) -> Iterator[pa.Table]:
    """What is known of the rows, some at a time, while their descriptors are passed on, or are part of it."""
    step = _BLOCK_SETS if index.form.kind is DescriptorKind.LOCAL else _BLOCK_ROWS
    for start in range(0, index.rows, step):
        rows = index.at(np.arange(start, min(start + step, index.rows)))
        table, descriptors = index.records(rows), index.descriptors(rows)
        if add is not None:
            add(descriptors)
        else:
            for field, column in descriptor_columns(descriptors):
                table = table.append_column(field, column)
        yield table.select(schema.names).cast(schema)
        progress(start + len(rows))


def _schema(index: Index, form: str) -> pa.Schema:
    """Columns of the table, with what a reader of that file alone needs to know."""
    left_out = {"row", *(["id"] if _counted(index) else [])}
    fields = [
        field for field in index.schema if field.name not in left_out and not pa.types.is_null(field.type)
    ]
    if form in TABLES:
        none = index.form.zeros(0)
        taken = {field.name for field in fields} & set(column_names(index.form))
        if taken:
            raise RecipeError(
                f"column '{min(taken)}' has the name of that of the descriptors", mend="take the format npy"
            )
        fields += [field for field, _ in descriptor_columns(none)]
    return with_metadata(pa.schema(fields), index.model, index.class_names)


def _counted(index: Index) -> bool:
    """Whether the ids are the numbers of the exported rows."""
    if index.manifest.next_id is None:
        return False
    last = index.records(index.living()[-1:])["id"]
    return int(last[0].as_py()) == index.rows - 1


def _features(index: Index) -> int:
    """How many local features the rows have that a search can find."""
    numbers, places = index.located(index.living())
    total = 0
    for number, shard in index.shards.items():
        assert isinstance(shard.segment, LocalSegment)
        total += int(shard.segment.local.counts[places[numbers == number]].sum())
    return total
