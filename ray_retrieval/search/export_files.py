"""What `exporting` has written, read again."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.search.column_values import Shape
from ray_retrieval.search.columns import column_names
from ray_retrieval.search.faiss_files import FaissFile
from ray_retrieval.search.table_files import TableFile, open_table
from ray_retrieval.search.vector_files import (
    BLOCK_ROWS,
    ArrayFile,
    Block,
    VectorFile,
    absolute,
    suffix_of,
)
from ray_retrieval.storage import Folder, check_file, fingerprint, read_description

EXPORT, KNOWN = "export.json", "rows.parquet"
KIND, VERSION = "export of an index", 1


def is_export(place: str) -> bool:
    """Whether a folder holds an export."""
    return Folder(place).exists(EXPORT)


def read_export(folder: Folder, name: str = EXPORT) -> dict[str, Any]:
    """What `export.json`, or another file like it, says.

    Raises:
        ArtefactError: if it is missing, or damaged.
    """
    about = read_description(folder, name, kind=KIND, version=VERSION)
    wrong = [name for name in files_named(about) if not _is_name(name)]
    if wrong:
        raise ArtefactError(
            f"damaged: {wrong[0]!r} is no name of a file in it",
            where=folder.uri_of(name),
            mend="export the index again",
        )
    return {"next_id": None, **about}


def files_named(about: dict[str, Any]) -> list[str]:
    """Names of the files of an export."""
    return [entry["file"] for entry in about["files"]]


def _is_name(name: object) -> bool:
    """Whether it is that of a file inside a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:")


class ExportedFile:
    """The rows of an export: descriptors in one file, what else is known of them in another, or the same.

    Args:
        place: the folder.

    Raises:
        ArtefactError: if it holds no export, or a file is missing or damaged.
        DataError: if it is one of sets of local features, of an approximate structure, or of Lance.
    """

    def __init__(self, place: str) -> None:
        folder = Folder(place)
        about = read_export(folder)
        form = Form.from_json(about)
        names = files_named(about)
        if form.kind is DescriptorKind.LOCAL or about["approximate"] or not names:
            what = f"a structure of {about['content']}" if about["approximate"] else about["content"]
            raise DataError(
                f"an export of {form} as {what} is not read again",
                where=place,
                mend="give one of codes or vectors as npy, faiss, parquet or arrow",
            )
        for entry in about["files"]:
            check_file(folder, entry, content=True)
        self.where, self._entries = place, about["files"]
        self._descriptors = _opened(folder.uri_of(names[0]), column_names(form)[0])
        self._known = open_table(folder.uri_of(names[1])) if len(names) > 1 else None
        self.rows = self._descriptors.rows
        found = self._descriptors.shape
        bits = form.size if form.kind is DescriptorKind.CODES else None
        self.shape = Shape(found.dtype, found.width, bits)
        self.schema = self._known.schema.remove_metadata() if self._known else self._descriptors.schema
        self.next_id: int | None = about["next_id"]
        self.model: str | None = about["model"]
        self.class_names: list[str] | None = about["class_names"]
        if self._known is not None and self._known.rows != self.rows:
            raise DataError(f"{self._known.rows:,} rows beside {self.rows:,} descriptors", where=place)

    def __reduce__(self) -> Any:
        """In another process the files are opened anew."""
        return ExportedFile, (absolute(self.where),)

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        if self._known is None:
            yield from self._descriptors.blocks(start, stop)
            return
        # Side by side: a table is read from the start of a row group for whatever is asked of it.
        batches = self._known.batches(self.schema.names, start, stop, BLOCK_ROWS)
        waiting = self.schema.empty_table()
        for values, _ in self._descriptors.blocks(start, stop):
            while len(waiting) < len(values):
                following = pa.Table.from_batches([next(batches)]).replace_schema_metadata(None)
                waiting = pa.concat_tables([waiting, following])
            yield values, waiting.slice(0, len(values))
            waiting = waiting.slice(len(values))

    def column(self, name: str) -> Iterator[pa.Array]:
        if self._known is None:
            return self._descriptors.column(name)
        return (batch[name] for batch in self._known.batches([name], 0, self.rows, BLOCK_ROWS))

    def checksum(self) -> str:
        return fingerprint([entry["sha256"] for entry in self._entries])


def _opened(place: str, column: str) -> VectorFile:
    """The descriptors of an export; those in a table are in a column of a known name."""
    suffix = suffix_of(place)
    if suffix == ".npy":
        return ArrayFile.open(place)
    return FaissFile(place) if suffix == ".faiss" else TableFile(place, column)
